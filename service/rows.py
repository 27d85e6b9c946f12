"""What the engine keeps of a request: how far it has come, and of each running sequence what its
tokens pass through on their way to text. Only the engine writes to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from elastiformer import Sequence
from elastiformer.inputs import Detokenizer, StopMatcher
from elastiformer.sampling import Draw, Sampled, Seen
from elastiformer.usage import Usage
from service.energy import Bill
from service.orders import Generated, Order, Summary, Ticket
from service.scheduler import Entry, Group, Job

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

WORTH_WAITING = 8  # tokens of a prompt; fewer are computed again sooner than waited for


@dataclass(eq=False, slots=True)
class Request:
    """An order inside the engine."""

    order: Order
    ticket: Ticket
    submitted: float
    deadline: float
    between_tokens: Histogram  # of this request's labels: looked up once, not for each token
    entries: tuple[Entry, ...]
    fetch_seconds: float = 0.0  # before it was submitted
    open_jobs: int = field(init=False)
    ended: bool = False
    admitted: float | None = None
    first_token: float | None = None
    generated_tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    prefill_block_flops: int = 0
    prefill_dense_block_flops: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    bill: Bill | None = None  # where energy is counted

    def __post_init__(self) -> None:
        self.open_jobs = len(self.entries)

    def summary(self, now: float) -> Summary:
        started = self.admitted if self.admitted is not None else now
        first, accepted = self.first_token, self.submitted - self.fetch_seconds
        prefilled = [entry for entry in self.entries if entry.done >= entry.job.fed_tokens]
        return Summary(
            usage=self.usage,
            prompt_tokens=sum(entry.job.billed_tokens for entry in prefilled),
            cached_tokens=sum(entry.cached for entry in prefilled if entry.job.bills_prompt),
            generated_tokens=self.generated_tokens,
            queue_seconds=started - self.submitted,
            first_token_seconds=None if first is None else first - accepted,
            total_seconds=now - accepted,
            prefill_block_flops=self.prefill_block_flops,
            prefill_dense_block_flops=self.prefill_dense_block_flops,
            finish_reasons=tuple(self.finish_reasons),
            energy_joules=None if self.bill is None else self.bill.joules,
            fetch_seconds=self.fetch_seconds,
        )


@dataclass(eq=False, slots=True)
class Row:
    """A running sequence."""

    request: Request
    entry: Entry
    sequence: Sequence
    draw: Draw
    text: Detokenizer
    stop: StopMatcher
    scores: list[Sampled] = field(default_factory=list)
    last_token: float | None = None

    def take(self, sampled: Sampled, ends: Many[int], now: float) -> Generated:
        """Append a token: the text it completes, and whether it is the last one."""
        request, entry, order = self.request, self.entry, self.request.order
        if self.last_token is not None:
            request.between_tokens.observe(now - self.last_token)
        else:
            request.prefill_block_flops += self.sequence.usage.block_flops
            request.prefill_dense_block_flops += self.sequence.usage.dense_block_flops
        self.last_token = now
        if request.first_token is None:
            request.first_token = now
        entry.tokens.append(sampled.token)
        if self.draw.seen is not None:
            self.draw.seen.add(sampled.token)
        request.generated_tokens += 1

        is_end = sampled.token in ends and not order.ignore_eos
        new = "" if is_end else self.text.push(sampled.token)
        generated = entry.generated_tokens
        text = self.stop.push(new) if generated >= order.least_new else new
        ended = "stop" if is_end or self.stop.stopped else None
        if ended is None and generated == entry.job.most_new:
            ended = "length"
        if ended and not self.stop.stopped:
            text += self.stop.push(self.text.flush())
            if self.stop.stopped:
                ended = "stop"
            text += self.stop.flush()
        return Generated(entry.job.number, text, None if is_end else sampled, ended)


def draw_of(order: Order, job: Job) -> Draw:
    """What a job's draws have in common; `seen` grows with it."""
    sampling = order.sampling
    seen = Seen(job.known) if sampling.has_penalties else None
    return Draw(sampling, sampling.generator(job.number % order.choices), seen)


def grouped(jobs: Many[Job]) -> tuple[Entry, ...]:
    """An entry per job; several of one prompt, pictures included, share a group."""
    keys = [(job.prompt, id(job.imaged)) for job in jobs]
    counts = Counter(
        key for key, job in zip(keys, jobs, strict=True) if job.shared_tokens >= WORTH_WAITING
    )
    groups = {key: Group() for key, count in counts.items() if count > 1}
    return tuple(Entry(job, groups.get(key)) for key, job in zip(keys, jobs, strict=True))
