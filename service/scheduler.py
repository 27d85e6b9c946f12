"""Which jobs run, and which of their tokens run in the next step.

First come, first served. A waiting job starts when a place and enough blocks of the cache are
free; only a job whose prompt is being computed by another one of its group lets others pass. A
running job first gets its next token; then prompts get, in order, what is left of the step's
tokens, and while anything decodes no more than may delay it. Pure Python: no torch, no clock, no
thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from elastiformer.capacity import Capacity
from service.errors import QueueFull

# Stored prefixes come in runs of so many tokens, so a prompt is cut at multiples of it. Fewer
# tokens of a prompt than this never run beside decodes, however slow the machine is.
RUN_TOKENS = 32


def piece_tokens(max_step_tokens: int) -> int:
    """How many tokens of a long prompt go in one step where it has the step for itself."""
    return max_step_tokens // RUN_TOKENS * RUN_TOKENS or max_step_tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scheduler may hand out."""

    max_waiting: int
    max_running: int
    max_step_tokens: int  # in one step, over all jobs
    cache_blocks: int  # of keys and values, over all running jobs


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to compute: a prompt, tokens that are given, and tokens to generate.

    `given` tokens follow the prompt and are scored instead of drawn. `scored` asks for the
    log-probability of the prompt's own tokens too. `billed_tokens` is what this job adds to the
    request's prompt tokens: the choices of one prompt bill it once. `blocks` of the cache are
    reserved for it while it runs. A step ends at `cut` tokens of the prompt, where that is needed
    for storing them.
    """

    number: int  # its place in the request
    prompt: tuple[int, ...]
    capacity: Capacity
    most_new: int
    given: tuple[int, ...] = ()
    scored: bool = False
    billed_tokens: int = 0
    blocks: int = 0
    cut: int = 0
    item: object = None  # what an encoder reads, all of it in one step
    imaged: object = None  # the prompt with its pictures, where it holds any

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

    @property
    def storable_tokens(self) -> int:
        """How much of the prompt another job can take over: whole runs, never the last token."""
        return 0 if self.scored else (len(self.prompt) - 1) // RUN_TOKENS * RUN_TOKENS

    @property
    def shared_tokens(self) -> int:
        """How much of the prompt another job of the same prompt can take over: all but its end."""
        return 0 if self.scored else len(self.prompt) - 1

    @property
    def bills_prompt(self) -> bool:
        return self.billed_tokens >= len(self.prompt)


@dataclass(eq=False, slots=True)
class Group:
    """Jobs of one prompt: the first of them to run computes it for the others."""

    first: Entry | None = None

    @property
    def waits(self) -> bool:
        return self.first is not None and self.first.done < self.first.job.shared_tokens


@dataclass(eq=False, slots=True)
class Entry:
    """A job's place in the scheduler, and how far it has come."""

    job: Job
    group: Group | None = None
    tokens: list[int] = field(init=False)  # known and generated
    known_tokens: int = field(init=False)
    done: int = 0  # tokens whose keys and values are there: computed, or from stored prefixes
    cached: int = 0  # of these, from stored prefixes

    def __post_init__(self) -> None:
        self.tokens = list(self.job.known)
        self.known_tokens = len(self.tokens)

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens) - self.known_tokens

    @property
    def ready(self) -> int:
        """Tokens that could go through the model now."""
        return self.job.fed_tokens + self.generated_tokens - self.done

    def chunk(self, most: int) -> int:
        """How many tokens go next, of `most`: all that are ready, or up to the end of a run."""
        count = self.ready
        if self.job.item is not None:
            return count if count <= most else 0
        if count > most:
            count = max(most - (self.done + most) % RUN_TOKENS, 0)
        if self.done < self.job.cut < self.done + count:
            count = self.job.cut - self.done
        return count


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
        self.reserved_blocks = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, entries: Iterable[Entry]) -> None:
        """Let a request's jobs wait: all of them, or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        new = list(entries)
        assert all(entry.job.blocks <= self.limits.cache_blocks for entry in new), "it never fits"
        if len(self.waiting) + len(new) > self.limits.max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} sequences wait already, and at most "
                f"{self.limits.max_waiting} may: there is no room for {len(new)} more"
            )
        self.waiting.extend(new)

    def admit(self) -> list[Entry]:
        """Move from waiting to running whatever fits, in order; nobody is overtaken for his size.

        A job whose prompt is being computed by another one waits for that, and others pass it.
        """
        admitted: list[Entry] = []
        held: list[Entry] = []
        while self.waiting and len(self.running) < self.limits.max_running:
            entry = self.waiting[0]
            group = entry.group
            if group is not None and group.waits:
                held.append(self.waiting.popleft())
                continue
            if self.reserved_blocks + entry.job.blocks > self.limits.cache_blocks:
                break
            self.reserved_blocks += entry.job.blocks
            admitted.append(self.waiting.popleft())
            self.running.append(entry)
            if group is not None and group.first is None:
                group.first = entry
        self.waiting.extendleft(reversed(held))
        return admitted

    def shares(self, most_beside_decodes: int) -> list[Share]:
        """The next step: one token for each job that decodes, then prompts up to the budget.

        Args:
            most_beside_decodes: prompt tokens that may run in a step that decodes as well; a run
                of them always may.
        """
        left = self.limits.max_step_tokens
        decoding = [entry for entry in self.running if entry.ready == 1]
        shares = [Share(entry, 1) for entry in decoding[:left]]
        left -= len(shares)
        if shares:
            left = min(left, max(most_beside_decodes, RUN_TOKENS))
        prompts: list[Share] = []
        for entry in self.running:
            if entry.ready > 1 and left:
                # Whoever is first goes on even where the budget ends within a run.
                most = left if entry.job.item is None else entry.ready
                count = entry.chunk(left) or (0 if prompts else most)
                if count:
                    prompts.append(Share(entry, count))
                    left = max(left - count, 0)
        return shares + prompts

    def remove(self, entry: Entry) -> None:
        """Forget a job, wherever it stands."""
        if entry in self.running:
            self.running.remove(entry)
            self.reserved_blocks -= entry.job.blocks
            group = entry.group
            if group is not None and group.first is entry and group.waits:
                group.first = None  # it goes unfinished: the next one computes the prompt
        elif entry in self.waiting:
            self.waiting.remove(entry)
