"""Norms and rotations in few operators.

At one row an operator costs as much as its arithmetic, and Transformers' norm takes six of them
and its rotation fourteen. Each form here stands in for a module only after it gave that module's
result on a sample; otherwise the module itself runs.

Shape letters: N rows   D width   M heads   H head size   R rotated part of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer.families import Layer

Norm = Callable[[Tensor], Tensor]


@torch.inference_mode()
def lean_norm(module: nn.Module) -> Norm:
    """The module's norm over the last dimension, in as few operators as give the same."""
    held: Any = module
    weight_D: Tensor | None = getattr(module, "weight", None)
    epsilon = getattr(held, "variance_epsilon", getattr(held, "eps", None))
    if weight_D is None or epsilon is None or isinstance(module, nn.LayerNorm):
        return module
    if weight_D.dtype == torch.float64:
        return module  # Transformers' norm is float32 inside, and who asks for more wants it alike
    sample_ND = torch.linspace(-2, 3, 3 * len(weight_D), device=weight_D.device)
    sample_ND = sample_ND.view(3, -1).to(weight_D.dtype)
    expected_ND = module(sample_ND)
    tolerance = 1e-5 if weight_D.dtype == torch.float32 else 1e-2
    for scale_D in (weight_D.detach(), 1 + weight_D.detach().float()):
        norm = _root_mean_square(scale_D, float(epsilon))
        if torch.allclose(norm(sample_ND), expected_ND, rtol=tolerance, atol=tolerance):
            return norm
    return module


def _root_mean_square(scale_D: Tensor, epsilon: float) -> Norm:
    width = len(scale_D)
    if scale_D.dtype != torch.float32 or scale_D.device.type != "cpu":
        return lambda x_ND: F.rms_norm(x_ND, (width,), scale_D.to(x_ND.dtype), epsilon)
    bias = torch.tensor(epsilon)

    def norm(x_ND: Tensor) -> Tensor:
        if x_ND.dtype != torch.float32:
            return F.rms_norm(x_ND, (width,), scale_D.to(x_ND.dtype), epsilon)
        length_N1 = torch.linalg.vector_norm(x_ND, 2, -1, True)
        inverse_N1 = torch.addcmul(bias, length_N1, length_N1, value=1 / width).rsqrt_()
        return (x_ND * inverse_N1).mul_(scale_D)

    return norm


class Rotation:
    """Cosines and signed sines of one step's rows, for layers that rotate alike."""

    def __init__(self, cos_NR: Tensor, sin_NR: Tensor) -> None:
        self.cos_NR, self.sin_NR = cos_NR, sin_NR
        self._cos_N1R = cos_NR[:, None]
        self._half = cos_NR.shape[1] // 2
        # x * cos + (second half, negated; first half) * sin, with the sign in the sine.
        signed_NR = torch.cat([-sin_NR[:, : self._half], sin_NR[:, self._half :]], 1)
        self._sin_N1R = signed_NR[:, None]

    def turn(self, x_NMH: Tensor) -> None:
        """Rotate in place."""
        part_NMR = x_NMH[..., : self.cos_NR.shape[1]]
        rolled_NMR = part_NMR.roll(self._half, -1)
        torch.addcmul(part_NMR * self._cos_N1R, rolled_NMR, self._sin_N1R, out=part_NMR)

    def of(self, index: slice | Tensor) -> Rotation:
        """The rotation of some of the rows."""
        some = object.__new__(Rotation)
        some.cos_NR, some.sin_NR, some._half = self.cos_NR[index], self.sin_NR[index], self._half
        some._cos_N1R, some._sin_N1R = self._cos_N1R[index], self._sin_N1R[index]
        return some


@torch.inference_mode()
def turns_halves(layer: Layer, rotated: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Rotation` rotates as this layer's family does."""
    assert layer.rotate is not None, "a layer that rotates"
    angle_NR = torch.linspace(0, 3, 2 * rotated, device=device).view(2, rotated)
    cos_NR, sin_NR = angle_NR.cos().to(dtype), angle_NR.sin().to(dtype)
    x_NMH = torch.linspace(-1, 1, 2 * 3 * layer.shape.head_dim, device=device).to(dtype)
    x_NMH = x_NMH.view(2, 3, -1)
    expected_NMH, _ = layer.rotate(x_NMH, x_NMH, cos_NR, sin_NR)
    turned_NMH = x_NMH.clone()
    Rotation(cos_NR, sin_NR).turn(turned_NMH)
    return torch.allclose(turned_NMH, expected_NMH, rtol=1e-2, atol=1e-2)
