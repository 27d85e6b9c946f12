"""One request inside the sparse form: its plans, its cache, its debts, what it has spent.

A causal model's request is a `Sequence`; an encoder's is a `WholeSequence`, which runs in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from elastiformer.cache import SequenceCache
from elastiformer.capacity import Phase, Unit
from elastiformer.priced import PricedPlan
from elastiformer.routers import Debt
from elastiformer.stretches import Plans, Stretch
from elastiformer.usage import Usage


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides how a row is computed, beside its router's scores."""

    plan: PricedPlan
    phase: Phase

    @property
    def is_dense(self) -> bool:
        return self.plan.is_dense

    @property
    def tail(self) -> int:
        """The layer from which on, if all of an item is so, its class tokens go on alone.

        The number of layers: in none. Class tokens are those of phase output.
        """
        first = self.plan.direct_from
        if self.phase is Phase.OUTPUT or first == len(self.plan.plan):
            return first
        return max(first, self.plan.left_from)


@dataclass(frozen=True, slots=True, eq=False)
class ItemKinds:
    """What each token of an item runs under; items that are planned alike share one."""

    each: tuple[Kind, ...]
    distinct: tuple[Kind, ...]
    number_T: np.ndarray  # of each token among them
    tail: int  # the layer from which on its class tokens go on alone

    @classmethod
    def of(cls, each: Iterable[Kind]) -> ItemKinds:
        each = tuple(each)
        number: dict[Kind, int] = {}
        numbers = [number.setdefault(kind, len(number)) for kind in each]
        distinct = tuple(number)
        return cls(each, distinct, np.array(numbers), max(kind.tail for kind in distinct))


class Numbering:
    """The kinds that one step has met, in the order of their first rows."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []
        self._number: dict[tuple[int, Phase], int] = {}
        self._whole: dict[ItemKinds, np.ndarray] = {}

    def of(self, plan: PricedPlan, phase: Phase) -> int:
        key = (id(plan), phase)
        if key not in self._number:
            self._number[key] = len(self.kinds)
            self.kinds.append(Kind(plan, phase))
        return self._number[key]

    def of_stretch(self, stretch: Stretch, first: int, stop: int) -> int | np.ndarray:
        """Of a stretch's positions from `first` to before `stop`; one number where they agree."""
        plans, phase = stretch.plans, stretch.phase
        if plans.fuller is plans.leaner:
            return self.of(plans.fuller, phase)
        is_fuller_N = plans.fuller_N(first, stop)
        starts_fuller = bool(is_fuller_N[0])
        number = self.of(plans.fuller if starts_fuller else plans.leaner, phase)
        others_N = is_fuller_N != starts_fuller
        if not others_N.any():
            return number
        other = self.of(plans.leaner if starts_fuller else plans.fuller, phase)
        return np.where(others_N, other, number)

    def of_whole(self, kinds: ItemKinds) -> np.ndarray:
        """Of an item's tokens."""
        if kinds not in self._whole:
            numbers = np.array([self.of(kind.plan, kind.phase) for kind in kinds.distinct])
            self._whole[kinds] = numbers[kinds.number_T]
        return self._whole[kinds]


DebtKey = tuple[int, Unit, Phase]  # of a layer


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The next tokens of one sequence: a part of its prompt, or one generated token."""

    sequence: Sequence
    ids: list[int]


class Sequence:
    """A request's state between steps. Made by `ElasticModel.sequence`.

    The last prompt token, and all after it, are of phase output; of a scored sequence all are.
    """

    def __init__(
        self,
        plan_at: Callable[[Phase, int], PricedPlan],
        prompt_tokens: int,
        most_tokens: int,
        scored: bool,
        cache: SequenceCache | None,
    ) -> None:
        self._plan_at = plan_at
        self.prompt_tokens, self.most_tokens, self.scored = prompt_tokens, most_tokens, scored
        self._cache = cache
        self.prompt: tuple[int, ...] | None = None  # where its beginning may be stored
        self.length = 0
        self.cached_tokens = 0  # of the prompt, that came from the store of prefixes
        self.shares_prompt = False  # with others to come: then all but its last token is stored
        self.stored = 0  # prompt tokens that the store of prefixes has seen
        self.usage = Usage()
        self._debts: dict[DebtKey, Debt] = {}
        # Channels its outputs took beyond what was granted, [layers, sites]; None: none yet.
        self.channel_debts: np.ndarray | None = None
        self.on_release: Callable[[], None] | None = None  # for whoever keeps account of it

    @property
    def cache(self) -> SequenceCache:
        assert self._cache is not None, "a sequence of which no keys are kept"
        return self._cache

    def phase_at(self, position: int) -> Phase:
        if self.scored or position >= self.prompt_tokens - 1:
            return Phase.OUTPUT
        return Phase.PROMPT

    def plan_at(self, position: int) -> PricedPlan:
        """The plan of this position."""
        return self._plan_at(self.phase_at(position), position)

    def run_at(self, position: int) -> PricedPlan:
        """What this position runs under: its plan, but position 0 skips no sub-layer."""
        plan = self.plan_at(position)
        return plan.rooted if position == 0 else plan

    def number(self, numbering: Numbering) -> int:
        """Which kind the next token is of."""
        phase = self.phase_at(self.length)
        plan = self._plan_at(phase, self.length)
        return numbering.of(plan if self.length else plan.rooted, phase)

    def numbers(self, tokens: int, numbering: Numbering) -> list[int] | np.ndarray:
        """Which kinds the next tokens are of."""
        first, stop, plan_at = self.length, self.length + tokens, self._plan_at
        if not isinstance(plan_at, Plans):
            return [
                numbering.of(self.run_at(position), self.phase_at(position))
                for position in range(first, stop)
            ]
        number_N, at = np.empty(tokens, dtype=np.int64), first
        if at == 0:  # it alone is rooted
            number_N[0], at = self.number(numbering), 1
        while at < stop:
            phase = self.phase_at(at)
            stretch = plan_at.stretch(phase, at)
            of_phase = self.prompt_tokens - 1 if phase is Phase.PROMPT else stop
            end = min(stretch.stop, of_phase, stop)
            number_N[at - first : end - first] = numbering.of_stretch(stretch, at, end)
            at = end
        return number_N

    @property
    def moved(self) -> bool:
        """Whether its tokens stand elsewhere than their places in the cache say."""
        return False

    def original(self, place: int) -> int:
        """The position of a token in what the caller sent; `place` counts the tokens that run."""
        return place

    def dense_extent(self, tokens: int) -> tuple[int, int]:
        """What the dense model runs for the next `tokens`: tokens, and the keys they attend to."""
        return tokens, self.length + tokens

    def debt(self, layer: int, unit: Unit, phase: Phase) -> Debt:
        key = (layer, unit, phase)
        if key not in self._debts:
            self._debts[key] = Debt()
        return self._debts[key]

    @property
    def has_debts(self) -> bool:
        """Whether a router has decided about its prompt tokens."""
        return any(phase is Phase.PROMPT for _, _, phase in self._debts)

    def debts(self) -> dict[DebtKey, tuple[float, int]]:
        """How the debts of its prompt tokens stand now."""
        return {
            key: (debt.owed, debt.seen)
            for key, debt in self._debts.items()
            if key[2] is Phase.PROMPT
        }

    def resume(self, length: int, debts: Mapping[DebtKey, tuple[float, int]]) -> None:
        """Go on after `length` tokens that somebody else has computed alike."""
        self.length = self.cached_tokens = length
        self._debts = {key: Debt(owed, seen) for key, (owed, seen) in debts.items()}

    @property
    def cache_bytes(self) -> int:
        return self.cache.bytes

    def release(self) -> None:
        """Free the cache. The sequence must not be used after it."""
        if self._cache is not None:
            self._cache.release()
        if self.on_release is not None:
            self.on_release()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One text or image as an encoder reads it.

    `ids` are a text's tokens; an image's are the numbers of its class tokens and patches. `types`
    tell the two texts of a pair apart.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None
    pixels_CHW: Tensor | None = None


class WholeSequence(Sequence):
    """An item on its way through an encoder: one step, and nothing is kept of it.

    Every token's kind is known beforehand; those of phase output stand in front.
    """

    def __init__(self, kinds: ItemKinds, item: Item) -> None:
        tokens, each = len(item.ids), kinds.each
        assert len(each) == tokens, f"{len(each)} kinds of {tokens} tokens"
        scored = all(kind.phase is Phase.OUTPUT for kind in kinds.distinct)
        super().__init__(lambda _, position: each[position].plan, tokens, tokens, scored, None)
        self.item, self.kinds = item, kinds

    def phase_at(self, position: int) -> Phase:
        return self.kinds.each[position].phase

    def numbers(self, tokens: int, numbering: Numbering) -> np.ndarray:
        return numbering.of_whole(self.kinds)
