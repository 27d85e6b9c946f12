"""Which jobs run, and which of their tokens run in the next step.

First come, first served. A waiting job starts when a place and enough of the cache are free; a
running one first gets its next token, then what is left of the step's token budget goes to
prompts, in order. Pure Python: no torch, no clock, no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from elastiformer.capacity import Capacity
from service.errors import QueueFull


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scheduler may hand out."""

    max_waiting: int
    max_running: int
    max_step_tokens: int  # in one step, over all jobs
    cache_tokens: int  # of keys and values, over all running jobs


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to compute: a prompt, tokens that are given, and tokens to generate.

    `given` tokens follow the prompt and are scored instead of drawn. `scored` asks for the
    log-probability of the prompt's own tokens too. `billed_tokens` is what this job adds to the
    request's prompt tokens: the choices of one prompt bill it once.
    """

    number: int  # its place in the request
    prompt: tuple[int, ...]
    capacity: Capacity
    most_new: int
    given: tuple[int, ...] = ()
    scored: bool = False
    billed_tokens: int = 0

    @property
    def known(self) -> tuple[int, ...]:
        return self.prompt + self.given

    @property
    def fed_tokens(self) -> int:
        """Tokens that go through the model before any is generated.

        The last given token is only scored, never continued.
        """
        return len(self.prompt) + max(len(self.given) - 1, 0)

    @property
    def most_tokens(self) -> int:
        return self.fed_tokens + self.most_new


@dataclass(eq=False, slots=True)
class Entry:
    """A job's place in the scheduler, and how far it has come."""

    job: Job
    tokens: list[int] = field(init=False)  # known and generated
    done: int = 0  # tokens that went through the model

    def __post_init__(self) -> None:
        self.tokens = list(self.job.known)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.job.known) :]

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens) - len(self.job.known)

    @property
    def ready(self) -> int:
        """Tokens that could go through the model now."""
        return self.job.fed_tokens + self.generated_tokens - self.done


@dataclass(frozen=True, slots=True)
class Share:
    """What one job gets of one step: its next `count` tokens."""

    entry: Entry
    count: int

    @property
    def ids(self) -> list[int]:
        return self.entry.tokens[self.entry.done : self.entry.done + self.count]


class Scheduler:
    """A queue of waiting jobs, and the jobs that run."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Entry] = deque()
        self.running: list[Entry] = []
        self.reserved_tokens = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, entries: Iterable[Entry]) -> None:
        """Let a request's jobs wait: all of them, or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        new = list(entries)
        if len(self.waiting) + len(new) > self.limits.max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} sequences wait already, and at most "
                f"{self.limits.max_waiting} may: there is no room for {len(new)} more"
            )
        self.waiting.extend(new)

    def admit(self) -> list[Entry]:
        """Move from waiting to running whatever fits, in order; nobody overtakes."""
        admitted: list[Entry] = []
        while self.waiting and len(self.running) < self.limits.max_running:
            needed = self.waiting[0].job.most_tokens
            if self.reserved_tokens + needed > self.limits.cache_tokens:
                break
            self.reserved_tokens += needed
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def shares(self) -> list[Share]:
        """The next step: one token for each job that generates, then prompts up to the budget."""
        left = self.limits.max_step_tokens
        decoding = [entry for entry in self.running if entry.ready == 1]
        shares = [Share(entry, 1) for entry in decoding[:left]]
        left -= len(shares)
        for entry in self.running:
            if left and entry.ready > 1:
                count = min(entry.ready, left)
                shares.append(Share(entry, count))
                left -= count
        return shares

    def remove(self, entry: Entry) -> None:
        """Forget a job, wherever it stands."""
        if entry in self.running:
            self.running.remove(entry)
            self.reserved_tokens -= entry.job.most_tokens
        elif entry in self.waiting:
            self.waiting.remove(entry)
