"""What a little text says of inputs that are left out, by least squares.

One pass of the pretrained model gathers second moments: of the inputs of every site, and of what
each sub-layer adds with the input that it reads. From them follows in closed form what kept inputs
tell of those left out, and what a thin map of its input tells of a whole sub-layer.

Position 0 is left out of all sums: it is like no other token.

Shape letters: W windows   B rows   T tokens   N tokens of all rows   I inputs   J inputs and a 1
    K kept inputs   L inputs that may be left out   O outputs   D width   R rank
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer import ElasticModel
from elastiformer.capacity import Site
from elastiformer.families import Layer
from training.progress import track

RIDGE = 1e-3  # of the mean of the inputs' squares
ROWS_AT_ONCE = 4
READ_AT = {"attention_tokens": Site.ATTENTION_IN, "mlp_tokens": Site.MLP_IN}


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Sums over tokens, float32, with a constant 1 behind the inputs."""

    inputs: dict[tuple[int, Site], Tensor] = field(default_factory=dict)  # [J, J]
    branches: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # [D, J]

    def sizes(self) -> dict[tuple[int, Site], Tensor]:
        """The root mean square of every input of every site, [I]."""
        return {
            place: (sums_JJ.diagonal()[:-1] / sums_JJ[-1, -1]).sqrt()
            for place, sums_JJ in self.inputs.items()
        }


@torch.inference_mode()
def second_moments(model: ElasticModel, ids_WT: Tensor) -> SecondMoments:
    found = SecondMoments()
    read: dict[tuple[int, Site], Tensor] = {}

    def before(layer: Layer, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            x_NJ = F.pad(_without_first(args[0]), (0, 1), value=1.0)
            place = (layer.index, site)
            found.inputs[place] = x_NJ.T @ x_NJ + found.inputs.get(place, 0)
            if site in READ_AT.values():
                read[place] = x_NJ

        return hook

    def after(layer: Layer, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            y_ND = _without_first(out[0] if isinstance(out, tuple) else out)
            x_NJ = read.pop((layer.index, READ_AT[name]))
            place = (layer.index, name)
            found.branches[place] = y_ND.T @ x_NJ + found.branches.get(place, 0)

        return hook

    with ExitStack() as hooks:
        for layer in model.layout.layers:
            for site in Site:
                module = layer.at_site(site)[0].module
                hooks.callback(module.register_forward_pre_hook(before(layer, site)).remove)
            for name, branch in branches_of(layer).items():
                hooks.callback(branch.register_forward_hook(after(layer, name)).remove)
        batches = list(torch.split(ids_WT.to(model.device), ROWS_AT_ONCE))
        for ids_BT in track(batches, label="what inputs have in common"):
            model.teacher(ids_BT)
    return found


def branches_of(layer: Layer) -> dict[str, nn.Module]:
    """What gives each sub-layer's branch, by the field of a plan that leaves it out."""
    return {"attention_tokens": layer.attention_branch, "mlp_tokens": layer.mlp_branch}


def told_by_kept(sums_JJ: Tensor, chance_I: Tensor, ridge: float = RIDGE) -> Tensor:
    """The affine map [I, J] that guesses all inputs from those that are kept, zeros elsewhere.

    Args:
        chance_I: how likely each input is kept, independently; 1 or 0 where that is fixed.
    """
    chance_J = F.pad(chance_I.double(), (0, 1), value=1.0)
    (kept_K,) = torch.nonzero(chance_J > 0, as_tuple=True)
    chance_K = chance_J[kept_K]
    sums = sums_JJ.double()
    # Of two inputs both are kept with the product of their chances, of one and itself with one.
    seen_KK = sums[kept_K][:, kept_K] * chance_K[:, None] * chance_K
    squares_K = chance_K * sums.diagonal()[kept_K]
    seen_KK.diagonal().copy_(squares_K + ridge * squares_K[:-1].mean() * (squares_K > 0))
    map_IJ = torch.eye(len(chance_I), len(chance_J), dtype=sums.dtype, device=sums.device)
    (unsure_L,) = torch.nonzero(chance_I < 1, as_tuple=True)  # what is always kept needs no guess
    wanted_KL = chance_K[:, None] * sums[kept_K][:, unsure_L]
    guess_LJ = map_IJ.new_zeros(len(unsure_L), len(chance_J))
    guess_LJ[:, kept_K] = torch.linalg.solve(seen_KK, wanted_KL).T
    map_IJ[unsure_L] = guess_LJ
    return map_IJ.float()


@dataclass(frozen=True, slots=True, eq=False)
class SkipPath:
    """A thin map in place of a sub-layer: x -> (x A^T) B^T + bias."""

    a_RI: Tensor
    b_DR: Tensor
    bias_D: Tensor

    def __call__(self, x_NI: Tensor) -> Tensor:
        return F.linear(F.linear(x_NI, self.a_RI), self.b_DR, self.bias_D)

    @property
    def flops_per_token(self) -> int:
        return 2 * (self.a_RI.numel() + self.b_DR.numel())


def skip_path(sums_JJ: Tensor, branch_DJ: Tensor, rank: int, ridge: float = RIDGE) -> SkipPath:
    """What a map of this rank and a bias make of what a sub-layer adds, at best."""
    tokens = sums_JJ[-1, -1]
    mean_I, mean_D = sums_JJ[:-1, -1] / tokens, branch_DJ[:, -1] / tokens
    xx_II = sums_JJ[:-1, :-1] / tokens - torch.outer(mean_I, mean_I)
    yx_DI = branch_DJ[:, :-1] / tokens - torch.outer(mean_D, mean_I)
    a_RI, b_DR, _ = low_rank(yx_DI, xx_II, rank, ridge)
    return SkipPath(a_RI, b_DR, mean_D - b_DR @ (a_RI @ mean_I))


def low_rank(
    yx_OI: Tensor, xx_II: Tensor, rank: int, ridge: float = RIDGE
) -> tuple[Tensor, Tensor, float]:
    """A [R, I] and B [O, R] so that (x A^T) B^T is the best guess of y at this rank.

    Rank-reduced regression: the full map, in the metric of the inputs, cut to its largest
    directions. Also returned: the part that it does of what the full map could.
    """
    diagonal = ridge * xx_II.diagonal().mean()
    values_I, vectors_II = torch.linalg.eigh(
        xx_II + diagonal * torch.eye(len(xx_II), device=xx_II.device)
    )
    root_I = values_I.clamp_min(diagonal).sqrt()
    left_OK, all_K, right_KI = torch.linalg.svd((yx_OI @ vectors_II) / root_I, full_matrices=False)
    size_R = all_K[:rank]  # no more than there are outputs
    root_R = size_R.sqrt()
    a_RI = root_R[:, None] * ((right_KI[:rank] / root_I) @ vectors_II.T)
    part = float(size_R.pow(2).sum() / all_K.pow(2).sum().clamp_min(1e-12))
    return a_RI, left_OK[:, :rank] * root_R, part


def _without_first(x_BTI: Tensor) -> Tensor:
    return x_BTI[:, 1:].flatten(0, 1).float()
