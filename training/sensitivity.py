"""How much each layer and unit matters, per phase: probes on held-out text, remembered on disk.

A probe lowers one field of one layer, all else whole, and is judged by the KL to the pretrained
model: of the continuation when prompt tokens are probed, of every token when output tokens are.
Below the probed layer nothing changes, so its forward starts from what that layer was given.

Each answer is appended to a file as it comes; a run that is started again asks only what is
missing. When time runs out, what was not asked is left to interpolation (allotment.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elastiformer import Adapter, ElasticModel, Phase, Unit
from elastiformer.calibration import Schedule
from elastiformer.capacity import WHOLE_LAYER, LayerPlan, Plan, dense_plan
from elastiformer.plan_grid import PlanGrid, Selection
from training.allotment import (
    STEEPNESS,
    TOKEN_FIELDS,
    Curves,
    probe_share,
    without_layers,
)
from training.progress import track

LATE = "late"  # the field of a probe that leaves out this layer and all later ones
LATE_SHARE = 0.7  # of the layers, at most, are left out together
FIRST_LAYERS = 6  # of the coarse order; the later half of them tells how steep the curves are
LEAST_ANSWERS = 12  # of each phase, however little time there is
SECOND_SHARE = 0.25  # the second probe of things inside a sub-layer


@dataclass(frozen=True, slots=True)
class Probe:
    """One question: what it loses when `layer` keeps only `share` of `field`."""

    phase: Phase
    layer: int
    field: str
    share: float

    def plan(self, layers: int) -> Plan:
        if self.field == LATE:
            return without_layers(self.layer, layers)
        plan = list(dense_plan(layers))
        plan[self.layer] = LayerPlan(**{self.field: self.share})
        return tuple(plan)


def probes(phase: Phase, layers: int, fields: Sequence[str], whole: bool = True) -> Iterator[Probe]:
    """The questions of a phase, most telling first, coarse before fine."""
    order = coarse_first(layers)
    inside = [name for name in fields if name not in TOKEN_FIELDS]
    if phase is Phase.PROMPT:
        for count in late_counts(layers):
            yield Probe(phase, layers - count, LATE, 0.0)
    for place, layer in enumerate(order):
        for name in fields:
            yield Probe(phase, layer, name, probe_share(name))
        if FIRST_LAYERS // 2 <= place < FIRST_LAYERS:
            for name in inside:
                yield Probe(phase, layer, name, SECOND_SHARE)
        if whole and phase is Phase.OUTPUT:
            for name in TOKEN_FIELDS:
                yield Probe(phase, layer, name, 0.0)
    for layer in order:
        if layer not in order[FIRST_LAYERS // 2 : FIRST_LAYERS]:
            for name in inside:
                yield Probe(phase, layer, name, SECOND_SHARE)
    if whole and phase is Phase.PROMPT:
        for layer in order:
            for name in TOKEN_FIELDS:
                yield Probe(phase, layer, name, 0.0)


def coarse_first(layers: int) -> list[int]:
    """All layers, the ends first, then ever finer: an interrupted run knows a bit of each part."""
    order = [layer for layer in (0, 1, layers - 1) if 0 <= layer < layers]
    step = 1 << max(0, (layers - 1).bit_length() - 1)
    while step:
        order += range(0, layers, step)
        step //= 2
    return list(dict.fromkeys(order))


def late_counts(layers: int) -> list[int]:
    """How many late layers are left out together: each at first, then every second or fourth."""
    most = max(1, int(layers * LATE_SHARE)) if layers > 1 else 0
    steps = {1: 4, 2: 12, 4: most}  # every one up to 4, every second up to 12, then every fourth
    return sorted(
        {
            count
            for step, until in steps.items()
            for count in range(step, min(until, most) + 1, step)
        }
        | ({most} if most else set())
    )


class AnyMeter(ABC):
    """Runs plans through the masked form, and says what they lose; on what, each kind knows."""

    def __init__(self, model: ElasticModel, ids_WT: Tensor) -> None:
        self._model = model
        self._ids_WT = ids_WT.to(model.device)
        self._layers = len(model.shape.layers)
        self._dense = dense_plan(self._layers)
        self._whole: dict[Phase, list[Any]] = {}

    @torch.inference_mode()
    def kl(self, phase: Phase, plan: Plan, first_layer: int = 0) -> float:
        """The KL when the tokens of `phase` run under `plan`.

        Args:
            first_layer: below it `plan` keeps everything.
        """
        if first_layer > 0 and phase not in self._whole:
            self._whole[phase] = self._record(phase)
        if first_layer > 0:
            with _starting_at(self._modules(), first_layer, self._whole[phase]):
                return self._run(phase, plan)
        return self._run(phase, plan)

    @torch.inference_mode()
    def scheduled_kl(self, phase: Phase, schedule: Schedule) -> float:
        """KL when the tokens of `phase` take turns between a schedule's two plans."""
        tokens = self._ids_WT.shape[1]
        plan_T = torch.tensor([1 if schedule.is_fuller(at) else 2 for at in range(tokens)])
        routed_WT = self._output(phase) == (phase is Phase.OUTPUT)
        plan_WT = torch.where(routed_WT, plan_T.to(self._ids_WT.device), 0)
        return self._run(phase, PlanGrid([self._dense, schedule.fuller, schedule.leaner], plan_WT))

    def _pair(self, phase: Phase, plan: Plan) -> tuple[Plan, Plan]:
        return (plan, self._dense) if phase is Phase.PROMPT else (self._dense, plan)

    def _grid(self, phase: Phase, plans: Plan | PlanGrid) -> PlanGrid | list[tuple[Plan, Plan]]:
        """For every row, or every token, what it runs under."""
        if isinstance(plans, PlanGrid):
            return plans
        return [self._pair(phase, plans)] * len(self._ids_WT)

    @abstractmethod
    def _output(self, phase: Phase) -> Tensor:
        """The tokens of phase output."""

    @abstractmethod
    def _run(self, phase: Phase, plans: Plan | PlanGrid) -> float:
        """What is lost when the tokens of `phase` run under plans of theirs."""

    def _record(self, phase: Phase) -> list[Any]:
        """What each layer gives when nothing is left out, as below a probed layer."""
        outputs: list[Any] = [None] * self._layers
        handles = [
            module.register_forward_hook(lambda _, args, out, at=at: outputs.__setitem__(at, out))
            for at, module in enumerate(self._modules())
        ]
        try:
            self._run(phase, self._dense)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _modules(self) -> list[nn.Module]:
        layout = self._model.layout
        return list(self._model.base.get_submodule(layout.layers_path).children())


class Meter(AnyMeter):
    """The same on a fixed set of windows of text, in nats per judged token."""

    def __init__(self, model: ElasticModel, ids_WT: Tensor, prompt_tokens: int) -> None:
        super().__init__(model, ids_WT)
        places_T = torch.arange(ids_WT.shape[1], device=model.device)
        self._continuation_WT = (places_T >= prompt_tokens - 1).expand_as(self._ids_WT)
        with torch.inference_mode():
            # Its softmax is the same for every probe, and half of what a comparison costs.
            self._teacher_WTV = model.teacher(self._ids_WT).float().log_softmax(-1)

    @torch.inference_mode()
    def scores(self, units: Sequence[Unit]) -> Iterator[tuple[Phase, Unit, int, Tensor]]:
        """Every token router's scores of every token, per phase, when all tokens are kept."""
        asked = {unit.value: 1 - 1e-9 for unit in units if unit.value in TOKEN_FIELDS}
        if not asked:
            return
        plan = (replace(WHOLE_LAYER, **asked),) * self._layers
        for phase in Phase:
            output_WT = self._output(phase)
            result = self._model.masked(
                self._ids_WT,
                [self._pair(phase, plan)] * len(self._ids_WT),
                output_WT,
                selection=Selection.RANK,
            )
            for route in result.routes:
                if route.unit.value in asked:
                    active_WT = route.active_BT & (output_WT == (phase is Phase.OUTPUT))
                    yield phase, route.unit, route.layer, route.scores[active_WT].float().cpu()

    def _logits(self, phase: Phase, plans: Plan | PlanGrid) -> Tensor:
        """What comes of all windows, [W, T, V]."""
        return self._model.masked(
            self._ids_WT,
            self._grid(phase, plans),
            self._output(phase),
            selection=Selection.RANK,
        ).logits_BTV

    def _run(self, phase: Phase, plans: Plan | PlanGrid) -> float:
        judged_WT = self._output(phase)
        kl = 0.0
        for teacher_TV, student_TV, judged_T in zip(
            self._teacher_WTV, self._logits(phase, plans), judged_WT, strict=True
        ):
            first = int(judged_T.int().argmax())  # all after it are judged too
            kl += kl_sum(teacher_TV[first:], student_TV[first:].float())
        return kl / int(judged_WT.sum())

    def _output(self, phase: Phase) -> Tensor:
        """The tokens of phase output, which are those that are judged."""
        if phase is Phase.PROMPT:
            return self._continuation_WT
        return torch.ones_like(self._ids_WT, dtype=torch.bool)


def kl_sum(teacher_NV: Tensor, student_NV: Tensor) -> float:
    """KL to the teacher's log-probabilities, summed over tokens."""
    apart_NV = (teacher_NV - student_NV).add_(student_NV.logsumexp(-1, keepdim=True))
    # Small numbers from here on: summed with the logits' own size, rounding would outweigh them.
    return float(torch.linalg.vecdot(teacher_NV.exp(), apart_NV).sum())


@contextmanager
def _starting_at(
    modules: Sequence[nn.Module], first: int, outputs: Sequence[Any]
) -> Iterator[None]:
    """Layers below `first` give what they gave before, without being computed."""
    given = outputs[first - 1]
    for module in modules[:first]:
        module.forward = lambda *args, **kwargs: given
    try:
        yield
    finally:
        for module in modules[:first]:
            del module.forward


class Notebook:
    """The answers so far, in a file of one JSON object a line.

    Answers to another adapter, other data or other windows are kept in the file and not used.

    Args:
        about: by phase, what its answers hang on.
    """

    def __init__(self, path: Path, about: Mapping[Phase, str]) -> None:
        self._path = path
        self._about = about
        self.answers: dict[Probe, float] = {}
        for entry in _whole_lines(path):
            probe = _probe(entry)
            if entry.get("about") == about[probe.phase]:
                self.answers[probe] = entry["kl"]

    def note(self, probe: Probe, kl: float) -> None:
        self.answers[probe] = kl
        line = json.dumps(asdict(probe) | {"kl": kl, "about": self._about[probe.phase]})
        with self._path.open("a", encoding="utf-8") as file:
            # A run that was killed may have left half a line.
            file.write(line + "\n" if _ends_whole(self._path) else "\n" + line + "\n")
            file.flush()
            os.fsync(file.fileno())


def remembered(path: Path) -> dict[Probe, float]:
    """The answers of the latest calibration that wrote in this file; none without one."""
    entries = list(_whole_lines(path))
    latest = {entry["phase"]: entry["about"] for entry in entries}
    return {_probe(e): e["kl"] for e in entries if e["about"] == latest[e["phase"]]}


def about(adapter: Adapter, ids_WT: Tensor, prompt_tokens: int) -> dict[Phase, str]:
    """For each phase a short hash of everything that an answer hangs on."""
    found = {}
    for phase in Phase:
        digest = hashlib.sha256(f"{adapter.identity_in(phase)}/{prompt_tokens}/".encode())
        digest.update(ids_WT.cpu().numpy().tobytes())
        found[phase] = digest.hexdigest()[:16]
    return found


class Judge(Protocol):
    """Says what a plan loses."""

    def kl(self, phase: Phase, plan: Plan, first_layer: int = 0) -> float:
        """What is lost when the tokens of `phase` run under `plan`, whole below `first_layer`."""


def ask(
    meter: Judge, notebook: Notebook, asked: Sequence[Probe], layers: int, until: float, label: str
) -> int:
    """Answer what the notebook lacks, a few at least, until the clock reads `until`.

    Returns:
        How many stay unanswered.
    """
    missing = [probe for probe in asked if probe not in notebook.answers]
    for done, probe in enumerate(track(missing, label=label)):
        if done >= LEAST_ANSWERS and time.monotonic() > until:
            return len(missing) - done
        notebook.note(probe, meter.kl(probe.phase, probe.plan(layers), probe.layer))
    return 0


def curves(answers: dict[Probe, float], phase: Phase, layers: int) -> Curves:
    """The loss curves of a phase."""
    probed: dict[tuple[int, str], dict[float, float]] = {}
    for probe, kl in answers.items():
        if probe.phase is phase and probe.field != LATE:
            probed.setdefault((probe.layer, probe.field), {})[probe.share] = kl
    found = Curves(layers, probed)
    for name in STEEPNESS:
        measured = sorted(
            steepness
            for (_, field), points in probed.items()
            if field == name and (steepness := _steepness(points)) is not None
        )
        if measured:
            found.steepness[name] = measured[len(measured) // 2]
    return found


def late_losses(answers: dict[Probe, float]) -> dict[int, float]:
    return {probe.layer: max(0.0, kl) for probe, kl in answers.items() if probe.field == LATE}


def _steepness(points: dict[float, float]) -> float | None:
    """What the law's steepness must be to go through two probes inside a sub-layer."""
    inner = sorted((1 - share, kl) for share, kl in points.items() if share > 0 and kl > 1e-5)
    if len(inner) < 2:
        return None
    (less, kl_less), (more, kl_more) = inner[0], inner[-1]
    low, high = 0.1, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        if math.expm1(middle * more) / math.expm1(middle * less) < kl_more / kl_less:
            low = middle
        else:
            high = middle
    return low


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line of a run that was killed: it is asked again
        if isinstance(entry, dict):
            yield entry


def _probe(entry: dict[str, Any]) -> Probe:
    return Probe(Phase(entry["phase"]), entry["layer"], entry["field"], entry["share"])


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
