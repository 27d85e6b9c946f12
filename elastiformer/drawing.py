"""A token per row, from its logits, its filters and one uniform number of its own.

A vocabulary is read as few times as the filters allow. The greatest logit of each of its blocks
leads to the likeliest tokens. A row with a filter is drawn from a few of these, and from more
only where they do not decide; a row without one sums its blocks, finds the block that its number
falls into and looks only inside. Either way the token is the one that the number hits on the
running sum over the whole vocabulary, so no row depends on the others. Knows no request.

Shape letters: R rows   V vocabulary   B blocks of the vocabulary   W tokens of a block
    D rows drawn   K likeliest tokens   N tokens of some blocks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # tokens of a vocabulary that share one maximum
_FEW = 64  # likeliest tokens that a filter looks at first
_MORE = 16  # times as many where they do not decide
_PART = 1 << 20  # logits whose weights are in memory at once
_COLDEST = 1e-5  # temperature: below it the likeliest token has all the weight anyway


class Blocks:
    """Rows of logits, and the greatest one of each block of their vocabulary."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV = logits_RV
        self.vocabulary = logits_RV.shape[-1]
        self._flat = logits_RV.reshape(-1)
        self.maxima_RB = _by_block(logits_RV, lambda x_RBW: x_RBW.amax(dim=-1))
        self.peak_R, self._best_R = self.maxima_RB.max(dim=-1)

    def best(self) -> Tensor:
        """The likeliest token of each row; of several, the first."""
        row_R = torch.arange(len(self.peak_R), device=self.peak_R.device)
        token_RW, logit_RW = self.inside(row_R, self._best_R[:, None])
        return token_RW.gather(-1, logit_RW.argmax(dim=-1, keepdim=True)).squeeze(-1)

    def inside(self, row_D: Tensor, block_DK: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of some blocks, and their logits: -inf where the vocabulary has ended."""
        within_W = torch.arange(_BLOCK, device=block_DK.device)
        token_DN = (block_DK[..., None] * _BLOCK + within_W).flatten(1)
        place_DN = token_DN.clamp(max=self.vocabulary - 1) + row_D[:, None] * self.vocabulary
        logit_DN = self._flat.gather(0, place_DN.view(-1)).view_as(place_DN)
        if self.vocabulary % _BLOCK:
            logit_DN = logit_DN.masked_fill(token_DN >= self.vocabulary, -math.inf)
        return token_DN, logit_DN

    def likeliest(self, row_D: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The `most` likeliest tokens in the order of the vocabulary, and their logits.

        Of the tokens that tie with the last of them, any may be among them.
        """
        if most == self.vocabulary:
            token_V = torch.arange(most, device=row_D.device)
            return token_V.expand(len(row_D), -1), self.logits_RV[row_D]
        if most * 4 > self.maxima_RB.shape[-1]:
            logit_DK, token_DK = self.logits_RV[row_D].topk(most, sorted=False)
        else:
            # A token outside these blocks is at most the least of their maxima.
            block_DK = self.maxima_RB[row_D].topk(most, sorted=False).indices
            token_DN, logit_DN = self.inside(row_D, block_DK)
            logit_DK, place_DK = logit_DN.topk(most, sorted=False)
            token_DK = token_DN.gather(-1, place_DK)
        token_DK, order_DK = token_DK.sort(dim=-1)
        return token_DK, logit_DK.gather(-1, order_DK)


@dataclass(frozen=True, slots=True)
class Pick:
    """What one row draws with; `top_k` 0 keeps all."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def drawn(blocks: Blocks, picks: Sequence[Pick]) -> Tensor:
    """The token that each pick draws."""
    table = torch.tensor(
        [
            (
                pick.row,
                max(pick.temperature, _COLDEST),
                min(pick.top_k or blocks.vocabulary, blocks.vocabulary),
                pick.top_p if pick.top_p < 1 else math.inf,
                pick.min_p,
                pick.uniform,
            )
            for pick in picks
        ],
        dtype=torch.float64,
    ).to(blocks.peak_R.device)
    filtered = [place for place, pick in enumerate(picks) if pick.is_filtered]
    if not filtered:
        return _of_all(blocks, picks, _Rows.of(table, blocks))
    if len(filtered) == len(picks):
        return _of_likeliest(blocks, picks, _Rows.of(table, blocks))
    free = [place for place, pick in enumerate(picks) if not pick.is_filtered]
    token_D = torch.empty(len(picks), dtype=torch.int64, device=table.device)
    for places, draw in ((free, _of_all), (filtered, _of_likeliest)):
        some = [picks[place] for place in places]
        token_D[places] = draw(blocks, some, _Rows.of(table[places], blocks))
    return token_D


@dataclass(frozen=True, slots=True)
class _Rows:
    """Picks as tensors, with the greatest logit of each row."""

    row_D: Tensor
    peak_D1: Tensor
    temperature_D1: Tensor
    top_k_D1: Tensor
    top_p_D1: Tensor
    min_p_D1: Tensor
    uniform_D1: Tensor

    @classmethod
    def of(cls, table: Tensor, blocks: Blocks) -> _Rows:
        row_D1, temperature_D1, top_k_D1, *rest = torch.split(table, 1, dim=-1)
        row_D = row_D1.squeeze(-1).long()
        peak_D1 = blocks.peak_R[row_D].double()[:, None]
        return cls(row_D, peak_D1, temperature_D1, top_k_D1.long(), *rest)

    def __getitem__(self, place_D: Tensor) -> _Rows:
        return _Rows(
            self.row_D[place_D],
            self.peak_D1[place_D],
            self.temperature_D1[place_D],
            self.top_k_D1[place_D],
            self.top_p_D1[place_D],
            self.min_p_D1[place_D],
            self.uniform_D1[place_D],
        )

    def weights(self, logit_DN: Tensor) -> Tensor:
        """How likely each token is beside the likeliest one of its row, which weighs 1."""
        return ((logit_DN.double() - self.peak_D1) / self.temperature_D1).exp()


def _of_all(blocks: Blocks, picks: Sequence[Pick], rows: _Rows) -> Tensor:
    sum_DB = _sums(blocks, picks, rows)
    target_D1 = rows.uniform_D1 * sum_DB[:, -1:]
    block_D1 = _hit(sum_DB, target_D1)
    before_D1 = torch.nn.functional.pad(sum_DB, (1, 0)).gather(-1, block_D1)
    token_DW, logit_DW = blocks.inside(rows.row_D, block_D1)
    sum_DW = rows.weights(logit_DW).cumsum(dim=-1)
    return token_DW.gather(-1, _hit(sum_DW, target_D1 - before_D1)).squeeze(-1)


def _of_likeliest(blocks: Blocks, picks: Sequence[Pick], rows: _Rows) -> Tensor:
    mass_D1 = torch.ones_like(rows.uniform_D1)
    summed = [
        place
        for place, pick in enumerate(picks)
        if pick.top_p < 1 and not 0 < pick.top_k < blocks.vocabulary
    ]
    if summed:
        place_S = torch.tensor(summed, device=mass_D1.device)
        some = [picks[place] for place in summed]
        mass_D1[place_S] = _sums(blocks, some, rows[place_S])[:, -1:]

    token_D = torch.empty_like(rows.row_D)
    left_D = torch.arange(len(picks), device=token_D.device)
    most = min(_FEW, blocks.vocabulary)
    while True:
        sure: list[Tensor] = []
        for part_D in torch.split(left_D, max(1, _PART // most)):
            token_D[part_D], sure_D = _filtered(blocks, rows[part_D], mass_D1[part_D], most)
            sure.append(sure_D)
        if most == blocks.vocabulary:
            return token_D
        left_D = left_D[~torch.cat(sure)]
        if not len(left_D):
            return token_D
        most *= _MORE
        if most * _MORE > blocks.vocabulary:
            most = blocks.vocabulary


def _filtered(blocks: Blocks, rows: _Rows, mass_D1: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A token of each row, and whether the `most` likeliest ones are enough to be sure of it."""
    token_DK, logit_DK = blocks.likeliest(rows.row_D, most)
    falling_DK = _falling(logit_DK)
    weight_DK = rows.weights(falling_DK)
    sum_DK = weight_DK.cumsum(dim=-1)

    # Every filter keeps the likeliest tokens up to some place.
    least_D1 = falling_DK.gather(-1, rows.top_k_D1.clamp(max=most) - 1)
    of_top_k_DK = falling_DK >= least_D1  # the ones that tie with the last are kept too
    best_D1 = of_top_k_DK.sum(dim=-1, keepdim=True)
    has_top_k_D1 = rows.top_k_D1 < blocks.vocabulary
    mass_D1 = torch.where(has_top_k_D1, sum_DK.gather(-1, best_D1 - 1), mass_D1)
    # The smallest set that reaches top_p: a token stays while the ones before it do not reach it.
    of_top_p_DK = sum_DK - weight_DK < rows.top_p_D1 * mass_D1
    kept_DK = of_top_k_DK & of_top_p_DK & (weight_DK >= rows.min_p_D1) & (weight_DK > 0)
    kept_D1 = kept_DK.sum(dim=-1, keepdim=True)

    # Every token better than the last one is here; of those that tie with it some may lack.
    last_D1 = falling_DK[:, -1:]
    known_D1 = (falling_DK > last_D1).sum(dim=-1, keepdim=True)
    known_D1 = known_D1.where(last_D1 > -math.inf, most)
    sure_D1 = (kept_D1 <= known_D1) & (~has_top_k_D1 | (best_D1 <= known_D1))

    # Back in the order of the vocabulary: of those that tie at the end, the first ones stay.
    end_D1 = falling_DK.gather(-1, kept_D1 - 1)
    tie_DK = logit_DK == end_D1
    ties_D1 = kept_D1 - (falling_DK > end_D1).sum(dim=-1, keepdim=True)
    kept_DK = (logit_DK > end_D1) | (tie_DK & (tie_DK.cumsum(dim=-1) <= ties_D1))
    sum_DK = (rows.weights(logit_DK) * kept_DK).cumsum(dim=-1)
    place_D1 = _hit(sum_DK, rows.uniform_D1 * sum_DK[:, -1:])
    return token_DK.gather(-1, place_D1).squeeze(-1), sure_D1.squeeze(-1)


def _falling(x_DK: Tensor) -> Tensor:
    if x_DK.device.type == "cpu":  # there NumPy sorts several times as fast
        return torch.from_numpy(np.sort(-x_DK.numpy(), axis=-1)).neg_()
    return x_DK.sort(dim=-1, descending=True).values


def _sums(blocks: Blocks, picks: Sequence[Pick], rows: _Rows) -> Tensor:
    """The running sum of the weights, at the end of each block."""
    peak_D1, temperature_D1 = rows.peak_D1.float(), rows.temperature_D1.float()
    sums: list[Tensor] = []
    done = 0
    for part in parts([pick.row for pick in picks], blocks.vocabulary):
        of_part = slice(done, done := done + len(part))
        weight_DV = some_rows(blocks.logits_RV, part).float() - peak_D1[of_part]
        weight_DV.div_(temperature_D1[of_part]).exp_()
        sums.append(_by_block(weight_DV, lambda x_DBW: x_DBW.sum(dim=-1)))
    # In double precision, or the sum over a large vocabulary drifts.
    return torch.cat(sums).cumsum(dim=-1, dtype=torch.float64)


def _hit(sum_DN: Tensor, target_D1: Tensor) -> Tensor:
    """The first place where the running sum exceeds the target: one that weighs something."""
    # The last such place, when rounding has put the target at the very end.
    last_D1 = torch.searchsorted(sum_DN, sum_DN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(sum_DN, target_D1, right=True), last_D1)


def _by_block(x_RV: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    whole = x_RV.shape[-1] // _BLOCK
    reduced_RB = reduce(x_RV[:, : whole * _BLOCK].view(len(x_RV), whole, _BLOCK))
    if x_RV.shape[-1] % _BLOCK:
        last_R1 = reduce(x_RV[:, None, whole * _BLOCK :])
        reduced_RB = torch.cat([reduced_RB, last_R1], dim=-1)
    return reduced_RB


def parts(rows: Sequence[int], vocabulary: int) -> Iterator[Sequence[int]]:
    """Rows in order, as many at a time as fit the memory that a pass over them may take."""
    size = max(1, _PART // vocabulary)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def some_rows(x_RV: Tensor, rows: Sequence[int]) -> Tensor:
    """These ascending rows; without a copy where none is left out between them."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return x_RV[rows[0] : rows[-1] + 1]
    return x_RV[torch.tensor(rows, device=x_RV.device)]
