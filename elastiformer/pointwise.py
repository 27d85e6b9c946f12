"""Norms, rotations and gates in few operators; on a CPU in float32 in one (row_kernels.py).

At one row an operator costs as much as its arithmetic, and Transformers' norm takes six of them
and its rotation fourteen. Each form here stands in for a module only after it gave that module's
result on a sample; otherwise the module itself runs.

Shape letters: N rows   D width   M heads   H head size   R rotated part of a head   I neurons
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer import class_kernels, row_kernels, spare_rows
from elastiformer.class_kernels import AffineNorm, affine_of
from elastiformer.families import Layer

# Types of cosines, and of what they turn, that the compiled rotation takes.
_TURNED = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16))
Norm = Callable[[Tensor], Tensor]
Gate = Callable[[Tensor], Tensor]


@torch.inference_mode()
def lean_norm(module: nn.Module) -> Norm:
    """The module's norm over the last dimension, in as few operators as give the same."""
    held: Any = module
    weight_D: Tensor | None = getattr(module, "weight", None)
    epsilon = getattr(held, "variance_epsilon", getattr(held, "eps", None))
    if weight_D is None or epsilon is None or isinstance(module, nn.LayerNorm):
        return _as_it_is(module)
    if weight_D.dtype == torch.float64:
        return module  # Transformers' norm is float32 inside, and who asks for more wants it alike
    sample_ND = torch.linspace(-2, 3, 3 * len(weight_D), device=weight_D.device)
    sample_ND = sample_ND.view(3, -1).to(weight_D.dtype)
    expected_ND = module(sample_ND)
    tolerance = 1e-5 if weight_D.dtype == torch.float32 else 1e-2
    working = working_dtype(weight_D.device, weight_D.dtype)
    for scale_D in (weight_D.detach(), 1 + weight_D.detach().float()):
        norm = _root_mean_square(scale_D.to(working), float(epsilon))
        given_ND = norm(sample_ND.to(working)).to(expected_ND.dtype)
        if torch.allclose(given_ND, expected_ND, rtol=tolerance, atol=tolerance):
            return norm
    return _as_it_is(module)


def in_type(norm: Norm, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """What a norm gives, in this type."""
    if not isinstance(norm, CompiledNorm | CompiledLayerNorm):
        return norm(x_ND).to(dtype)
    if dtype in (torch.float32, torch.bfloat16):
        return norm(x_ND, dtype)
    return norm(x_ND).to(dtype)


def makes_anew(norm: Norm) -> bool:
    """Whether what a norm gives is another tensor than it was given."""
    return not isinstance(norm, nn.Identity)


def working_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a model of this type is computed in between its products."""
    small = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if small and device.type == "cpu" else dtype


def _as_it_is(module: nn.Module) -> Norm:
    """The module's norm of rows in the working type."""
    weight: Tensor | None = next(module.parameters(), None)
    if weight is None or working_dtype(weight.device, weight.dtype) == weight.dtype:
        return module
    affine = affine_of(module)
    if affine is not None and weight.dtype == torch.bfloat16:
        return CompiledLayerNorm(affine)
    return lambda x_ND: module(x_ND.to(weight.dtype)).to(x_ND.dtype)


def _root_mean_square(scale_D: Tensor, epsilon: float) -> Norm:
    if scale_D.dtype == torch.float32 and scale_D.device.type == "cpu":
        return CompiledNorm(scale_D.numpy(), epsilon)
    return RootMeanSquare(scale_D, epsilon)


@dataclass(frozen=True, slots=True, eq=False)
class RootMeanSquare:
    """x / (root mean square over the last dimension) * scale, on any device."""

    scale_D: Tensor
    epsilon: float

    def __call__(self, x_ND: Tensor) -> Tensor:
        return F.rms_norm(x_ND, self.scale_D.shape, self.scale_D.to(x_ND.dtype), self.epsilon)


@dataclass(frozen=True, slots=True, eq=False)
class CompiledNorm:
    """x / (root mean square over the last dimension) * scale, of float32 on a CPU."""

    scale_D: np.ndarray
    epsilon: float

    def __call__(self, x_ND: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Computed in float32, and given as `dtype`: that, or bfloat16."""
        x_ND = x_ND.contiguous()
        out_ND = spare_rows.empty(tuple(x_ND.shape), dtype, x_ND.device)
        width = len(self.scale_D)
        of_row, into = (row_kernels.on_host(each.view(-1, width)) for each in (x_ND, out_ND))
        row_kernels.normalise(of_row, self.scale_D, self.epsilon, into)
        return out_ND


@dataclass(frozen=True, slots=True, eq=False)
class CompiledLayerNorm:
    """A layer norm, with a scale and a shift, of float32 or bfloat16 on a CPU."""

    norm: AffineNorm

    def __call__(self, x_ND: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Computed in float32, and given as `dtype`: that, or bfloat16; None: as it came."""
        x_ND = x_ND.contiguous()
        out_ND = spare_rows.empty(tuple(x_ND.shape), dtype or x_ND.dtype, x_ND.device)
        width = x_ND.shape[-1]
        class_kernels.normed(x_ND.view(-1, width), self.norm, out_ND.view(-1, width))
        return out_ND


@torch.inference_mode()
def lean_gate(layer: Layer) -> Gate:
    """activation(gate) * up, of the two side by side: [N, 2I] to [N, I]."""

    def plain(both_N2I: Tensor) -> Tensor:
        gate_NI, up_NI = both_N2I.chunk(2, dim=1)
        return layer.activation(gate_NI).mul_(up_NI)

    weight_OI = layer.up.weight_OI
    working = working_dtype(weight_OI.device, weight_OI.dtype)
    if weight_OI.device.type != "cpu" or working != torch.float32:
        return plain
    sample_N2I = torch.linspace(-9, 9, 4 * 34).view(4, 34)
    for form in (row_kernels.SILU, row_kernels.GELU):
        compiled = CompiledGate(form)
        if torch.allclose(compiled(sample_N2I), plain(sample_N2I), rtol=1e-5, atol=1e-6):
            return compiled
    return plain


@dataclass(frozen=True, slots=True)
class CompiledGate:
    """activation(first half) * second half, of float32 on a CPU, or of products in bfloat16."""

    form: int  # row_kernels.SILU or GELU

    def __call__(self, both_N2I: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Computed in float32, and given as `dtype`."""
        shape = (len(both_N2I), both_N2I.shape[1] // 2)
        out_NI = spare_rows.empty(shape, dtype, both_N2I.device)
        row_kernels.gate(self.form, *map(row_kernels.on_host, (both_N2I, out_NI)))
        return out_NI


class Rotation:
    """Cosines and sines of one step's rows, for layers that rotate alike."""

    def __init__(self, cos_NR: Tensor, sin_NR: Tensor) -> None:
        self.cos_NR, self.sin_NR = cos_NR, sin_NR

    def turn(self, x_NMH: Tensor, heads: int | None = None) -> None:
        """Rotate the first heads, or all, in place."""
        heads = x_NMH.shape[1] if heads is None else heads
        known = (self.cos_NR.dtype, x_NMH.dtype) in _TURNED and x_NMH.is_cpu
        if known and x_NMH.is_contiguous():
            row_kernels.turn(row_kernels.on_host(x_NMH), heads, *self.on_host)
            return
        part_NMR = x_NMH[:, :heads, : self.cos_NR.shape[1]]
        cos_N1R, sin_N1R = self._signed
        rolled_NMR = part_NMR.roll(cos_N1R.shape[-1] // 2, -1)
        torch.addcmul(part_NMR * cos_N1R, rolled_NMR, sin_N1R, out=part_NMR)

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        return self.cos_NR.contiguous().numpy(), self.sin_NR.contiguous().numpy()

    @cached_property
    def _signed(self) -> tuple[Tensor, Tensor]:
        """x * cos + (second half, negated; first half) * sin, with the sign in the sine."""
        first_NR, second_NR = self.sin_NR.chunk(2, dim=1)
        return self.cos_NR[:, None], torch.cat([-first_NR, second_NR], 1)[:, None]

    def of(self, index: slice | Tensor) -> Rotation:
        """The rotation of some of the rows."""
        return Rotation(self.cos_NR[index], self.sin_NR[index])


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
