"""Routers: small learned scorers, and the rules that turn scores into what is kept.

Two situations, two names. `by_rank` keeps an exact share of each window, so every training step
costs the same; it looks at the whole window, so a causal model must not serve with it.
`by_threshold` looks at one token after another: a token is kept when its score passes the
threshold, unless the request has by then kept too many or too few. That small controller, a bound
on the debt between what was owed and what was kept, makes a capacity true whatever the text.

Heads, experts and channels are picked for each token by itself, so an exact top-k is causal.

Shape letters, here and in masked.py and sparse.py:
    B batch   T tokens   N packed tokens   D model width   M heads or experts   I inputs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer.accounting import LayerShape
from elastiformer.capacity import Unit

TokenGate = Literal["hard", "sigmoid", "raw"]
PartGate = Literal["hard", "softmax", "renormalised", "mean"]
ImageScorer = Literal["linear", "mlp"]
TOKEN_GATES: tuple[TokenGate, ...] = ("hard", "sigmoid", "raw")
PART_GATES: tuple[PartGate, ...] = ("hard", "softmax", "renormalised", "mean")
IMAGE_SCORERS: tuple[ImageScorer, ...] = ("linear", "mlp")
ROUTED = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.HEADS, Unit.EXPERTS)
TOKEN_UNITS = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)


def things(unit: Unit, shape: LayerShape) -> int:
    """How many scores a router of this unit gives a token."""
    return {Unit.HEADS: shape.heads, Unit.EXPERTS: shape.experts}.get(unit, 1)


class Router(nn.Module):
    """A linear scorer on the normed hidden state. Its scores are logits: 0 is even odds."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        # Small noise, not zero: equal scores would tie, and ties break by position.
        self.weight = nn.Parameter(torch.randn(outputs, width) * (0.01 / math.sqrt(width)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x_ND: Tensor) -> Tensor:
        # In float32 whatever the model runs in: bfloat16 scores tie.
        return F.linear(x_ND.float(), self.weight.float(), self.bias.float())


class ImageRouter(nn.Module):
    """A scorer of an image's tokens as the projector gives them, linear or of two layers.

    `spread` weighs how evenly the kept tokens lie over the image against their scores; 0: nothing.
    """

    def __init__(self, width: int, scorer: ImageScorer, spread: float = 0.0) -> None:
        super().__init__()
        self.spread = spread
        self.inner = nn.Linear(width, width) if scorer == "mlp" else None
        self.outer = Router(width, 1)

    def forward(self, x_PD: Tensor) -> Tensor:
        """One score for each token: [..., P] of [..., P, D], in float32."""
        x_PD = x_PD.float()
        if self.inner is not None:
            x_PD = F.gelu(F.linear(x_PD, self.inner.weight.float(), self.inner.bias.float()))
        scores: Tensor = self.outer(x_PD).squeeze(-1)
        return scores

    def spaced(self, scores: Tensor) -> Tensor:
        """What tokens are ranked by: their scores [..., P], and their places as `spread` weighs."""
        if self.spread == 0:
            return scores
        return scores + self.spread * even_places(scores.shape[-1]).to(scores.device)

    @property
    def flops_per_token(self) -> int:
        inner = 0 if self.inner is None else self.inner.weight.numel()
        return 2 * (inner + self.outer.weight.numel())


def even_places(tokens: int) -> Tensor:
    """A number in [0, 1) for each place of an image, in the order of its tokens: float32 [P].

    The places above any bound lie evenly over the image: over its square, where the tokens make
    one, else over their order.

    Source: a Kronecker sequence, of the golden ratio along rows and the root of 2 down columns.
    """
    side = math.isqrt(tokens)
    at_P = torch.arange(tokens, dtype=torch.float64)
    row_P = at_P.div(side, rounding_mode="floor") if side * side == tokens else 0 * at_P
    column_P = at_P - side * row_P
    turned_P = column_P * (math.sqrt(5) - 1) / 2 + row_P * (math.sqrt(2) - 1)
    return (turned_P % 1).float()


class Routers(nn.Module):
    """All routers of a model: `of(layer, unit)`, and `image` where image tokens are dropped."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        units: Sequence[Unit],
        image_scorer: ImageScorer = "linear",
        image_spread: float = 0.0,
    ) -> None:
        super().__init__()
        self.image: ImageRouter | None = None
        if Unit.IMAGE_TOKENS in units:
            self.image = ImageRouter(shapes[0].width, image_scorer, image_spread)
        self.units = tuple(unit for unit in ROUTED if unit in units)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {unit.value: Router(shape.width, things(unit, shape)) for unit in self.units}
            )
            for shape in shapes
        )

    def of(self, layer: int, unit: Unit) -> Router | None:
        routers: nn.ModuleDict = self.layers[layer]  # type: ignore[assignment]
        return routers[unit.value] if unit in self.units else None  # type: ignore[return-value]


@dataclass(slots=True)
class Debt:
    """What one request owes one token unit of one layer and phase: tokens due minus tokens kept."""

    owed: float = 0.0
    seen: int = 0


_SLACK_TOKENS, _SLACK_SHARE = 2.0, 1 / 64  # between what was due and what was kept


def keeps(score: float | None, share: float, threshold: float, debt: Debt) -> bool:
    """Whether the next token is kept: when it passes the threshold, and as `share` asks for.

    The number kept never strays from the number due by more than two tokens, or 1/64 of the
    tokens seen. Without scores the kept tokens are spread evenly.
    """
    debt.seen += 1
    due = debt.owed + share
    if score is None:
        keep = due >= 0.5
    else:
        slack = max(_SLACK_TOKENS, debt.seen * _SLACK_SHARE)
        keep = due > slack or (due - 1 >= -slack and score > threshold)
    debt.owed = due - 1 if keep else due
    return keep


def by_threshold(
    scores: Sequence[float] | None,
    shares: Sequence[float],
    thresholds: Sequence[float],
    debt: Debt,
) -> list[bool]:
    """Which of one request's next tokens are kept, in order: `keeps` for each."""
    given: Sequence[float | None] = [None] * len(shares) if scores is None else scores
    each = zip(given, shares, thresholds, strict=True)
    return [keeps(score, share, threshold, debt) for score, share, threshold in each]


def most_kept(shares: Sequence[tuple[float, int]]) -> int:
    """The most tokens that `by_threshold` can keep, of so many under each share."""
    whole = sum(count for share, count in shares if share == 1)
    routed = [(share, count) for share, count in shares if 0 < share < 1]
    seen = sum(count for _, count in routed)
    if not seen:
        return whole
    due = sum(share * count for share, count in routed)
    slack = max(_SLACK_TOKENS, seen * _SLACK_SHARE)
    return whole + min(seen, math.ceil(due + slack) + 1)


def by_rank(scores_BT: Tensor, share_BT: Tensor, among_BT: Tensor) -> Tensor:
    """Keep the best-scoring tokens of each row, as many as the shares of `among_BT` add up to."""
    due_B = (share_BT * among_BT).sum(1).round().long()
    ranked_BT = scores_BT.masked_fill(~among_BT, -math.inf)
    rank_BT = ranked_BT.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank_BT < due_B[:, None]) & among_BT


def best(scores_NM: Tensor, keep_N: Tensor) -> Tensor:
    """True for the `keep_N` best-scoring things of each token, exactly so many."""
    kept_NM = torch.ones_like(scores_NM, dtype=torch.bool)
    for count in set(keep_N.flatten().tolist()):  # there are few different counts
        if count < scores_NM.shape[-1]:
            rows = keep_N == count
            kept_NM[rows] = _best(scores_NM[rows], count)
    return kept_NM


def _best(scores_RM: Tensor, count: int) -> Tensor:
    least_R1 = _kth_largest(scores_RM, count)
    kept_RM = scores_RM >= least_R1
    tied_R = kept_RM.sum(-1) != count
    if bool(tied_R.any()):
        chosen_TK = scores_RM[tied_R].topk(count, dim=-1).indices
        kept_RM[tied_R] = torch.zeros_like(kept_RM[tied_R]).scatter_(-1, chosen_TK, True)
    return kept_RM


def _kth_largest(scores_RM: Tensor, count: int) -> Tensor:
    """Each row's `count`-th largest score, [R, 1]."""
    at = scores_RM.shape[-1] - count
    if scores_RM.device.type == "cpu" and scores_RM.dtype == torch.float32:
        # NumPy partitions with the processor's vectors: many times faster than PyTorch's topk.
        ordered_RM = np.partition(scores_RM.numpy(), at, axis=-1)
        return torch.from_numpy(ordered_RM[:, at : at + 1])
    return scores_RM.topk(count, dim=-1).values[:, -1:]


def token_gate(scores: Tensor, kept: Tensor, form: TokenGate) -> Tensor:
    """What a kept token's branch is multiplied by; 0 for a skipped one.

    `hard` is 1 exactly, with the sigmoid's gradient passed straight through. `sigmoid` is the
    paper's (arXiv:2411.15281), `raw` the authors' image-token router's.
    """
    if form == "hard":
        soft = scores.sigmoid()
        return kept.to(soft.dtype) + (soft - soft.detach())
    return kept * (scores.sigmoid() if form == "sigmoid" else scores)


def part_gate(scores_M: Tensor, kept_M: Tensor, form: PartGate) -> Tensor:
    """What each head's or expert's output is multiplied by; 0 for one left out.

    `softmax` is M x p, `renormalised` the authors' M x p / (sum of the kept p), `mean` the same
    scaled to average 1 over the kept; `hard` is 1 exactly, gradients passed straight through.
    """
    things = scores_M.shape[-1]
    p_M = scores_M.softmax(-1)
    if form == "hard":
        soft = things * p_M
        return kept_M.to(soft.dtype) + (soft - soft.detach())
    if form == "softmax":
        return things * p_M * kept_M
    kept_p_M = p_M * kept_M
    total = kept_p_M.sum(-1, keepdim=True)
    scale = things if form == "renormalised" else kept_M.sum(-1, keepdim=True)
    return scale * kept_p_M / total
