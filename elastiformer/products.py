"""The matrix products of the sparse form: over all channels, or over those that each row picks.

Of few rows, only the weights of picked channels (readings.py) are read: on a CPU by a kernel, of
the weight's smallest exact form (tiles.py), elsewhere by PyTorch's `embedding_bag`. For many rows
it is faster to read a whole weight once, packed for oneDNN on a CPU, for rows that are zero outside
their picks; where that is, costs.py measures. In float32 on a CPU both add the same numbers in the
same order, so neither batch-mates nor the choice change anything, to the last bit. In bfloat16,
where the processor can, several rows go through all inputs of the smallest form, zeros where they
left some out (pairs.py).

Shape letters: R rows   I inputs   O outputs   K picked channels
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from elastiformer.costs import SINGLE_ROWS, FewRows
from elastiformer.families import Projection
from elastiformer.lanes import ahead_of
from elastiformer.originals import Originals
from elastiformer.readings import Reading
from elastiformer.spare_rows import widened
from elastiformer.sub_layers import Weight
from elastiformer.tiles import Picks, Tiles, everything

# Processors differ in it: 512 or 1024 by the width of registers and the number of inputs.
_SUMS = (1024, 512)
_SUMMED: dict[int, int] = {}  # by inputs, as found in this process
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def picked(weight_IO: Tensor, bias_O: Tensor | None, x_RI: Tensor, index_RK: Tensor) -> Tensor:
    """The product over each row's picked channels; it reads no other rows of the weight."""
    value_RK = x_RI.gather(1, index_RK)
    out_RO = F.embedding_bag(index_RK, weight_IO, mode="sum", per_sample_weights=value_RK)
    return out_RO if bias_O is None else out_RO + bias_O


class Product:
    """The product with all projections that read the same input, their outputs side by side."""

    def __init__(
        self, projections: tuple[Projection, ...], originals: Originals | None = None
    ) -> None:
        self.projections, self._originals = projections, originals
        first_OI = projections[0].weight_OI
        self.inputs, self._dtype = first_OI.shape[1], first_OI.dtype
        sizes = [len(projection.weight_OI) for projection in projections]
        self.outputs = sum(sizes)
        self.parts = [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
        biases = [projection.bias_O for projection in projections]
        self._bias_O = (
            None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        )
        if self._bias_O is not None and self.has_tiles:
            self._bias_O = self._bias_O.float()
        self.few = FewRows() if self.has_tiles else SINGLE_ROWS

    def run(self, reading: Reading) -> Tensor:
        """The outputs [R, O]."""
        return self.by_row(reading) if self._goes_by_row(reading) else self.at_once(reading)

    def _goes_by_row(self, reading: Reading) -> bool:
        if self.has_tiles and reading.x_RI.dtype != torch.float32:
            return False  # the kernels read float32
        return reading.has_picks and len(reading.x_RI) <= self.few.rows(reading.share)

    def rounded(self, reading: Reading) -> Tensor | None:
        """What `run` gives, in bfloat16, where it comes so; None elsewhere."""
        if self._bias_O is not None or not self._multiplies_rounded or self._goes_by_row(reading):
            return None
        assert self._packed is not None, "a product that oneDNN knows"
        return _packed_linear(reading.rounded(self._dtype), self._packed, reading.count)

    def takes_rounded(self, rows: int) -> bool:
        """Whether so many whole rows may come in bfloat16: it would round them to that."""
        return self._multiplies_rounded and rows > self.few.rows(1.0)

    @property
    def _multiplies_rounded(self) -> bool:
        return self._packs and self._dtype == torch.bfloat16

    def dense(self, x_RI: Tensor) -> Tensor:
        """The product over all channels."""
        return self.run(Reading(x_RI))

    def whole(self, x_RI: Tensor) -> Tensor:
        """The product over all channels of a device, where its weight lies input by input."""
        if self._bias_O is None:
            return torch.mm(x_RI, self.weight_IO)
        return torch.addmm(self._bias_O, x_RI, self.weight_IO)

    def by_row(self, reading: Reading) -> Tensor:
        """The product over each row's channels and no others."""
        if not self.has_tiles:
            if reading.count is None:
                return self.at_once(reading)
            return picked(self.weight_IO, self._bias_O, reading.x_RI, reading.index_RK())
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        if self.pairs and len(reading.x_RI) > 1 and not counted:
            out_RO = torch.from_numpy(self._tiles.multiply_pairs(*reading.unsearched))
        elif counted:
            out_RO = torch.ops.elasti.tiled_linear(
                [torch.from_numpy(array) for array in reading.picks],
                *(torch.from_numpy(array) for array in self._tiles.arrays),
                self.outputs,
                self._summed,
            )
        else:
            out_RO = torch.from_numpy(self._tiles.multiply(reading.picks, self._summed))
        return out_RO if self._bias_O is None else out_RO.add_(self._bias_O)

    def at_once(self, reading: Reading) -> Tensor:
        """The product over a whole weight, for rows that are zero outside their picks."""
        working, count = reading.x_RI.dtype, reading.count
        x_RI = reading.rounded(self._dtype)
        if self._packed is not None:
            # What is not widened again need not be copied: of many rows it is as it came.
            if working == self._dtype == torch.bfloat16 or self.takes_rounded(len(x_RI)):
                return _packed_linear(x_RI, self._packed, count, self._small_bias_O)
            out_RO = _packed_linear(x_RI, self._packed, count)
        elif count is None:
            bias_O = None if self._bias_O is None else self._bias_O.to(x_RI.dtype)
            return F.linear(x_RI, self._weight_OI, bias_O).to(working)
        else:
            out_RO = torch.ops.elasti.picked_linear(x_RI, self._weight_OI, count)
        out_RO = out_RO.to(working)
        return out_RO if self._bias_O is None else out_RO.add_(self._bias_O)

    def prepare(self) -> None:
        """Lay the weight out now, rather than when a request first needs it."""
        self.pack()
        if self.has_tiles:
            _ = self._tiles, self._summed

    def pack(self) -> None:
        """The same of the form that many rows read."""
        _ = self._packed if self._packs else self._weight_OI

    @property
    def likeness(self) -> Hashable:
        """Products of which this is equal can run in one call (`one_after_another`)."""
        forms = tuple((array.dtype.str, array.shape) for array in self._tiles.arrays)
        return forms, self.outputs, self._summed, self._bias_O is None, self.pairs

    @property
    def stored_bytes(self) -> int:
        """The weight in the form that few rows read."""
        if self.has_tiles:
            return self._tiles.bytes
        return self.inputs * self.outputs * self.projections[0].weight_OI.element_size()

    @cached_property
    def has_tiles(self) -> bool:
        weight_OI = self.projections[0].weight_OI
        return weight_OI.device.type == "cpu" and weight_OI.dtype != torch.float64

    @cached_property
    def pairs(self) -> bool:
        """Whether some rows are multiplied in bfloat16, two inputs at a time: a lone one is not,
        which waits for memory and reads only what it picks."""
        return self.has_tiles and self._dtype == torch.bfloat16 and self._tiles.takes_pairs

    @property
    def has_one_answer(self) -> bool:
        """Whether a row gets the same bits by itself as at once with others."""
        return self.has_tiles and self._dtype == torch.float32 and self._packs

    @cached_property
    def _packs(self) -> bool:
        weight_OI = self.projections[0].weight_OI
        if weight_OI.device.type != "cpu" or not _HAS_ONEDNN:
            return False
        if weight_OI.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight_OI.dtype == torch.float32

    @property
    def bias_O(self) -> Tensor | None:
        return self._bias_O

    @property
    def _weight_OI(self) -> Tensor:
        """Of the two ways that a weight can lie, the one that is there."""
        return self.weight_IO.T if "weight_IO" in self.__dict__ else self._as_it_lies_OI

    @cached_property
    def _as_it_lies_OI(self) -> Tensor:
        return self._joined()

    @cached_property
    def weight_IO(self) -> Tensor:
        """Input by input: what a product of few rows reads of it then lies side by side.

        From here on it is the base's own memory too, where its modules hold nothing else: a weight
        is in memory once.
        """
        with torch.inference_mode(False):  # who trains may need it
            weight_IO = self._joined().T.contiguous()
        self.__dict__.pop("_as_it_lies_OI", None)
        for projection, part in zip(self.projections, self.parts, strict=True):
            weight: Tensor = projection.module.weight  # type: ignore[assignment]
            if len(projection.weight_OI) == len(weight) and isinstance(
                projection.module, nn.Linear
            ):
                weight.data = weight_IO[:, part].T
        return weight_IO

    @cached_property
    def _packed(self) -> Tensor | None:
        if not self._packs:
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._joined().contiguous())
        return packed

    @cached_property
    def _small_bias_O(self) -> Tensor | None:
        return None if self._bias_O is None else self._bias_O.to(self._dtype)

    @cached_property
    def _tiles(self) -> Tiles:
        # What was rounded to bfloat16 may have had a form of fewer bytes before.
        original_OI = self._original()
        on_grid = None if original_OI is None else Tiles.on_grid(original_OI)
        return on_grid or Tiles.of(self._joined().float())

    def _original(self) -> Tensor | None:
        """The weights side by side as the base's files hold them, where those are finer."""
        if self._originals is None:
            return None
        parts = []
        for projection in self.projections:
            weight = self._originals.weight(projection.module)
            if weight is None:
                return None
            parts.append(projection.part_of(weight))
        return torch.cat(parts)

    @cached_property
    def _summed(self) -> int:
        """How many inputs oneDNN adds up in one go, so that both ways give the same bits."""
        if self.inputs <= min(_SUMS) or self._packed is None:
            return _SUMS[0]
        if self._packed.dtype != torch.float32:
            return _SUMS[0]  # the two ways round differently anyhow
        if self.inputs not in _SUMMED:
            x_RI = torch.randn(2, self.inputs, generator=torch.Generator().manual_seed(0))
            with _disable_current_modes():  # whoever counts operators did not ask for this one
                expected_RO = _packed_linear(x_RI, self._packed).numpy()
            picks = everything(x_RI.numpy())
            same = (
                summed
                for summed in _SUMS
                if np.array_equal(self._tiles.multiply(picks, summed), expected_RO)
            )
            _SUMMED[self.inputs] = next(same, _SUMS[0])
        return _SUMMED[self.inputs]

    def _joined(self) -> Tensor:
        """The weights side by side; the base's own memory where they stand so already."""
        weights = [projection.weight_OI.detach() for projection in self.projections]
        if len(weights) == 1:
            return weights[0]
        module = self.projections[0].module
        fused = all(projection.module is module for projection in self.projections)
        whole: Tensor = module.weight.detach()  # type: ignore[operator]
        return whole if fused and len(whole) == self.outputs else torch.cat(weights)


def one_after_another(site: int, products: Sequence[Product], norms_LI: np.ndarray) -> Weight:
    """Products that are alike, as kernels of whole layers take them.

    From here on their tiles lie in memory one after the other.

    Args:
        site: which of the four (workshop.SITES).
        norms_LI: those by which each picks channels.
    """
    of_all, each = Tiles.one_after_another([product._tiles for product in products])
    for product, tiles in zip(products, each, strict=True):
        product._tiles = tiles
    biases = [product._bias_O for product in products]
    bias_LO = np.empty((len(products), 0), dtype=np.float32)
    if biases[0] is not None:
        bias_LO = torch.stack([bias_O for bias_O in biases if bias_O is not None]).numpy()
    first = products[0]
    ahead = ahead_of(first._tiles.weight_SICW)
    weights, steps, lows = of_all
    return Weight(
        site,
        weights,
        steps,
        lows,
        bias_LO,
        norms_LI,
        first.outputs,
        first._summed,
        ahead,
        first.pairs,
    )


def _packed_linear(
    x_RI: Tensor, packed: Tensor, count: int | None = None, bias_O: Tensor | None = None
) -> Tensor:
    # oneDNN ignores the scalars of "none"; there the FLOP formula finds the picks among zeros.
    scalars = [] if count is None else [count]
    rows, x_RI = len(x_RI), widened(x_RI)
    if rows == 1 and not torch._C._len_torch_dispatch_stack():  # nobody counts operators
        x_RI = x_RI.expand(2, -1)  # a lone row may be summed in another order than one of many
    out_RO: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x_RI, packed, bias_O, "none", scalars, ""
    )
    return out_RO[:rows]


def _picked_linear(x_RI: Tensor, weight_OI: Tensor, count: int) -> Tensor:
    return F.linear(x_RI, weight_OI)


def _tiled_linear(
    picks: Sequence[Tensor],
    weight: Tensor,
    steps: Tensor,
    lows: Tensor,
    outputs: int,
    summed: int,
) -> Tensor:
    tiles = Tiles(outputs, weight.numpy(), steps.numpy(), lows.numpy())
    return torch.from_numpy(tiles.multiply(Picks(*(tensor.numpy() for tensor in picks)), summed))


# Operators of their own, so that PyTorch's counter sees the picks and not the zeros.
_LIBRARY: Any = torch.library.Library("elasti", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("picked_linear(Tensor x, Tensor weight, int count) -> Tensor")
_LIBRARY.impl("picked_linear", _picked_linear, "CompositeExplicitAutograd")
_LIBRARY.define(
    "tiled_linear(Tensor[] picks, Tensor weight, Tensor steps, Tensor lows, int outputs, "
    "int summed) -> Tensor"
)
_LIBRARY.impl("tiled_linear", _tiled_linear, "CompositeExplicitAutograd")
