"""Decode steps on a GPU: all layers are one launch, a graph of kernels that was captured before.

Layer by layer, launching takes far longer than running, and no FLOP that is left out saves time.
Captured for some numbers of rows, a step is as long as what it reads: rows are filled up to the
next number, and what a step is about (where keys lie, what is granted) goes over in one piece.

It stands in for SparseAttention and SparseMlp where decoding.py does, and takes the same channels;
steps that hold prompts are DevicePrompts', and whatever else a step holds is theirs.

Shape letters: N rows, filled up   D width   S parts of a sum   O outputs   L layers   T sites   R
    rotated part of a head   P rows of the pool
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer import device_attention as attention
from elastiformer import device_kernels as kernels
from elastiformer.capacity import Site
from elastiformer.decoding import MOST_ROWS, Decoding, Prompts
from elastiformer.device_allowances import DeviceAllowances
from elastiformer.device_kernels import GELU, SILU, TILES, At, Takes, Tile
from elastiformer.device_prompts import DevicePrompts
from elastiformer.families import Layer
from elastiformer.packed import Packed
from elastiformer.placing import Placing
from elastiformer.pointwise import RootMeanSquare, Rotation
from elastiformer.taken import Taken
from elastiformer.workshop import SITES, Workshop

ROWS = (1, 2, 4, 8, 16, 32, 64, MOST_ROWS)
SHARES = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
_LONGEST = 1 << 15  # channels of one site, which one program holds
_TIMED_LAYERS, _TIMED_TURNS = 8, 5


class Way(NamedTuple):
    """What a graph is captured for, beside its rows."""

    picks: bool  # whether some row takes channels by thresholds
    tiles: tuple[Tile | None, ...]  # by site, where a lone row's product reads only what it kept
    pool: int  # where its memory is


class DeviceDecoding(Decoding):
    """Runs the layers of one model for rows that each are their request's latest token."""

    def __init__(self, workshop: Workshop) -> None:
        """Made where a kernel can be compiled; what that raises is raised here."""
        super().__init__(workshop)
        kernels.check(workshop.device)
        self._steps: dict[int, _Step] = {}
        # A lone row's products: up to which share kept they are faster reading only that, and how.
        self.lone: dict[Site, tuple[float, Tile]] = {}
        workshop.marks_picks = self._is_able

    def work(self, packed: Packed) -> Hashable | None:
        """None: such a step is always faster here."""
        return None

    def prepare(self) -> None:
        """Measure when a lone row's products are faster that read only what it keeps."""
        if self._is_able and self._captures:
            self.lone = {site: self._measured(site) for site in SITES}

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: dict[str | None, Rotation],
    ) -> None:
        """Run all layers over the residual, in place."""
        rows = next(rows for rows in ROWS if rows >= packed.count)
        if rows not in self._steps:
            self._steps[rows] = _Step(self._workshop, rows, self._forms, self._captures)
        picks = packed.allowances is not None
        tiles = tuple(self._tile(packed, place) for place in range(len(SITES)))
        way = Way(picks, tiles, placing.rows_PH.data_ptr())
        rotation = next(iter(rotations.values()), None)
        self._steps[rows].run(h_ND, packed, placing, rotation, way)
        for layer in range(len(self._workshop.layout.layers)):
            taken.keys(placing.keys(layer))

    @property
    def prompts(self) -> Prompts | None:
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        return self._prompts if self._is_able and not counted else None

    @cached_property
    def _prompts(self) -> DevicePrompts:
        forms = [form for form in self._forms if form is not None]
        return DevicePrompts(self._workshop, forms, self._window, self._captures)

    def _takes(self, packed: Packed) -> bool:
        """Rows that take by thresholds, or all of their channels."""
        by_thresholds_N = np.zeros(packed.count, dtype=bool)
        if isinstance(packed.allowances, DeviceAllowances):
            by_thresholds_N = packed.takes_N
        elif packed.allowances is not None:
            return False
        picks_K = np.array([kind.plan.picks for kind in packed.distinct_kinds])
        return packed.count <= MOST_ROWS and bool((by_thresholds_N | ~picks_K[packed.kind_N]).all())

    @property
    def _may_run_many(self) -> bool:
        return True

    @property
    def _is_able(self) -> bool:
        return all(form is not None for form in self._forms)

    @property
    def _captures(self) -> bool:
        return self._workshop.device.type == "cuda"

    @cached_property
    def _forms(self) -> list[int | None]:
        """The form of each layer's gate; None where the kernels do not know what it holds."""
        return [self._form(layer) for layer in self._workshop.layout.layers]

    @torch.inference_mode()
    def _form(self, layer: Layer) -> int | None:
        tools, at = self._workshop, layer.index
        norms = (tools.attention_norms[at], tools.mlp_norms[at])
        if not all(isinstance(norm, RootMeanSquare) for norm in norms):
            return None
        if tools.gates[at] is None or not self._is_plain(layer):
            return None
        rotary_kinds = {each.layer_type for each in tools.layout.layers}
        if tools.layout.rotary_by_layer_type and len(rotary_kinds) > 1:
            return None
        inputs = max(tools.at_site(layer, site).inputs for site in SITES)
        if tools.dtype == torch.float64 or inputs > _LONGEST:
            return None
        sample = torch.linspace(-9, 9, 64, device=tools.device)
        given = layer.activation(sample)
        for form, plain in ((SILU, F.silu(sample)), (GELU, F.gelu(sample, approximate="tanh"))):
            if torch.allclose(given.float(), plain, rtol=1e-5, atol=1e-6):
                return form
        return None

    def _tile(self, packed: Packed, place: int) -> Tile | None:
        """How a site's products read only what a lone row kept, if they are to."""
        site, tools = SITES[place], self._workshop
        if packed.count > 1 or packed.allowances is None or site not in self.lone:
            return None
        inputs = tools.at_site(tools.layout.layers[0], site).inputs
        granted_LN = np.minimum(packed.channels_LTK[:, place][:, packed.kind_N], inputs)
        most, tile = self.lone[site]
        return tile if granted_LN.mean() <= most * inputs else None

    def _measured(self, site: Site) -> tuple[float, Tile]:
        tools = self._workshop
        products = [tools.at_site(layer, site) for layer in tools.layout.layers[:_TIMED_LAYERS]]
        x_1I = torch.randn(1, products[0].inputs, device=tools.device).to(tools.dtype)
        whole = _seconds(lambda: [product.whole(x_1I) for product in products])

        def seconds(share: float, tile: Tile) -> float:
            kept_1I = x_1I * (torch.rand(x_1I.shape, device=tools.device) < share)
            return _seconds(
                lambda: [
                    kernels.multiply_one(kept_1I, product.weight_IO, product.bias_O, tile)
                    for product in products
                ]
            )

        tile = min(TILES, key=lambda tile: seconds(0.5, tile))
        faster = [share for share in SHARES if seconds(share, tile) < whole]
        return max(faster, default=0.0), tile


class _Step:
    """The kernels of all layers over so many rows, and where they find what a step is about."""

    def __init__(
        self, workshop: Workshop, rows: int, forms: list[int | None], captures: bool
    ) -> None:
        self._tools, self._rows, self._captures = workshop, rows, captures
        self._forms = [form for form in forms if form is not None]
        self._graphs: dict[Way, torch.cuda.CUDAGraph] = {}
        layers, device = workshop.layout.layers, workshop.device
        width = workshop.at_site(layers[0], Site.ATTENTION_IN).inputs
        self._h_ND = torch.zeros(rows, width, device=device)
        self._turn_NR: tuple[Tensor, Tensor] | None = None
        # In one piece: first, room and length [L, N], what is granted and owed [L, T, N], takes [N]
        of_layers, of_sites = len(layers) * rows, len(layers) * len(SITES) * rows
        sizes = (of_layers, of_layers, of_layers, of_sites, of_sites, rows)
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=captures)
        self._there, self._here = (
            self._named(whole, sizes) for whole in (self._numbers, self._host)
        )
        self._owed_LTN = torch.zeros_like(self._there.owed_LTN)
        self._gone = _event() if captures else None
        ladder_LTG = workshop.ladder_LTG
        self._ladder_LTG = torch.zeros(len(layers), len(SITES), 2, device=device)
        if ladder_LTG is not None:
            self._ladder_LTG = torch.from_numpy(ladder_LTG).to(device)

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
        way: Way,
    ) -> None:
        """Run all layers over the residual [fewer rows, D], in place."""
        count, allowances = packed.count, packed.allowances
        if not placing.complete:  # the others have grown by the whole step
            placing.grow_in_all_layers()
        self._tell(h_ND, placing, allowances)
        if rotation is not None:
            if self._turn_NR is None:
                columns = rotation.cos_NR.shape[1]
                cos_NR, sin_NR = self._h_ND.new_zeros(2, self._rows, columns)
                self._turn_NR = cos_NR, sin_NR
            self._turn_NR[0][:count], self._turn_NR[1][:count] = rotation.cos_NR, rotation.sin_NR
        if not self._captures:
            self._run_layers(placing.rows_PH, way)
        else:
            if way not in self._graphs:
                self._graphs[way] = self._capture(placing.rows_PH, way)
                self._tell(h_ND, placing, allowances)
            self._graphs[way].replay()
        h_ND.copy_(self._h_ND[:count])
        if isinstance(allowances, DeviceAllowances):
            allowances.owe(self._owed_LTN[:, :, :count].clone())

    def _named(self, numbers: Tensor, sizes: tuple[int, ...]) -> _Told:
        first, room, length, granted, owed, takes = torch.split(numbers, list(sizes))
        layers, sites = len(self._tools.layout.layers), len(SITES)
        return _Told(
            first.view(layers, self._rows),
            room.view(layers, self._rows),
            length.view(layers, self._rows),
            granted.view(layers, sites, self._rows),
            owed.view(layers, sites, self._rows),
            takes,
        )

    def _tell(self, h_ND: Tensor, placing: Placing, allowances: object) -> None:
        """Send what a step is about."""
        count = len(h_ND)
        if count < self._rows:
            self._h_ND.zero_()  # of rows that are none, nothing is read
        self._h_ND[:count] = h_ND
        if self._gone is not None:
            self._gone.synchronize()  # what was sent before has left
        first_LN, room_LN, length_LN, granted_LTN, owed_LTN, takes_N = (
            each.numpy() for each in self._here
        )
        first_LN[:, count:], length_LN[:, count:], takes_N[:] = -1, 0, 0
        lies = placing.lies
        first_LN[:, :count], room_LN[:, :count] = lies.first_LC, lies.room_LC
        length_LN[:, :count] = lies.length_LC
        if isinstance(allowances, DeviceAllowances):
            takes, granted, before, _ = allowances.asked
            takes_N[:count], granted_LTN[:, :, :count] = takes, granted
            owed_LTN[:, :, :count] = before
        self._numbers.copy_(self._host, non_blocking=True)
        if self._gone is not None:
            self._gone.record()

    def _capture(self, rows_PH: Tensor, way: Way) -> torch.cuda.CUDAGraph:
        """The kernels once as they are, to compile them and make room, and once to be captured."""
        self._here.first_LN.fill_(-1)
        self._here.length_LN.zero_()
        self._numbers.copy_(self._host)  # nothing is attended to, nothing is written to the pool
        aside = torch.cuda.Stream(self._tools.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._tools.device))
        with torch.cuda.stream(aside):
            self._run_layers(rows_PH, way)
        torch.cuda.current_stream(self._tools.device).wait_stream(aside)
        # Those that write into another pool will not be needed again.
        self._graphs = {of: each for of, each in self._graphs.items() if of.pool == way.pool}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_layers(rows_PH, way)
        return graph

    def _run_layers(self, rows_PH: Tensor, way: Way) -> None:
        tools, told = self._tools, self._there
        self._owed_LTN.copy_(told.owed_LTN)
        takes = Takes(
            told.takes_N, told.granted_LTN, told.owed_LTN, self._owed_LTN, self._ladder_LTG
        )
        lies = (told.first_LN, told.room_LN, told.length_LN)
        branch_SND: Tensor | None = None
        for layer, form in zip(tools.layout.layers, self._forms, strict=True):
            place, shape = layer.index, layer.shape
            front, out, gated, down = (self._at(layer, at, takes, way) for at in range(len(SITES)))
            x_ND = self._normalise(tools.attention_norms[place], branch_SND, front)
            out_SNO = self._product(layer, Site.ATTENTION_IN, x_ND, way)
            query_NAH = attention.place(out_SNO, self._turn_NR, rows_PH, lies, place, shape.heads)
            x_NI = attention.attend(
                query_NAH, rows_PH, lies, place, shape.kv_heads, layer.scale, out
            )
            branch_SND = self._product(layer, Site.ATTENTION_OUT, x_NI, way)
            x_ND = self._normalise(tools.mlp_norms[place], branch_SND, gated)
            both_SNO = self._product(layer, Site.MLP_IN, x_ND, way)
            x_NI = kernels.gate(form, both_SNO, down, tools.dtype)
            branch_SND = self._product(layer, Site.MLP_OUT, x_NI, way)
        assert branch_SND is not None, "a model without layers"
        self._h_ND += branch_SND.sum(0)

    def _at(self, layer: Layer, place: int, takes: Takes, way: Way) -> At:
        """What the rows take at one site."""
        norms_I = self._tools.layout.column_norms(layer, SITES[place])
        return At(norms_I, takes.at(layer.index, place) if way.picks else None)

    def _product(self, layer: Layer, site: Site, x_NI: Tensor, way: Way) -> Tensor:
        product, tile = self._tools.at_site(layer, site), way.tiles[SITES.index(site)]
        if tile is None:
            return product.whole(x_NI)[None]
        return kernels.multiply_one(x_NI, product.weight_IO, product.bias_O, tile)

    def _normalise(self, norm: object, branch_SND: Tensor | None, at: At) -> Tensor:
        assert isinstance(norm, RootMeanSquare), "a layer that is not known"
        return kernels.normalise(
            self._h_ND, branch_SND, norm.scale_D, norm.epsilon, at, self._tools.dtype
        )


class _Told(NamedTuple):
    """What a step is about, as views of one piece of memory."""

    first_LN: Tensor
    room_LN: Tensor
    length_LN: Tensor
    granted_LTN: Tensor
    owed_LTN: Tensor
    takes_N: Tensor


def _event(**options: bool) -> torch.cuda.Event:
    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call]


def _seconds(work: Callable[[], object]) -> float:
    """What some launches take when they are captured, in turn."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    graph.replay()
    begin, end = _event(enable_timing=True), _event(enable_timing=True)
    begin.record()
    for _ in range(_TIMED_TURNS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
