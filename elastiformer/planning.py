"""From a request's capacity to the plan of each of its tokens, and to the room its cache needs.

Shape letters: L layers
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter
from elastiformer.calibration import (
    Calibration,
    Schedule,
    output_block_end,
    output_context,
)
from elastiformer.capacity import (
    Capacity,
    Phase,
    Plan,
    Share,
    Unit,
    UnitShares,
    dense_plan,
)
from elastiformer.errors import CapacityError
from elastiformer.priced import PricedPlan, Pricing
from elastiformer.routers import TOKEN_UNITS, most_kept
from elastiformer.sequence import ItemKinds, Kind
from elastiformer.stretches import Plans, PricedSchedule, Stretch

_REMEMBERED = 4096
_STEPS_PER_OCTAVE = 8
# A text that is scored is run in pieces of so many tokens, if nobody says otherwise: a token
# attends to the keys of its own piece and of those before. Smaller pieces have fewer.
PIECE_TOKENS = 512
# What follows a prompt reads its last tokens most: they run whole, and those before make up for it.
_END_TOKENS, _END_PART = 8, 16  # so many, but no more than one of so many,
_END_PRICE = 0.011  # nor more than take so much from the capacity of the others
_EXCESS = 0.015  # of the capacity, where most of a prompt is stored
# An answer hangs on its first tokens most: they run whole where a prompt's image tokens make up for
# half of it beforehand, and for the other half nobody does: so much of the capacity at most.
_OPENING_TOKENS, _OPENING_PRICE = 8, 0.011

PlanAt = Callable[[Phase, int], PricedPlan]


class Division(NamedTuple):
    """How a prompt is divided, where some of its tokens make up for others."""

    others: Share  # what most of its tokens ask for
    ending: int = 0  # the last ones of phase prompt, which run whole
    last: float = 0.0  # what its very last token, which runs whole, spends beyond its own share


class Opening(NamedTuple):
    """The first tokens of phase output, which run whole, and what is paid for them beforehand."""

    tokens: int
    paid: float  # in tokens that run whole


class Planner:
    """Plans for one model and its adapter."""

    def __init__(
        self, shape: ModelShape, adapter: Adapter | None, piece_tokens: int = PIECE_TOKENS
    ) -> None:
        """
        Args:
            piece_tokens: of scored texts.
        """
        self.shape, self._piece_tokens = shape, piece_tokens
        self._with_keys = replace(shape, absorbing=frozenset())
        self.units = adapter.units if adapter is not None else ()
        self.calibration: Calibration | None = adapter.calibration if adapter is not None else None
        self.pricing = {phase: Pricing(shape.of_phase(phase)) for phase in Phase}
        self._schedule = lru_cache(maxsize=_REMEMBERED)(self._make_schedule)
        self._priced = lru_cache(maxsize=_REMEMBERED)(self._price)
        self._division = lru_cache(maxsize=_REMEMBERED)(self._make_division)
        self.rooms = lru_cache(maxsize=_REMEMBERED)(self._rooms)
        self.others_of_item = lru_cache(maxsize=_REMEMBERED)(self._others_of_item)

    def check(self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool) -> None:
        """Refuse what no plan can give.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
        """
        context = prompt_context(prompt_tokens)
        if not scored:
            self._check(capacity.prompt, Phase.PROMPT, context, self._absorbs(capacity))
        contexts = [context, output_context(most_tokens - 1)]
        if scored:
            contexts.append(prompt_context(min(self._piece_tokens, prompt_tokens)))
        for keys in contexts:
            self._check(capacity.output, Phase.OUTPUT, keys)

    def plan_at(self, capacity: Capacity, prompt_tokens: int, scored: bool = False) -> Plans:
        """The plan of each token of a text that is read onwards, by phase and position.

        The last tokens of a prompt run whole, as far as the others can make up for it. Where a
        number says what outputs spend, so does the very last one, of phase output: an answer hangs
        on it most, and beside whole rows its choice of channels would save no time.
        """
        if scored:
            return self._plan_at(capacity, prompt_tokens)
        division = self._division(capacity, prompt_context(prompt_tokens))
        before = self._plan_at(replace(capacity, prompt=division.others), prompt_tokens)
        whole = {phase: PricedSchedule.of_one(self.pricing[phase].dense) for phase in Phase}
        first = prompt_tokens - 1 - division.ending

        def find(phase: Phase, position: int) -> Stretch:
            if phase is Phase.PROMPT and position >= first:
                return Stretch(whole[phase], phase, position)
            if phase is Phase.OUTPUT and position < prompt_tokens and division.last:
                return Stretch(whole[phase], phase, position, prompt_tokens)
            stretch = before.stretch(phase, position)
            return stretch.until(first) if phase is Phase.PROMPT else stretch

        return Plans(find)

    def most_stored(self, capacity: Capacity, prompt_tokens: int, most_tokens: int) -> int:
        """How many of a prompt's tokens may come from a store, if not all that are prompt.

        A prompt's last tokens run whole, and those before make up for it, if they run: what is
        stored costs nothing and so pays for nothing. So many must run, and as many tokens follow
        as may, that no more than `_EXCESS` is spent beyond what was asked.
        """
        share, most = capacity.prompt, prompt_tokens - 1
        context = prompt_context(prompt_tokens)
        division, dense = self._division(capacity, context), dense_plan(len(self.shape.layers))
        if isinstance(share, UnitShares) or isinstance(division.others, UnitShares):
            return most
        spared = share - division.others  # by each of the others
        if not spared:
            return most
        whole = self.shape.of_phase(Phase.PROMPT).planned_share(dense, context)
        owed = division.ending * (whole - share + spared) + division.last
        owed -= _EXCESS * (most_tokens - prompt_tokens)
        return max(0, most - max(division.ending, math.ceil(owed / (_EXCESS + spared))))

    def _plan_at(
        self, capacity: Capacity, prompt_tokens: int, piece_tokens: int | None = None
    ) -> Plans:
        """The same without that: what all tokens of a phase do alike."""
        piece_tokens = piece_tokens or self._piece_tokens
        context_of_prompt = prompt_context(prompt_tokens)
        uniform = {
            phase: None if plan is None else PricedSchedule.of_one(plan)
            for phase in Phase
            for plan in (self._uniform(capacity.of(phase), phase),)
        }

        def find(phase: Phase, position: int) -> Stretch:
            share = capacity.of(phase)
            if (plans := uniform[phase]) is not None:
                return Stretch(plans, phase, position)
            assert not isinstance(share, UnitShares), "keep shares are the same for all tokens"
            if position >= prompt_tokens:
                context, stop = output_context(position), output_block_end(position)
            elif phase is Phase.PROMPT:
                # Each of its tokens owes all of its keys.
                context, stop = context_of_prompt, prompt_tokens
            else:
                piece_end = (position // piece_tokens + 1) * piece_tokens
                stop = min(piece_end, prompt_tokens)
                context = prompt_context(stop)
            return Stretch(self._priced(share, phase, context), phase, position, stop)

        return Plans(find)

    def _uniform(self, share: Share, phase: Phase) -> PricedPlan | None:
        """The plan of all tokens of a phase, where they have one and the same."""
        if share == 1.0:
            return self.pricing[phase].dense
        if isinstance(share, UnitShares):
            return self.pricing[phase].of((share.layer_plan(),) * len(self.shape.layers))
        return None

    def of_whole(self, capacity: Capacity, tokens: int, outputs: int | None) -> ItemKinds:
        """The kinds of a whole item's tokens, of which the first `outputs` are read; None: all."""
        plan_at: PlanAt = self._plan_at(capacity, tokens, piece_tokens=tokens)
        if outputs is not None and self._absorbs(capacity):
            plan_at = self._plan_of_item(capacity.prompt, tokens)
        read = tokens if outputs is None else outputs
        phases = [Phase.OUTPUT if place < read else Phase.PROMPT for place in range(tokens)]
        plans = [plan_at(phase, place) for place, phase in enumerate(phases)]
        # As in every sequence, the first token skips no sub-layer.
        return ItemKinds.of(map(Kind, (plans[0].rooted, *plans[1:]), phases))

    def _absorbs(self, capacity: Capacity) -> bool:
        """Whether class tokens can do without keys where only they ask: those that run whole."""
        output = capacity.output
        whole = output.is_dense if isinstance(output, UnitShares) else output == 1.0
        return whole and bool(self.shape.absorbing)

    def _plan_of_item(self, share: Share, tokens: int) -> PlanAt:
        """The plans of an item whose class tokens run whole; the others say where keys are made."""
        schedule = self._schedule_of_item(share, tokens)
        fuller, leaner = (
            self.pricing[Phase.PROMPT].of(plan, schedule.direct)
            for plan in (schedule.fuller, schedule.leaner)
        )
        others = PricedSchedule(schedule, fuller, leaner)
        read = self.pricing[Phase.OUTPUT].of(dense_plan(len(self.shape.layers)), schedule.direct)
        return lambda phase, position: read if phase is Phase.OUTPUT else others.at(position)

    def _schedule_of_item(self, share: Share, tokens: int) -> Schedule:
        if isinstance(share, float) and share < 1.0:
            return self._schedule(share, Phase.PROMPT, prompt_context(tokens), True)
        layers = len(self.shape.layers)
        plan = (
            (share.layer_plan(),) * layers
            if isinstance(share, UnitShares)
            else (dense_plan(layers))
        )
        return Schedule(plan, plan, 1.0, 1.0, 1.0, self.shape.direct(plan))

    def _others_of_item(self, share: float, tokens: int, outputs: int) -> float:
        """What the others of an item ask for, where its class tokens run whole.

        The fewer keys are made, the more do class tokens spend on reading without them.
        """
        assert self.calibration is not None, "a capacity below 1"
        lowest = self.calibration.lowest
        others, context = tokens - outputs, prompt_context(tokens)
        asked = (share * tokens - outputs) / others
        shape, dense = self.shape.of_phase(Phase.OUTPUT), dense_plan(len(self.shape.layers))
        while self.shape.absorbing:
            direct = self._schedule_of_item(max(asked, lowest), tokens).direct
            spent = outputs * shape.planned_share(dense, context, direct)
            less = (share * tokens - spent) / others
            if less >= asked:
                break
            asked = less
        return max(asked, lowest)

    def plans(self, capacity: Capacity, context: int) -> tuple[Plan, Plan]:
        """The (prompt plan, output plan) nearest to a capacity, for tokens over `context` keys."""
        found: list[Plan] = []
        for phase in Phase:
            share = capacity.of(phase)
            self._check(share, phase, context)
            if share == 1.0:
                found.append(dense_plan(len(self.shape.layers)))
            elif isinstance(share, UnitShares):
                found.append((share.layer_plan(),) * len(self.shape.layers))
            else:
                found.append(self._schedule(share, phase, context).nearest)
        return found[0], found[1]

    def routes_prompt(self, capacity: Capacity, prompt_tokens: int) -> bool:
        """Whether what a prompt token leaves behind depends on decisions about those before it.

        Then a beginning of the prompt can be stored only where a step ends.
        """
        plan_at = self.plan_at(capacity, prompt_tokens)
        plans = {plan_at(Phase.PROMPT, position) for position in range(1, prompt_tokens)}
        kept = self.shape.kv == "kept"
        return any(
            0 < layer.attention_tokens < 1
            or 0 < layer.mlp_tokens < 1
            or (kept and layer.attention_tokens < 1)
            for plan in plans
            for layer in plan.plan
        )

    def _rooms(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool
    ) -> tuple[int, ...]:
        """The most tokens that each layer of a request's cache can come to hold: [L]."""
        layers = len(self.shape.layers)
        if self.shape.kv == "complete":
            return (most_tokens,) * layers
        plan_at = self.plan_at(capacity, prompt_tokens, scored)
        prompts = 0 if scored else prompt_tokens - 1
        rooms = [1] * layers  # position 0 is kept everywhere
        for phase, positions in (
            (Phase.PROMPT, range(1, prompts)),
            (Phase.OUTPUT, range(max(prompts, 1), most_tokens)),
        ):
            under = Counter(plan_at(phase, position) for position in positions)
            for layer in range(layers):
                shares = {plan: plan.plan[layer].attention_tokens for plan in under}
                rooms[layer] += most_kept([(shares[plan], n) for plan, n in under.items()])
        return tuple(rooms)

    def _make_schedule(
        self, share: float, phase: Phase, context: int, absorbs: bool = False
    ) -> Schedule:
        assert self.calibration is not None
        shape = self.shape if absorbs else self._with_keys
        # Some tokens of a text ask for less than their request, which `_check` looks at.
        return self.calibration.schedule(share, phase, shape, context, promised=absorbs)

    def _make_division(self, capacity: Capacity, context: int) -> Division:
        share, output = capacity.prompt, capacity.output
        last = 0.0 if isinstance(output, UnitShares) else 1 - output
        if self.calibration is None or isinstance(share, UnitShares) or share == 1.0:
            return Division(share, last=last)
        return divide(self.calibration, self.shape, share, last, context)

    def _price(self, share: float, phase: Phase, context: int) -> PricedSchedule:
        schedule, pricing = self._schedule(share, phase, context), self.pricing[phase]
        fuller, leaner = pricing.of(schedule.fuller), pricing.of(schedule.leaner)
        return PricedSchedule(schedule, fuller, leaner)

    def _check(self, share: Share, phase: Phase, context: int, absorbs: bool = False) -> None:
        """Refuse a share that this model cannot run."""
        if isinstance(share, UnitShares):
            # Token units without a router are spread evenly over the tokens.
            lacking = [
                name
                for name in share.named
                if name not in self.units and name not in (*TOKEN_UNITS, Unit.CHANNELS)
            ]
            if lacking:
                raise CapacityError(
                    f"capacity: this model's adapter has no routers for {', '.join(lacking)}; "
                    f"it has {', '.join(self.units) or 'none'}"
                )
        elif share < 1.0:
            if self.calibration is None:
                raise CapacityError(
                    f"capacity {share:g}: this model has no calibration, so only 1.0 can be asked"
                )
            self.calibration.refuse_below(share)
            self._schedule(share, phase, context, absorbs)


def divide(
    calibration: Calibration, shape: ModelShape, share: float, last: float, context: int
) -> Division:
    """How a prompt of about `context` tokens is divided: others pay for what they can.

    Args:
        share: asked of the prompt.
        last: what its very last token spends beyond its own.
    """
    dense = dense_plan(len(shape.layers))
    whole = shape.of_phase(Phase.PROMPT).planned_share(dense, context)
    if share >= whole:
        return Division(share, last=last)
    # Of a short prompt one token is no small part: for that nobody pays more than one price.
    left = share - min(_END_PRICE, last / context)
    payable = math.floor(_END_PRICE / (whole - left + _END_PRICE) * context)
    ending = min(_END_TOKENS, context // _END_PART, payable)
    others = others_share(left, whole, ending, context)
    try:
        calibration.schedule(others, Phase.PROMPT, shape, context, promised=False)
    except CapacityError:  # out of the path's reach at this length
        return Division(share, last=last)
    return Division(others, ending, last)


def answer_opening(share: float, sent: int) -> Opening:
    """How an answer begins where prompt and answer are asked for one share.

    However soon the answer ends, what was spent by then is near to what was asked.
    """
    tokens = min(_OPENING_TOKENS, math.floor(2 * _OPENING_PRICE * sent / (1 - share)))
    return Opening(tokens, tokens * (1 - share) / 2)


def opened(plans: Plans, whole: PricedPlan, first: int) -> Plans:
    """The same plans, but for tokens of phase output before the position `first`: the whole one."""
    opening = PricedSchedule.of_one(whole)

    def find(phase: Phase, position: int) -> Stretch:
        if phase is Phase.OUTPUT and position < first:
            return Stretch(opening, phase, position, first)
        return plans.stretch(phase, position)

    return Plans(find)


def others_share(share: float, whole: float, tokens: int, context: int) -> float:
    """What the others of a prompt ask for, where so many tokens of it spend `whole` each."""
    return share - (whole - share) * tokens / (context - tokens)


def prompt_context(tokens: int) -> int:
    """The keys that stand for a prompt's own in its schedule: rounded, eight steps an octave.

    So prompts of similar lengths run under the same plans, and one can go on from what is stored
    of another. What that does to the spent share is a small part of the attention scores.
    """
    step = 1 << max(0, math.floor(math.log2(max(tokens, 1))) - int(math.log2(_STEPS_PER_OCTAVE)))
    return max(1, round(tokens / step) * step)
