"""How a row of an ablation is measured: on which windows, under which plans, at what cost.

Every row runs through the masked form, on the windows that `evaluate` takes. A row that is to be
compared at equal cost must spend what the adapter spends; what it spends is counted from what its
tokens kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from elastiformer import AdapterError, CapacityError, ElasticModel, Phase, Unit, dense_plan
from elastiformer.adapter import blank
from elastiformer.calibration import unit_of
from elastiformer.capacity import Plan, rooted
from elastiformer.planning import others_share, prompt_context
from training.ablation_report import Point
from training.ablation_rows import EndingRow, LeavingRow, OutputRow, Row, kept, rows_of
from training.allotment import uniform
from training.baselines import lowered, under_paths
from training.channel_choices import Choice, ChoicePicking, Learnt, Weight
from training.data import some_windows, tokenizer_of
from training.files import RunError
from training.learnt import constants, gradients, up_sizes
from training.losses import Divergence, kl_per_token
from training.picking import (
    AsPlanned,
    Picking,
    Sizes,
    Under,
    counted,
    dense_flops,
    laid_out,
    run_picked,
)
from training.quality import Setting, Window, asked_of, copied, measure, windows_of

PROSE, COPIED = "prose", "copied"
EQUAL = 0.002  # of the block FLOPs: a schedule meets its share as nearly as positions let it
ROUNDS = 3  # in which constants are fitted to what they themselves leave out

Placed = Sequence[tuple[Plan, Phase]]


class Study:
    """One model and its adapter, the texts, and how a row is measured.

    Raises:
        AdapterError: the adapter is not calibrated, or routes more than channels and sub-layers.
        RunError: a layer or a window that the model does not have room for.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        model = ElasticModel.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
        self.model = model
        adapter, calibration = model.adapter, model.calibration
        if adapter is None or calibration is None:
            raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
        self.adapter, self._calibration = adapter, calibration
        routed = {
            step.field
            for path in calibration.paths.values()
            for step in path
            if step.share > 0 and unit_of(step.field) is not Unit.CHANNELS
        }
        if routed:
            raise AdapterError(
                f"{args.adapter}: ablate measures adapters that leave out channels and whole "
                f"sub-layers; this one's plans keep a share of {', '.join(sorted(routed))}"
            )
        self._capacities = [each for each in args.capacities if each < 1]
        if low := [each for each in self._capacities if each < calibration.lowest - 1e-9]:
            raise RunError(f"--capacities: {low[-1]:g} is below {calibration.lowest:g}, the lowest")
        layers = len(model.shape.layers)
        asked = [*args.leave_at, *(layer for text in args.keep for layer, _ in kept(text))]
        if beyond := [layer for layer in asked if not 0 < layer < layers]:
            raise RunError(f"--leave-at, --keep: layers 1 to {layers - 1}; got {beyond[0]}")
        if args.keep and not args.leave_at:
            raise RunError(
                "--keep: say with --leave-at from which layer on the others are left out"
            )
        if (longest := max(args.learn_window, args.held_out_window)) > model.context:
            raise RunError(f"a window of {longest}: the context of this model is {model.context}")
        self.rows: dict[str, Row] = rows_of(args.leave_at, args.keep)
        if model.layout.layers[0].gate is None:  # nothing says which neurons of up matter
            self.rows = {
                name: row
                for name, row in self.rows.items()
                if not (isinstance(row, OutputRow) and row.choice and row.choice.up_share < 1)
            }

    def measured(self, row: Row) -> list[Point]:
        """A row on every text, at every capacity that it is for and that it can reach.

        Raises:
            CapacityError: the adapter cannot be run at a capacity.
            RunError: the row spends something else than the adapter does.
        """
        if isinstance(row, OutputRow):
            found = (self._output(row, capacity) for capacity in self._capacities)
            return [point for point in found if point is not None]
        texts: dict[str, list[Window]] = {PROSE: self._prose, COPIED: self._copied}
        if isinstance(row, LeavingRow):
            return [self._leaving(row, text, on) for text, on in texts.items()]
        points = []
        for text, on in texts.items():
            for capacity in self._capacities:
                try:
                    points.append(self._ending(row, text, on, capacity))
                except CapacityError:  # the others cannot make up for so many
                    continue
        return points

    # The texts, read once.

    @property
    def prompt_tokens(self) -> int:
        return int(self._args.held_out_window * 2 // 3)

    @cached_property
    def _held_WT(self) -> Tensor:
        args = self._args
        of = (args.windows, args.held_out_window, args.seed)
        return some_windows(args.held_out, tokenizer_of(self.model), *of)[0]

    @cached_property
    def _prose(self) -> list[Window]:
        return windows_of(self.model, self._held_WT, self.prompt_tokens)

    @cached_property
    def _copied(self) -> list[Window]:
        again_WT = copied(self._held_WT, self.prompt_tokens)
        return windows_of(self.model, again_WT, self.prompt_tokens)

    @cached_property
    def _learn_WT(self) -> Tensor:
        args = self._args
        of = (args.learn_windows, args.learn_window, args.seed)
        return some_windows(args.data, tokenizer_of(self.model), *of)[0]

    @cached_property
    def _gradients(self) -> Sizes:
        return gradients(self.model, self._learn_WT, self._args.seed)

    @cached_property
    def _up_sizes(self) -> dict[int, Tensor]:
        return up_sizes(self.model, self._learn_WT)

    # One row at one capacity or plan.

    def _output(self, row: OutputRow, capacity: float) -> Point | None:
        """None: the adapter reaches this capacity, and this row does not.

        Raises:
            CapacityError: the adapter does not.
        """
        model, choice = self.model, row.choice
        if choice is None:
            return self._as_shipped(capacity)
        learnt = Learnt(
            self._gradients if choice.weight is Weight.GRADIENT else {},
            self._up_sizes if choice.up_share < 1 else {},
        )
        shares: AbstractContextManager[None] = nullcontext()
        if row.uniform:
            fields = lowered(model, Phase.OUTPUT)
            paths = {phase: uniform(model.shape, fields) for phase in Phase}
            shares = under_paths(model, paths)
        _, wanted = self._scored(self._prose[0], capacity)  # windows alike spend alike
        with shares:
            try:
                means = self._constants(choice, capacity) if choice.constant_at else {}
                laid = [self._scored(window, capacity) for window in self._prose]
            except CapacityError:
                return None
            picking = ChoicePicking(model, choice, learnt, means)
            losses = []
            for window, (under, spent) in zip(self._prose, laid, strict=True):
                losses.append(self._loss(window, under, Setting.SCORED, picking))
                spent += picking.more_flops(under) / dense_flops(model, window)
                _check_cost(row, spent, wanted)
        return Point(PROSE, capacity, spent, tuple(losses))

    def _as_shipped(self, capacity: float) -> Point:
        losses, spent = [], []
        for window in self._prose:
            losses.append(
                self._loss(window, self._scored(window, capacity)[0], Setting.SCORED, AsPlanned())
            )
            # What thresholds take is known where it is served.
            spent.append(measure(self.model, [window], capacity, Setting.SCORED).spent)
        return Point(PROSE, capacity, fmean(spent), tuple(losses))

    def _scored(self, window: Window, capacity: float) -> tuple[Under, float]:
        return laid_out(self.model, window, capacity, Setting.SCORED, AsPlanned())

    def _constants(self, choice: Choice, capacity: float) -> Sizes:
        texts = []
        for ids_T in self._learn_WT:
            window = Window(ids_T, len(ids_T), torch.empty(0))
            texts.append((ids_T[None], self._scored(window, capacity)[0]))
        return constants(self.model, choice, texts, ROUNDS if choice.by_nearness else 1)

    def _leaving(self, row: LeavingRow, text: str, on: Sequence[Window]) -> Point:
        plan = row.plan(len(self.model.shape.layers))
        with nullcontext() if row.repaired else self._unrepaired():
            return self._prompt_routed(text, None, on, lambda position: plan)

    def _ending(self, row: EndingRow, text: str, on: Sequence[Window], capacity: float) -> Point:
        point = self._prompt_routed(text, capacity, on, self._plan_at(row.tokens, capacity))
        as_shipped = self._placed(on[0], self._plan_at(None, capacity))
        _, wanted, _ = counted(self.model, on[0], as_shipped, AsPlanned())
        _check_cost(row, point.spent, wanted)
        return point

    def _plan_at(self, last_whole: int | None, capacity: float) -> Callable[[int], Plan]:
        """The plan of a prompt's tokens by position.

        Raises:
            CapacityError: what the others would have to ask for is out of the path's reach.
        """
        model, tokens = self.model, self.prompt_tokens
        if last_whole is None:
            sequence = model.sequence(asked_of(capacity, Setting.PROMPT), tokens, tokens)
            plans = [sequence.plan_at(position).plan for position in range(tokens - 1)]
            sequence.release()
            return lambda position: plans[position]
        context, dense = prompt_context(tokens), dense_plan(len(model.shape.layers))
        whole = model.shape.of_phase(Phase.PROMPT).planned_share(dense, context)
        if last_whole >= context:
            raise CapacityError(f"a prompt of {tokens} tokens has no {last_whole} last ones")
        others = others_share(capacity, whole, last_whole, context)
        every = replace(self._calibration, lowest=0.01)  # measured here, not promised
        schedule = every.schedule(others, Phase.PROMPT, model.shape, context)
        first = tokens - 1 - last_whole
        return lambda position: dense if position >= first else schedule.plan_at(position)

    def _placed(self, window: Window, plan_at: Callable[[int], Plan]) -> Placed:
        dense = dense_plan(len(self.model.shape.layers))
        first_output = window.first_output(Setting.PROMPT)
        prompt = [plan_at(position) for position in range(first_output)]
        return [
            *((rooted(plan) if at == 0 else plan, Phase.PROMPT) for at, plan in enumerate(prompt)),
            *[(dense, Phase.OUTPUT)] * (len(window.ids_T) - first_output),
        ]

    def _prompt_routed(
        self,
        text: str,
        capacity: float | None,
        on: Sequence[Window],
        plan_at: Callable[[int], Plan],
    ) -> Point:
        losses = []
        for window in on:
            placed = self._placed(window, plan_at)
            under, spent, _ = counted(self.model, window, placed, AsPlanned())
            losses.append(self._loss(window, under, Setting.PROMPT, AsPlanned()))
        return Point(text, capacity, spent, tuple(losses))

    @torch.inference_mode()
    def _loss(self, window: Window, under: Under, setting: Setting, picking: Picking) -> float:
        """The KL of a window's judged tokens, in nats per token."""
        logits_TV = run_picked(self.model, window.ids_T[None], under, picking)[0].float()
        at = window.compared(setting)
        return float(kl_per_token(window.teacher_TV[at], logits_TV[at], Divergence()).mean())

    @contextmanager
    def _unrepaired(self) -> Iterator[None]:
        """The model with the adapter, but for its repair, for a while."""
        model, own = self.model, self.adapter
        spec = replace(own.spec, lora_rank=0, lora_parts=(), lora_first=0)
        without = blank(spec, model.layout, own.base)
        without.calibration = own.calibration
        model.attach(without)
        try:
            yield
        finally:
            model.attach(own)


def _check_cost(row: Row, spent: float, wanted: float) -> None:
    if abs(spent - wanted) > EQUAL:
        raise RunError(
            f"{row.name}: spends {spent:.4f} of the block FLOPs, and the adapter {wanted:.4f}; "
            f"rows are compared where both are alike to {EQUAL:g}, so leave it out with --rows"
        )
