"""The matrix products of the sparse form: over all channels, or over those that each row picks.

Picked are, per token, the channels of the largest size x column norm. For a single row that reads
only those columns of the weight: in PyTorch an `embedding_bag` over the transposed weight. From
some number of rows on it is faster to read the whole weight once, for rows that are zero outside
their picks; where that is, costs.py measures. On a CPU the dense product is oneDNN's over a weight
packed once: it reads memory twice as fast for few rows as `F.linear`, and what a row gets does not
depend on how many rows there are. In float32 both ways add the same numbers in the same order, so
batch-mates change nothing, to the last bit.

Shape letters: R rows   I inputs   O outputs   T tiles   B blocks   K picked channels
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.costs import FewRows
from elastiformer.families import Projection

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_SUMMED_INPUTS = 1024  # oneDNN sums so many inputs in one go, then the next ones, and adds


class Reading:
    """What products read of some rows: all of `x`, or each row's picked channels."""

    def __init__(
        self,
        x_RI: Tensor,
        picks: int | None = None,
        kept_RI: Tensor | None = None,
        kept_on_host_RI: np.ndarray | None = None,
        only_RI: Tensor | None = None,
    ) -> None:
        """Of `picks` channels over all rows, and of a mask of them, on a CPU in NumPy's form.

        Where some rows pick and others do not there is no mask, but `only_RI`.
        """
        self.x_RI, self.picks = x_RI, picks
        self._kept_RI, self._on_host_RI = kept_RI, kept_on_host_RI
        self.mixed = only_RI is not None
        if only_RI is not None:
            self.__dict__["only_RI"] = only_RI

    @property
    def share(self) -> float:
        return 1.0 if self.picks is None else self.picks / self.x_RI.numel()

    @cached_property
    def only_RI(self) -> Tensor:
        """`x`, zero but for the picked channels."""
        if self.picks is None:
            return self.x_RI
        if self._on_host_RI is not None:
            return torch.from_numpy(self.x_RI.numpy() * self._on_host_RI)
        assert self._kept_RI is not None
        return self.x_RI * self._kept_RI

    def index_RK(self) -> Tensor:
        """The picked channels, of rows that all pick as many."""
        assert self.picks is not None, "nothing was picked"
        (index,) = torch.nonzero(self.kept_RI.flatten(), as_tuple=True)
        return index.remainder(self.x_RI.shape[1]).view(len(self.x_RI), -1)

    @property
    def kept_RI(self) -> Tensor:
        """True where a channel is picked."""
        if self._kept_RI is None:
            assert self._on_host_RI is not None, "nothing was picked"
            return torch.from_numpy(self._on_host_RI)
        return self._kept_RI

    def on_host(self, row: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The indices and values of one row's picks, where they are on the host already."""
        if self._on_host_RI is None:
            return None
        index_K = self._on_host_RI[row].nonzero()[0]
        return index_K, self.x_RI.numpy()[row][index_K]


def pick(x_RI: Tensor, norms_I: Tensor, counts: int | np.ndarray) -> Reading:
    """Each row's channels of the largest size x column norm.

    Args:
        counts: how many, the same for every row or one for each [R].
    """
    rows, inputs = x_RI.shape
    if isinstance(counts, int):
        if counts >= inputs:
            return Reading(x_RI)
        picks = rows * counts
    else:
        counts_R = np.minimum(counts, inputs)
        picks = int(counts_R.sum())
        choosy_S = np.flatnonzero(counts_R < inputs)
        if len(choosy_S) == 0:
            return Reading(x_RI)
        if len(choosy_S) < rows:
            at_S = torch.from_numpy(choosy_S).to(x_RI.device)
            only_RI = x_RI.clone()
            only_RI[at_S] = pick(x_RI[at_S], norms_I, counts_R[choosy_S]).only_RI
            return Reading(x_RI, picks, only_RI=only_RI)
        counts = counts_R
    if x_RI.device.type == "cpu" and x_RI.dtype == torch.float32:
        # NumPy partitions and sorts with the processor's vectors: much faster than PyTorch here.
        weighed_RI = np.abs(x_RI.numpy())
        weighed_RI *= norms_I.numpy()
        kept_on_host_RI = _largest(weighed_RI, counts, picks)
        return Reading(x_RI, picks, kept_on_host_RI=kept_on_host_RI)
    order_RI = (x_RI.abs().float() * norms_I).argsort(dim=1, descending=True)
    rank_I = torch.arange(inputs, device=x_RI.device)
    if isinstance(counts, int):
        best_RI = (rank_I < counts).expand(rows, -1)
    else:
        best_RI = rank_I < torch.from_numpy(counts).to(x_RI.device)[:, None]
    kept_RI = torch.zeros_like(order_RI, dtype=torch.bool).scatter_(1, order_RI, best_RI)
    return Reading(x_RI, picks, kept_RI)


def _largest(weighed_RI: np.ndarray, counts: int | np.ndarray, picks: int) -> np.ndarray:
    inputs = weighed_RI.shape[1]
    if isinstance(counts, int):
        at = inputs - counts
        least_R1 = np.partition(weighed_RI, at, axis=1)[:, at : at + 1]
    else:
        at_R = np.minimum(inputs - counts, inputs - 1)
        least_R1 = np.take_along_axis(np.sort(weighed_RI, axis=1), at_R[:, None], axis=1)
    kept_RI: np.ndarray = weighed_RI >= least_R1
    if np.count_nonzero(kept_RI) != picks:  # ties: zeros, mostly
        of_R = np.broadcast_to(counts, len(kept_RI))
        for row in np.flatnonzero(kept_RI.sum(axis=1) != of_R):
            kept_RI[row] = False
            kept_RI[row, np.argsort(-weighed_RI[row], kind="stable")[: of_R[row]]] = True
    return kept_RI


def _packed_linear(x_RI: Tensor, packed: Tensor, picks: int | None = None) -> Tensor:
    # oneDNN ignores the scalars of "none"; there the FLOP formula finds the picks among zeros.
    scalars = [] if picks is None else [picks]
    out_RO: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x_RI, packed, None, "none", scalars, ""
    )
    return out_RO


def _picked_linear(x_RI: Tensor, weight_OI: Tensor, picks: int) -> Tensor:
    return F.linear(x_RI, weight_OI)


# An operator of its own, so that PyTorch's counter sees the picks and not the zeros.
_LIBRARY: Any = torch.library.Library("elasti", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("picked_linear(Tensor x, Tensor weight, int picks) -> Tensor")
_LIBRARY.impl("picked_linear", _picked_linear, "CompositeExplicitAutograd")


class Product:
    """The product with all projections that read the same input, their outputs side by side."""

    def __init__(self, projections: tuple[Projection, ...]) -> None:
        self.projections = projections
        self.inputs = projections[0].weight_OI.shape[1]
        sizes = [len(projection.weight_OI) for projection in projections]
        self.outputs = sum(sizes)
        self.parts = [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
        biases = [projection.bias_O for projection in projections]
        self._bias_O = (
            None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        )
        self.few = FewRows()

    def run(self, reading: Reading) -> Tensor:
        """The outputs [R, O]."""
        if reading.picks is None:
            return self.dense(reading.x_RI)
        if not reading.mixed and len(reading.x_RI) <= self.few.rows(reading.share):
            return self.picked(reading)
        return self.over_zeros(reading)

    def dense(self, x_RI: Tensor) -> Tensor:
        """The product over all channels."""
        if self._packed is None:
            return F.linear(x_RI, self._weight_OI, self._bias_O)
        return self._biased(_packed_linear(x_RI, self._packed))

    def over_zeros(self, reading: Reading) -> Tensor:
        """The product over the picked channels, by way of a dense one over zeros elsewhere."""
        assert reading.picks is not None, "nothing was picked"
        if self._packed is None:
            x_RI, weight_OI = reading.only_RI, self._weight_OI
            return self._biased(torch.ops.elasti.picked_linear(x_RI, weight_OI, reading.picks))
        return self._biased(_packed_linear(reading.only_RI, self._packed, reading.picks))

    def picked(self, reading: Reading) -> Tensor:
        """The product row by row, each over its picked channels alone."""
        outs = [self._picked(reading, row) for row in range(len(reading.x_RI))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def prepare(self, picking: bool = False) -> None:
        """Lay the weight out now, rather than when a request first needs it."""
        _ = self._packed if self._packs else self._weight_OI
        if picking:
            _ = self._tiles

    @cached_property
    def _packs(self) -> bool:
        weight_OI = self.projections[0].weight_OI
        if weight_OI.device.type != "cpu" or not _HAS_ONEDNN:
            return False
        if weight_OI.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight_OI.dtype == torch.float32

    @cached_property
    def _weight_OI(self) -> Tensor:
        weights = [projection.weight_OI.detach() for projection in self.projections]
        if len(weights) == 1:
            return weights[0]
        if _side_by_side(self.projections):
            module = self.projections[0].module.weight.detach()  # type: ignore[operator]
            whole: Tensor = module if len(module) == self.outputs else torch.cat(weights)
            return whole
        return torch.cat(weights)

    @cached_property
    def _packed(self) -> Tensor | None:
        if not self._packs:
            return None
        weight_OI = torch.cat([p.weight_OI.detach() for p in self.projections])
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        return packed

    @cached_property
    def _tiles(self) -> Tensor:
        """The transposed weight, in a tile of outputs for each thread: [T x I, O / T]."""
        weight_IO = torch.cat([p.weight_OI.detach() for p in self.projections]).T
        tiles = torch.get_num_threads() if weight_IO.device.type == "cpu" else 1
        if self.outputs % tiles:
            tiles = 1
        tiled = weight_IO.reshape(self.inputs, tiles, -1).transpose(0, 1)
        return tiled.reshape(tiles * self.inputs, -1).contiguous()

    def _picked(self, reading: Reading, row: int) -> Tensor:
        """One row's product over its picked channels; it reads no other column of the weight."""
        if (on_host := reading.on_host(row)) is not None:
            return self._picked_on_host(*on_host)
        x_I, index_K = reading.x_RI[row], reading.kept_RI[row].nonzero()[:, 0]
        tiles = len(self._tiles) // self.inputs
        starts_T1 = self.inputs * torch.arange(tiles, device=x_I.device)[:, None]
        value_TK = x_I[index_K].expand(tiles, -1).contiguous()
        out_TO = F.embedding_bag(
            starts_T1 + index_K, self._tiles, mode="sum", per_sample_weights=value_TK
        )
        return self._biased(out_TO.reshape(1, -1))

    def _picked_on_host(self, index_K: np.ndarray, value_K: np.ndarray) -> Tensor:
        tiles_W, count = self._tiles, len(index_K)
        tiles = tiles_W.shape[0] // self.inputs
        if tiles > 1:
            index_K = np.concatenate([index_K + self.inputs * tile for tile in range(tiles)])
            value_K = np.concatenate([value_K] * tiles)
        if self.inputs <= _SUMMED_INPUTS:
            return self._biased(
                self._bags(index_K, value_K, _offsets(count, tiles)).view(1, self.outputs)
            )
        # Block after block, as oneDNN adds.
        bounds_B = np.arange(0, self.inputs, _SUMMED_INPUTS)
        firsts_B = np.searchsorted(index_K[:count], bounds_B)
        offsets = (count * np.arange(tiles)[:, None] + firsts_B).reshape(-1)
        sums = self._bags(index_K, value_K, torch.from_numpy(offsets))
        sums_TBW = sums.view(tiles, len(bounds_B), -1)
        out_TW = sums_TBW[:, 0]
        for block in range(1, len(bounds_B)):
            out_TW = out_TW + sums_TBW[:, block]
        return self._biased(out_TW.reshape(1, self.outputs))

    def _bags(self, index: np.ndarray, value: np.ndarray, offsets: Tensor) -> Tensor:
        values = torch.from_numpy(value)
        summed: Tensor = torch.embedding_bag(
            self._tiles, torch.from_numpy(index), offsets, False, 0, False, values
        )[0]
        return summed

    def _biased(self, out_RO: Tensor) -> Tensor:
        return out_RO if self._bias_O is None else out_RO + self._bias_O


@lru_cache(maxsize=65536)
def _offsets(count: int, tiles: int) -> Tensor:
    return torch.arange(0, count * tiles, count)


def _side_by_side(projections: tuple[Projection, ...]) -> bool:
    """Whether they are neighbours in one fused module."""
    one = all(p.module is projections[0].module for p in projections)
    return one and all(a.stop == b.start for a, b in pairwise(projections))
