"""Steps with prompts on a GPU: all layers over the rows that keep them, and mostly in one launch.

Layer by layer in operators (SparseAttention, SparseMlp) a step of some hundred tokens waits for
launches, not for products. Here what lies between two products is one kernel
(device_prompt_layers.py), and a step like one before is a graph of kernels that was captured then:
alike are steps of which the same sets of rows, filled up to the same sizes, keep the same
sub-layers. What else they are about goes over in one piece.

It takes steps in which plans alone decide what is kept, and channels are taken by thresholds.
Whatever else a step holds is the operators'.

Shape letters: N rows, filled up   R some of them   D width   C chunks   W programs of attention
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elastiformer import device_prompt_attention as attention
from elastiformer import device_taking
from elastiformer.capacity import Phase
from elastiformer.device_allowances import AmongOthers
from elastiformer.device_prompt_attention import Asking, Lying
from elastiformer.device_prompt_layers import ALL, NONE, Group, LayerRows, PromptLayers, Repaired
from elastiformer.device_taking import Takers, Taking, TakingSizes
from elastiformer.packed import Packed
from elastiformer.placing import Placing
from elastiformer.pointwise import Rotation
from elastiformer.sequence import Kind
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop

_LOG = logging.getLogger(__name__)
_GRAPHS = 48  # that are kept at most
_FORMS = 128  # of steps, that were met before
_STRUCTURES = 512
_LEAST_ROWS = 16


@dataclass(frozen=True)
class _Structure:
    """Which rows keep which sub-layers, by the numbers of their kinds."""

    sets: tuple[frozenset[int], ...]  # the first is of all
    layers: tuple[LayerRows, ...]


class _Sizes(NamedTuple):
    """What a graph is captured for, beside the structure of its step; all filled up."""

    rows: int
    chunks: int
    taking: TakingSizes
    of_sets: tuple[tuple[int, int], ...]  # rows and programs
    pool: int  # where its memory is


class DevicePrompts:
    """Runs the layers of one model over steps that hold more than decode rows."""

    def __init__(
        self, workshop: Workshop, forms: Sequence[int], window: float, captures: bool
    ) -> None:
        """
        Args:
            forms: of each layer's gate.
            window: the position from which on some layer does not see all before it.
        """
        self._workshop, self._window = workshop, window
        self._layers = PromptLayers(workshop, forms)
        self._structure = lru_cache(maxsize=_STRUCTURES)(self._make_structure)
        self._numbers: dict[_Structure, int] = {}  # as keys they are long
        self._steps: OrderedDict[tuple[int, _Sizes], _Step] = OrderedDict()
        self._residuals: dict[int, Tensor] = {}  # by their rows
        self._memory = torch.cuda.graph_pool_handle() if captures else None

    def takes(self, packed: Packed) -> bool:
        """Whether a step is one of those."""
        plans = [kind.plan for kind in packed.distinct_kinds]
        if packed.leaves_heads_out or packed.leaves_experts_out:
            return False
        if packed.position_on_host_N.max() >= self._window:
            return False
        if self._workshop.kv != "complete" or not all(plan.keeps_by_plan for plan in plans):
            return False
        if not packed.picks:
            return True
        # Rows that take what they are granted are few: those with which texts begin.
        roots_Z = device_taking.roots_of(packed)
        if self._workshop.ladder_LTG is None or packed.position_on_host_N[roots_Z].any():
            return False
        return all(
            kind.phase is Phase.OUTPUT and kind.plan.only_picks
            for kind in packed.distinct_kinds
            if kind.plan.picks
        )

    def allowances(self, packed: Packed) -> AmongOthers | None:
        """What the rows take that take by thresholds; None: none does."""
        rows_J = device_taking.takers_of(packed)
        return self._workshop.allowances_among(packed, rows_J) if len(rows_J) else None

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: dict[str | None, Rotation],
    ) -> Tensor:
        """The residual that the layers leave, float32."""
        rotation = next(iter(rotations.values()), None)
        number, structure = self._structure(packed.distinct_kinds)
        rows_of = [
            packed.rows_of(frozenset(packed.distinct_kinds[at] for at in of_set)).rows_R
            for of_set in structure.sets
        ]
        programs = [
            attention.programs(np.searchsorted(rows_R, packed.starts)) for rows_R in rows_of
        ]
        rows_J, roots = device_taking.takers_of(packed), len(device_taking.roots_of(packed))
        owners = len(np.unique(packed.chunk_N[rows_J]))
        taking = TakingSizes(
            _power(len(rows_J)), _power(owners) if owners < len(rows_J) else 0, _power(roots)
        )
        of_sets = [
            (filled(len(rows_R)), max(_power(len(each)), 1))
            for rows_R, each in zip(rows_of, programs, strict=True)
        ]
        sizes = _Sizes(
            filled(packed.count),
            _power(len(packed.chunks)),
            taking,
            tuple(of_sets),
            placing.rows_PH.data_ptr(),
        )
        if (number, sizes) not in self._steps:
            self._steps[number, sizes] = self._new_step(structure, sizes, h_ND.shape[1])
        self._steps.move_to_end((number, sizes))
        step = self._steps[number, sizes]
        found_ND = step.run(h_ND, packed, placing, rotation, rows_of, programs)
        for layer in range(len(self._workshop.layout.layers)):
            taken.keys(placing.keys(layer))
        return found_ND

    def _new_step(self, structure: _Structure, sizes: _Sizes, width: int) -> _Step:
        """One in place of the one that was not met for longest."""
        if len(self._steps) >= _FORMS:
            self._steps.popitem(last=False)
        captured = [step for step in self._steps.values() if step.is_captured]
        for step in captured[: max(len(captured) + 1 - _GRAPHS, 0)]:
            step.forget()
        # One row more, in which what fills up comes and goes. Steps follow each other, so they
        # share memory.
        most = _power(sizes.rows + 1)
        if most not in self._residuals:
            self._residuals[most] = torch.zeros(most, width, device=self._workshop.device)
        residual_ND = self._residuals[most][: sizes.rows + 1]
        return _Step(self._workshop, self._layers, structure, sizes, residual_ND, self._memory)

    def _make_structure(self, kinds: tuple[Kind, ...]) -> tuple[int, _Structure]:
        every = frozenset(range(len(kinds)))
        sets = [every]

        def number(some: frozenset[int]) -> int:
            if not some:
                return NONE
            if some not in sets:
                sets.append(some)
            return sets.index(some)

        layers = []
        for layer in self._workshop.layout.layers:
            last = layer.index == len(self._workshop.layout.layers) - 1
            # What a prompt token is left with there, nobody reads.
            read = [at for at, kind in enumerate(kinds) if not last or kind.phase is Phase.OUTPUT]
            plans = [kind.plan.plan[layer.index] for kind in kinds]
            asking = frozenset(at for at in read if plans[at].attention_tokens)
            names: dict[str, set[int]] = {}
            for at, kind in enumerate(kinds):
                if (name := self._workshop.mending.name(layer, kind)) is not None:
                    names.setdefault(name, set()).add(at)
            layers.append(
                LayerRows(
                    number(asking),
                    number(every - asking),
                    number(frozenset(at for at in read if plans[at].mlp_tokens)),
                    tuple(Repaired(name, number(frozenset(of))) for name, of in names.items()),
                )
            )
        structure = _Structure(tuple(sets), tuple(layers))
        return self._numbers.setdefault(structure, len(self._numbers)), structure


class _Step:
    """Steps of one structure and size: where they find what they are about, and their kernels."""

    def __init__(
        self,
        workshop: Workshop,
        layers: PromptLayers,
        structure: _Structure,
        sizes: _Sizes,
        residual_ND: Tensor,
        memory: Any,
    ) -> None:
        self._layers, self._structure, self._sizes = layers, structure, sizes
        self._h_ND, self._memory = residual_ND, memory
        self._device = workshop.device
        self._turn_NR: tuple[Tensor, Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures, self._runs = memory is not None, 0
        count, taking = len(workshop.layout.layers), sizes.taking
        shapes: dict[str, tuple[int, ...]] = {
            "first": (count, sizes.chunks),
            "room": (count, sizes.chunks),
            **device_taking.shapes(taking, count),
        }
        for at, (rows, programs) in enumerate(sizes.of_sets):
            shapes |= {f"{name} {at}": (rows,) for name in ("rows", "chunk", "position")}
            shapes |= {f"programs {at}": (programs, 3)}
            shapes |= {f"takers {at}": (taking.takers,), f"roots {at}": (taking.roots,)}
        bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())]).tolist()
        self._host = torch.zeros(bounds[-1], dtype=torch.int64, pin_memory=memory is not None)
        self._there = torch.zeros(bounds[-1], dtype=torch.int64, device=self._device)
        parts = {
            name: (slice(*bounds[at : at + 2]), shape)
            for at, (name, shape) in enumerate(shapes.items())
        }
        self._named = {name: self._there[at].view(shape) for name, (at, shape) in parts.items()}
        self._told = {name: self._host[at].view(s).numpy() for name, (at, s) in parts.items()}
        self._taking: Taking | None = None
        if taking.takers or taking.roots:
            self._taking = Taking(taking, self._named, workshop.ladder_on_device_LTG)
        self._gone = _event() if memory is not None else None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def forget(self) -> None:
        """Give up the graph."""
        self._graph = None

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
        rows_of: Sequence[np.ndarray],
        programs: Sequence[np.ndarray],
    ) -> Tensor:
        count, allowances = packed.count, packed.allowances
        self._tell(packed, placing, rows_of, programs)
        self._h_ND[:count], self._h_ND[count:] = h_ND, 0
        if rotation is not None:
            if self._turn_NR is None:
                shape = (2, self._sizes.rows, rotation.cos_NR.shape[1])
                cos_NR, sin_NR = torch.zeros(shape, device=self._device)
                self._turn_NR = cos_NR, sin_NR
            self._turn_NR[0][:count], self._turn_NR[1][:count] = rotation.cos_NR, rotation.sin_NR
        if self._graph is None and self._captures and self._runs:
            self._graph = self._captured(placing.rows_PH)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run_layers(placing.rows_PH)
        self._runs += 1
        if isinstance(allowances, AmongOthers) and self._taking is not None:
            allowances.owe(self._taking.owed[:, :, : allowances.owners].clone())
        return self._h_ND[:count]

    def _tell(
        self,
        packed: Packed,
        placing: Placing,
        rows_of: Sequence[np.ndarray],
        programs: Sequence[np.ndarray],
    ) -> None:
        """Send what the step is about."""
        if self._gone is not None:
            self._gone.synchronize()  # what was sent before has left
        told, chunks = self._told, len(packed.chunks)
        lies = placing.lies
        told["first"][:, :chunks], told["room"][:, :chunks] = lies.first_LC, lies.room_LC
        position_N = packed.position_on_host_N
        taking = device_taking.takers_of(packed), device_taking.roots_of(packed)
        for at, (rows_R, programs_W3) in enumerate(zip(rows_of, programs, strict=True)):
            count = len(rows_R)
            told[f"rows {at}"][:count], told[f"rows {at}"][count:] = rows_R, self._sizes.rows
            told[f"chunk {at}"][:count], told[f"chunk {at}"][count:] = packed.chunk_N[rows_R], -1
            told[f"position {at}"][:count] = position_N[rows_R]
            told[f"programs {at}"][:] = 0
            told[f"programs {at}"][: len(programs_W3)] = programs_W3
            if self._taking is not None:
                device_taking.tell_places(told, str(at), rows_R, taking)
        device_taking.tell(told, packed, self._sizes.taking, taking)
        self._there.copy_(self._host, non_blocking=True)
        if self._gone is not None:
            self._gone.record()

    def _captured(self, rows_PH: Tensor) -> torch.cuda.CUDAGraph | None:
        """What ran once already, as a graph; None, once and for all, where it cannot be one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run_layers(rows_PH)
        except RuntimeError as error:
            _LOG.warning("steps like this one are launched kernel by kernel: %s", error)
            self._captures = False
            return None
        return graph

    def _run_layers(self, rows_PH: Tensor) -> None:
        named = self._named
        groups = []
        for at in range(len(self._structure.sets)):
            asking = Asking(*(named[f"{name} {at}"] for name in ("chunk", "position", "programs")))
            rows_R, turn_RR = named[f"rows {at}"], self._turn_NR
            if turn_RR is not None and at != ALL:
                within_R = rows_R.clamp(max=self._sizes.rows - 1)
                cos_NR, sin_NR = turn_RR
                turn_RR = cos_NR.index_select(0, within_R), sin_NR.index_select(0, within_R)
            takers = Takers(named[f"takers {at}"], named[f"roots {at}"])
            groups.append(Group(rows_R, asking, turn_RR, takers))
        if self._taking is not None:
            self._taking.begin()
        lying = Lying(named["first"], named["room"])
        self._layers.run(self._h_ND, self._structure.layers, groups, rows_PH, lying, self._taking)


def filled(rows: int) -> int:
    """The next size that steps are filled up to: at most an eighth more, or a few rows."""
    apart = max(_LEAST_ROWS, (1 << max(rows - 1, 0).bit_length()) // 16)
    return -(-rows // apart) * apart


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
