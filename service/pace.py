"""How long a step will take, learned from the steps before it. Pure Python.

A step costs what its decodes cost, and so much for each prompt token beside them. Both change
with the load, with the capacities and with the length of what is attended to, so the latest steps
count most.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.scheduler import Share

KEPT = 0.5  # weight of all earlier steps beside a new one


class Pace:
    """A running estimate of seconds per step of decodes, and of seconds per prompt token."""

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        # Weighted sums, so that a long chunk tells more than a short one.
        self._prompt_seconds = 0.0
        self._prompt_tokens = 0.0

    @property
    def decode_seconds(self) -> float:
        """Of a step that only decodes; 0 before the first one."""
        return self._decode_seconds or 0.0

    @property
    def seconds_per_prompt_token(self) -> float | None:
        return self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else None

    def learn(self, seconds: float, shares: Iterable[Share]) -> None:
        """Take in what one step did and how long that took."""
        counts = [share.count for share in shares]
        prompt_tokens = sum(count for count in counts if count > 1)
        if prompt_tokens == 0:
            before = seconds if self._decode_seconds is None else self._decode_seconds
            self._decode_seconds = KEPT * before + (1 - KEPT) * seconds
            return
        spent = max(seconds - self.decode_seconds, 0.0) if 1 in counts else seconds
        self._prompt_seconds = KEPT * self._prompt_seconds + spent
        self._prompt_tokens = KEPT * self._prompt_tokens + prompt_tokens

    def prompt_tokens(self, step_seconds: float) -> int:
        """How many of them a step of this length has time for, decodes included.

        0 before any ran: then a step takes the fewest it may.
        """
        each = self.seconds_per_prompt_token
        if each is None:
            return 0
        room = max(step_seconds - self.decode_seconds, 0.0)
        return int(min(room / max(each, 1e-9), 1e9))
