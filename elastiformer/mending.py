"""Products of a step's rows, each row with the repair of its kind.

On a CPU the repair of keys and values is folded into a copy of their weights, as most rows of a
prompt have it: low-rank pairs beside the product cost few FLOPs and, in small operators, more time
than the product itself. Elsewhere pairs are added, and so they are where somebody counts operators.

Shape letters: R rows   O outputs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elastiformer.adapter import Adapter
from elastiformer.families import Layer, Projection
from elastiformer.lora import LoraPair
from elastiformer.packed import Packed, Rows
from elastiformer.products import Product
from elastiformer.readings import Reading
from elastiformer.repair import Folded, Joined, Repair
from elastiformer.sequence import Kind

_FOLDED = {"key", "value"}  # of other projections a copy would be as much memory again
_NEARLY = 0.9  # of the rows: then to multiply all of them is less work than to gather those


class _Form(NamedTuple):
    """A repair as a product takes it, and of which state of its pairs it was made."""

    version: int
    joined: Joined | None
    folded: Folded | None


class Mending:
    """The repairs of one model."""

    def __init__(self, adapter: Adapter | None, working_dtype: torch.dtype) -> None:
        self._lora = adapter.lora if adapter is not None else None
        self._working_dtype = working_dtype
        self._pairs: dict[tuple[int, str], dict[str, LoraPair]] = {}
        self._forms: dict[tuple[object, ...], _Form] = {}

    def prepare(self, layer: Layer, product: Product) -> None:
        """Fold what can be folded now, rather than when a request first needs it.

        Args:
            product: the layer's with keys and values alone.
        """
        for name in self.names:
            folded = self._form(layer, name, product, self._working_dtype).folded
            if folded is not None:
                product.pack()
                folded.pack()

    def name(self, layer: Layer, kind: Kind) -> str | None:
        """The set of low-rank pairs that rows of this kind use in a layer; none while exact."""
        if self._lora is None or layer.index < kind.plan.repaired_from:
            return None
        return self._lora.set_name(kind.phase)

    def repair(self, layer: Layer, name: str | None) -> Repair:
        return Repair({} if name is None else self._pairs_in(layer, name))

    def run(
        self, layer: Layer, product: Product, reading: Reading, packed: Packed, rows: Rows
    ) -> Tensor:
        """The product of some rows, each with the repair of its kind."""
        some = [(name, of_name.within(rows)) for name, of_name in self._repaired(layer, packed)]
        some = [(name, of_name) for name, of_name in some if of_name.count]
        if some and _may_fold(product):
            folded = [
                (self._form(layer, name, product, self._working_dtype).folded, of_name)
                for name, of_name in some
            ]
            return _by_group(product, folded, reading, rows)
        out_RO = product.run(reading)
        for name, of_name in some:
            joined = self._form(layer, name, product, out_RO.dtype).joined
            if joined is not None:
                joined.mend(reading, out_RO, of_name.among(rows))
        return out_RO

    def rounded(
        self, layer: Layer, product: Product, reading: Reading, packed: Packed
    ) -> Tensor | None:
        """What `run` gives, in bfloat16, where it comes so; None elsewhere."""
        return None if self.is_repaired(layer, product, packed) else product.rounded(reading)

    def joined(self, layer: Layer, name: str, product: Product) -> Joined | None:
        """All pairs of a product in a set of them; None: it has none."""
        return self._form(layer, name, product, self._working_dtype).joined

    def is_repaired(self, layer: Layer, product: Product, packed: Packed) -> bool:
        """Whether any row of a step has this product repaired."""
        return any(
            self._form(layer, name, product, self._working_dtype).joined is not None
            for name, _ in self._repaired(layer, packed)
        )

    def folds_keys(self, layer: Layer, product: Product, packed: Packed) -> bool:
        """Whether keys and values of a step come from folded weights.

        Then queries are best asked for by themselves.

        Args:
            product: the layer's with keys and values alone.
        """
        apart = layer.query.path not in {each.path for each in product.projections}
        return apart and _may_fold(product) and self.is_repaired(layer, product, packed)

    def of_keys(self, layer: Layer, packed: Packed) -> list[tuple[str, Rows]]:
        """The rows of a step whose keys and values are repaired, by the set of their pairs."""
        if self._lora is None:
            return []
        return [
            (name, rows)
            for name, rows in self._repaired(layer, packed)
            if self.repairs_keys(layer, name)
        ]

    def version(self, layer: Layer, name: str | None) -> int:
        """Which state of its pairs a repair is in: who trains them changes them in place."""
        pairs = {} if name is None else self._pairs_in(layer, name)
        return sum(pair.a_RI._version + pair.b_OR._version for pair in pairs.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all sets of pairs."""
        return () if self._lora is None else tuple(self._lora.sets)

    def repairs_keys(self, layer: Layer, name: str) -> bool:
        """Whether a set of pairs has some for a layer's keys or values."""
        return bool({layer.key.path, layer.value.path} & self._pairs_in(layer, name).keys())

    def folded(
        self, layer: Layer, part: Projection, name: str | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The weight of a projection with a repair in it: [O, I].

        Args:
            name: the set of pairs; None: none.
            dtype: None: the weight's own.
        """
        weight_OI = part.weight_OI.detach()
        dtype = dtype or weight_OI.dtype
        pair = None if name is None else self._pairs_in(layer, name).get(part.path)
        if pair is None:
            return weight_OI.to(dtype)
        b_OR = pair.scale * pair.b_OR[part.start : part.stop].detach().float()
        return (weight_OI.float() + b_OR @ pair.a_RI.detach().float()).to(dtype)

    def _repaired(self, layer: Layer, packed: Packed) -> list[tuple[str, Rows]]:
        """The rows of a step that are repaired in a layer, by the set of their pairs."""
        if layer.index not in packed.repaired:
            groups = packed.groups(lambda kind: self.name(layer, kind))
            packed.repaired[layer.index] = [
                (name, rows) for name, rows in groups if name is not None
            ]
        return packed.repaired[layer.index]

    def _pairs_in(self, layer: Layer, name: str) -> dict[str, LoraPair]:
        if self._lora is None:
            return {}
        key = (layer.index, name)
        if key not in self._pairs:
            self._pairs[key] = self._lora.set_of(*key)
        return self._pairs[key]

    def _form(self, layer: Layer, name: str, product: Product, dtype: torch.dtype) -> _Form:
        pairs = self._pairs_in(layer, name)
        key = (layer.index, name, product.projections, dtype)
        version = self.version(layer, name)
        if key not in self._forms or self._forms[key].version != version:
            joined = Joined.of(product, pairs, dtype)
            # Whether somebody counts operators now says nothing of the next time.
            exact = Joined.of(product, pairs, torch.float32) if _is_foldable(product) else None
            folded = None if exact is None else Folded(product, exact)
            self._forms[key] = _Form(version, joined, folded)
        return self._forms[key]


def _may_fold(product: Product) -> bool:
    counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
    return not counted and _is_foldable(product)


def _is_foldable(product: Product) -> bool:
    parts = {projection.part for projection in product.projections}
    return product.has_tiles and parts <= _FOLDED


def _by_group(
    product: Product, folded: list[tuple[Folded | None, Rows]], reading: Reading, rows: Rows
) -> Tensor:
    """Each group's folded product, and of all other rows the plain one."""
    groups: list[tuple[Product, Rows]] = [(each, some) for each, some in folded if each is not None]
    rest = rows
    for _, some in groups:
        rest = rest.without(some)
    if rest.count:
        groups.append((product, rest))
    groups.sort(key=lambda group: group[1].count)
    most, of_most = groups.pop()
    if len(groups) == 0:
        return most.run(reading)
    if of_most.count > _NEARLY * rows.count:
        out_RO = most.run(Reading(reading.only_RI))  # the few others' are put over it
    else:
        groups.append((most, of_most))
        out_RO = None
    for each, some in groups:
        place = some.among(rows)
        part_RO = each.run(Reading(place.of(reading.only_RI)))
        if out_RO is None:
            out_RO = part_RO.new_empty(rows.count, product.outputs)
        place.put(out_RO, part_RO)
    assert out_RO is not None, "no rows"
    return out_RO
