"""How a prompt ends: what follows reads its last tokens most, so they run whole.

The tokens before make up for it, so those that run must: where a prompt goes on from a stored
beginning, which costs it nothing and so pays for nothing, fewer of its last tokens run whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from elastiformer.accounting import ModelShape
from elastiformer.calibration import Calibration
from elastiformer.capacity import Phase, dense_plan
from elastiformer.errors import CapacityError
from elastiformer.priced import PricedPlan

_TOKENS, _PART = 8, 16  # so many, but no more than one of so many,
_PRICE = 0.011  # nor more than take so much from the capacity of the others
_EXCESS = 0.01  # what follows a stored beginning may spend so much more than was asked

PlanAt = Callable[[Phase, int], PricedPlan]


class Ending(NamedTuple):
    """The last tokens of a prompt, which run whole, and what the others then ask for."""

    tokens: int
    others: float
    most: float = 0.0  # of a prompt's tokens that run, if it goes on from a stored beginning

    def of(self, running: int) -> int:
        """How many run whole where no more than the last `running` tokens of the prompt run."""
        return min(self.tokens, math.floor(running * self.most))


@dataclass(frozen=True, slots=True, eq=False)
class EndingPlans:
    """The plans of one text, by how much of its prompt is stored.

    A sequence that goes on from a stored beginning decides about its own last tokens; nothing in
    front of them hangs on that, so what is stored of it serves others as before.
    """

    before: PlanAt  # of what does not end a prompt
    whole: PricedPlan
    prompt_tokens: int
    ending: Ending

    def last_whole(self, stored: int) -> int:
        """How many of the prompt's last tokens run whole after so many that are stored."""
        if stored == 0:
            return self.ending.tokens
        # The very last token is of phase output.
        return self.ending.of(self.prompt_tokens - 1 - stored)

    def at(self, last_whole: int) -> PlanAt:
        """The plan of each token, by phase and position, where so many run whole."""
        if last_whole == 0:
            return self.before
        first = self.prompt_tokens - 1 - last_whole

        def plan_at(phase: Phase, position: int) -> PricedPlan:
            if phase is Phase.PROMPT and position >= first:
                return self.whole
            return self.before(phase, position)

        return plan_at

    def after(self, stored: tuple[PricedPlan, ...] = ()) -> PlanAt:
        """The plan of each token where the first ones are stored, computed under these."""
        rest = self.at(self.last_whole(len(stored)))
        if not stored or self.ending.tokens == 0:
            return rest

        def plan_at(phase: Phase, position: int) -> PricedPlan:
            return stored[position] if position < len(stored) else rest(phase, position)

        return plan_at


def prompt_ending(
    calibration: Calibration, shape: ModelShape, share: float, context: int
) -> Ending:
    """How a prompt of about `context` tokens ends: with fewer where the others cannot pay."""
    lowest, dense = calibration.lowest, dense_plan(len(shape.layers))
    whole = shape.of_phase(Phase.PROMPT).planned_share(dense, context)
    if not lowest < share < whole:
        return Ending(0, share)
    price = min(_PRICE, share - lowest)
    payable = math.floor(price / (whole - share + price) * context)
    tokens = min(_TOKENS, context // _PART, payable)
    others = others_share(share, whole, tokens, context)
    try:
        calibration.schedule(others, Phase.PROMPT, shape, context)
    except CapacityError:  # out of the path's reach at this length
        return Ending(0, share)
    return Ending(tokens, others, (share + _EXCESS - others) / (whole - others))


def others_share(share: float, whole: float, tokens: int, context: int) -> float:
    """What the others of a prompt ask for, where so many tokens of it spend `whole` each."""
    return share - (whole - share) * tokens / (context - tokens)
