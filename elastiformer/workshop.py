"""All that the sparse form uses of one model, under one roof: products, norms, routers, repairs.

What is laid out anew for speed is made here once, when a step first needs it; the base's own
weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from elastiformer import kernels
from elastiformer.accounting import KVPolicy
from elastiformer.adapter import Adapter
from elastiformer.allowances import Allowances
from elastiformer.attention import Backend, Portable, backend
from elastiformer.both_ways import BothWays
from elastiformer.capacity import Site, Unit
from elastiformer.costs import ROWS, CostTable, compare
from elastiformer.device_allowances import AmongOthers, DeviceAllowances
from elastiformer.expert_table import ExpertTable
from elastiformer.families import Layer, Layout, Projection
from elastiformer.mending import Mending
from elastiformer.originals import Originals
from elastiformer.packed import Packed, Rows
from elastiformer.pointwise import Gate, Norm, lean_gate, lean_norm, working_dtype
from elastiformer.products import Product
from elastiformer.readings import Reading, Values, pick, reading_of
from elastiformer.routers import PartGate, Router
from elastiformer.thresholds import ladders

_WHOLE = 8  # so many times as many rows that pick nothing: those that do are treated by themselves
SITES = tuple(Site)
_PLACE = {site: place for place, site in enumerate(SITES)}


class Closes(NamedTuple):
    """The norms over the residual after a layer's two sub-layers, where a family has them."""

    attention: Norm | None
    mlp: Norm | None


class Workshop:
    """One model's tools. What is asked for in every layer of every step is made once."""

    def __init__(
        self, layout: Layout, adapter: Adapter | None, originals: Originals | None = None
    ) -> None:
        self.layout, self.adapter, self._originals = layout, adapter, originals
        weight = layout.layers[0].out.weight_OI
        self.device, self.dtype = weight.device, weight.dtype
        # Between products a CPU works in float32: it is no slower there, and rounds less.
        self.working_dtype = working_dtype(self.device, self.dtype)
        of_both_ways = (self.device, self.dtype, layout.layers[0].shape.head_dim)
        self.backend: Backend = (
            backend(self.device, self.dtype) if layout.causal else BothWays(*of_both_ways)
        )
        # Whether products of few rows on a device need no numbers of what they pick.
        self.marks_picks = False
        self.portable: Portable | BothWays = (
            Portable() if layout.causal else BothWays(*of_both_ways)
        )
        self.attention_norms = [lean_norm(layer.attention_norm) for layer in layout.layers]
        self.mlp_norms = [lean_norm(layer.mlp_norm) for layer in layout.layers]
        self.closes = [
            Closes(_norm(layer.attention_close), _norm(layer.mlp_close)) for layer in layout.layers
        ]
        self.gates: list[Gate | None] = [
            None if layer.gate is None else lean_gate(layer) for layer in layout.layers
        ]
        self.query_norms = [_optional(layer.query_norm) for layer in layout.layers]
        self.key_norms = [_optional(layer.key_norm) for layer in layout.layers]
        self.final_norm: Norm = lean_norm(layout.final_norm)
        self.head: Product | None = None
        if layout.head is not None:
            outputs = len(layout.head.weight)  # type: ignore[arg-type]
            head = Projection("head", layout.head, "", 0, outputs)
            self.head = Product((head,), originals)
        self._products: dict[tuple[Projection, ...], Product] = {}
        self._experts: dict[int, ExpertTable] = {}
        self.mending = Mending(adapter, self.working_dtype)

    def product(self, *projections: Projection) -> Product:
        """The product with these projections, which read the same input."""
        if projections not in self._products:
            self._products[projections] = Product(projections, self._originals)
        return self._products[projections]

    def at_site(self, layer: Layer, site: Site) -> Product:
        return self.product(*layer.at_site(site))

    def read(
        self,
        layer: Layer,
        site: Site,
        values: Values,
        packed: Packed,
        rows: Rows,
        *projections: Projection,
    ) -> Reading:
        """What products at `site` read of these rows; a few that pick are treated by themselves.

        Args:
            projections: those of the product, if not all of the site's.
        """
        product = self.product(*projections or layer.at_site(site))
        picking = packed.picking.within(rows)
        whole = rows.count - picking.count
        if whole < _WHOLE * picking.count or rows.count <= product.few.rows(1.0):
            x_RI = values.whole(values.dtype)
            return self.picked(layer, site, x_RI, packed, rows, values.own)
        # What a product would round comes rounded.
        rounds = values.dtype == self.working_dtype and product.takes_rounded(rows.count)
        dtype = self.dtype if rounds else values.dtype
        x_RI = values.whole(dtype)
        if not picking.count:
            return Reading(x_RI)
        few = picking.among(rows)
        reading = self.picked(layer, site, values.of(few), packed, picking, values.own)
        if reading.count is None:
            return Reading(x_RI)
        if not values.own and dtype == values.dtype:
            x_RI = x_RI.clone()
        few.put(x_RI, reading.only_RI.to(dtype))
        return Reading(x_RI, reading.count + whole * product.inputs, is_picked=True)

    def picked(
        self,
        layer: Layer,
        site: Site,
        x_RI: Tensor,
        packed: Packed,
        rows: Rows,
        own: bool = False,
    ) -> Reading:
        """What products at `site` read of rows, each of which may pick.

        Args:
            own: whether `x` may be changed.
        """
        if not packed.picks:
            return Reading(x_RI)
        place, norms_I = _PLACE[site], self.layout.column_norms(layer, site)
        granted = packed.channels(layer.index, place, rows)
        is_whole = isinstance(granted, int) and granted >= len(norms_I)
        if packed.allowances is None or is_whole:
            return pick(x_RI, norms_I, granted, own)
        if isinstance(packed.allowances, DeviceAllowances):
            asked = (layer.index, place, rows.rows_R)
            kept_RI = packed.allowances.take(*asked, x_RI, norms_I)
            count = packed.allowances.granted(*asked, len(norms_I))
            return Reading(x_RI, count, kept_RI=kept_RI, is_even=False)
        on_host = (x_RI.float().cpu().numpy(), norms_I.cpu().numpy())
        start_S, least_R = packed.allowances.take(layer.index, place, rows.rows_R, *on_host)
        return reading_of(x_RI, norms_I, start_S, least_R, own)

    def allowances(self, packed: Packed) -> Allowances | DeviceAllowances | None:
        """What the rows of a step take of their channels; None: what they are granted."""
        if self.ladder_LTG is None or not packed.picks or not packed.takes_N.any():
            return None
        owners = [chunk.sequence for chunk in packed.chunks]
        if self.takes_on_device and packed.count == len(owners) > self._rows_that_number:
            return DeviceAllowances(
                owners,
                packed.takes_N,
                packed.channels_LTK,
                packed.kind_N,
                self.ladder_on_device_LTG,
                self._outputs_LT,
            )
        owner_N = np.where(packed.takes_N, packed.chunk_N, -1)
        return Allowances(
            owners,
            owner_N,
            packed.channels_LTK,
            packed.kind_N,
            self.ladder_LTG,
            self._outputs_LT,
        )

    def allowances_among(self, packed: Packed, rows_J: np.ndarray) -> AmongOthers:
        """The same of a step on a device in which these rows take by thresholds."""
        chunks_Q, first_Q = np.unique(packed.chunk_N[rows_J], return_index=True)
        return AmongOthers(
            rows_J[first_Q],
            packed.count,
            [packed.chunks[chunk].sequence for chunk in chunks_Q.tolist()],
            packed.channels_LTK,
            packed.kind_N[rows_J[first_Q]],
            self.ladder_on_device_LTG,
            self._outputs_LT,
        )

    @cached_property
    def ladder_LTG(self) -> np.ndarray | None:
        """The thresholds of every layer and site; None: every token takes what it is granted."""
        calibration = self.adapter.calibration if self.adapter is not None else None
        # An encoder's tokens have no order in which debts could be paid.
        if calibration is None or not self.layout.causal:
            return None
        return ladders(calibration.channel_quantiles)

    @cached_property
    def ladder_on_device_LTG(self) -> Tensor:
        assert self.ladder_LTG is not None, "rows that take by no thresholds"
        return torch.from_numpy(self.ladder_LTG).to(self.device)

    @property
    def _rows_that_number(self) -> int:
        """Up to so many rows the products read picked weights alone; the host numbers the picks."""
        if self.marks_picks:
            return 0
        return max(self.at_site(self.layout.layers[-1], site).few.most[0] for site in SITES)

    @property
    def takes_on_device(self) -> bool:
        """Whether thresholds are compared where the rows are, and nobody waits for the counts."""
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        return self.device.type != "cpu" and not counted

    @cached_property
    def _outputs_LT(self) -> np.ndarray:
        return np.array(
            [
                [sum(len(each.weight_OI) for each in layer.at_site(site)) for site in SITES]
                for layer in self.layout.layers
            ]
        )

    def experts(self, layer: Layer) -> ExpertTable:
        assert self.adapter is not None, "experts without an adapter"
        if layer.index not in self._experts:
            self._experts[layer.index] = ExpertTable.of(layer, self.adapter)
        return self._experts[layer.index]

    def router(self, layer: Layer, unit: Unit) -> Router:
        router = self.adapter.router(layer.index, unit) if self.adapter is not None else None
        assert router is not None, f"a plan that routes {unit} without its routers"
        return router

    @property
    def kv(self) -> KVPolicy:
        return self.adapter.kv if self.adapter is not None else "complete"

    @property
    def part_gate(self) -> PartGate:
        assert self.adapter is not None, "gates without an adapter"
        return self.adapter.spec.part_gate

    def _finish(self) -> None:
        """Wait until the device has done all that it was told: else launches are timed."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @property
    def bytes_per_weight(self) -> float:
        """On average over the layers' products, as they are stored for few rows."""
        products = [self.at_site(layer, site) for layer in self.layout.layers for site in SITES]
        weights = sum(product.inputs * product.outputs for product in products)
        return sum(product.stored_bytes for product in products) / weights

    @torch.inference_mode()
    def measure(self, seconds: float) -> CostTable:
        """Measure up to how many rows a product goes row by row, for every site's shape."""
        layers, few = self.layout.layers, {}
        for site in SITES:
            pairs = [(self.at_site(x, site), self.layout.column_norms(x, site)) for x in layers]
            for product, _ in pairs:
                product.prepare()
            # One layer after another, as in a step: a weight must not lie in the cache already.
            turns = cycle(pairs)
            first = pairs[0][0]
            sample_RI = torch.randn(
                ROWS[-1], first.inputs, device=self.device, dtype=self.working_dtype
            )

            def run(
                by_row: bool,
                share: float,
                rows: int,
                turns: Iterator[tuple[Product, Tensor]] = turns,
                sample_RI: Tensor = sample_RI,
            ) -> None:
                product, norms_I = next(turns)
                count = round(share * product.inputs)
                reading = pick(sample_RI[:rows].clone(), norms_I, count, own=True)
                _ = product.by_row(reading) if by_row else product.at_once(reading)

            each = seconds / len(SITES)
            alike = first.pairs  # several rows go through all inputs
            ways = partial(run, True), partial(run, False)
            few_rows = compare(*ways, each, alike, self._finish)
            few[first.inputs, first.outputs] = few_rows
            for product, _ in pairs:
                product.few = few_rows
        has_tiles = self.at_site(layers[0], Site.MLP_OUT).has_tiles
        return CostTable(few, kernels.thread_pool() if has_tiles else None)


def _norm(module: nn.Module | None) -> Norm | None:
    return None if module is None else lean_norm(module)


def _optional(module: nn.Module | None) -> Norm:
    return lean_norm(module) if module is not None else nn.Identity()
