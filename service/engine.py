"""The workshop: one thread per served model that turns orders into events.

Each turn drops what was cancelled or is too late, admits what fits, runs one step over all
running sequences of whatever capacity, chooses their next tokens and delivers them. Every order
gets exactly one ending: `Done`, or `Failed` with the error that its caller is told. A step that
raises fails the orders that were in it; the thread goes on. If the thread itself dies, every
order fails and the engine says that it is dead.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastiformer import Chunk, ElasticModel, Sequence
from elastiformer.errors import ElastiError, InputError
from elastiformer.inputs import Detokenizer, StopMatcher, TextInputs
from elastiformer.sampling import BrokenLogits, Draw, Sampled, sample, score
from elastiformer.usage import Usage
from service.errors import Cancelled, Draining, EngineDead, StepFailed, TimedOut
from service.metrics import Finished, Metrics
from service.orders import Done, Event, Failed, Generated, Order, Scored, Summary, Ticket
from service.scheduler import Entry, Limits, Scheduler, Share

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

log = logging.getLogger("elasti.engine")


@dataclass(eq=False, slots=True)
class _Request:
    """An order inside the engine; only its `cancelled` is written by another thread."""

    order: Order
    ticket: Ticket
    submitted: float
    deadline: float
    entries: tuple[Entry, ...] = ()
    cancelled: bool = False
    ended: bool = False
    open_jobs: int = 0
    admitted: float | None = None
    first_token: float | None = None
    generated_tokens: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass(eq=False, slots=True)
class _Row:
    """A running sequence, with what its tokens pass through."""

    request: _Request
    sequence: Sequence
    generator: torch.Generator
    text: Detokenizer
    stop: StopMatcher
    scores: list[Sampled] = field(default_factory=list)
    last_token: float | None = None


class Engine:
    """One model, its queue and its thread."""

    def __init__(
        self,
        name: str,
        model: ElasticModel,
        limits: Limits,
        metrics: Metrics,
        timeout_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert model.tokenizer is not None, "a served model has a tokenizer"
        self.name = name
        self.model = model
        self.limits = limits
        # A sequence that could never fit the cache is refused at once, not left to wait.
        context = min(model.context, limits.cache_tokens)
        self.inputs = TextInputs(model.tokenizer, model.config.vocab_size, context)
        self.draining = False
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._scheduler = Scheduler(limits)
        self._requests: dict[Entry, _Request] = {}
        self._rows: dict[Entry, _Row] = {}
        self._outbox: list[tuple[Ticket, Event]] = []
        self._ends = end_tokens(model)
        self._wake = threading.Condition()
        self._stopping = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._death is None and self._thread.is_alive()

    @property
    def idle(self) -> bool:
        with self._wake:
            return not self._requests

    def check(self, order: Order) -> None:
        """Refuse a capacity that this model cannot run, before the order waits; any thread.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
        """
        for capacity, context in {(job.capacity, len(job.prompt)) for job in order.jobs}:
            self.model.plans(capacity, context)

    def submit(self, order: Order) -> Ticket:
        """Take an order; called on the event loop that its events shall arrive on.

        Raises:
            Draining, EngineDead, QueueFull: nothing was taken.
            InputError: more sequences than could ever wait.
        """
        if len(order.jobs) > self.limits.max_waiting:
            raise InputError(
                f"prompt: {len(order.jobs)} sequences in one request; at most "
                f"{self.limits.max_waiting} may wait"
            )
        now = self._clock()
        request: _Request
        ticket = Ticket(order, lambda: self._cancel(request), asyncio.get_running_loop())
        request = _Request(order, ticket, now, now + self._timeout_seconds)
        request.entries = tuple(Entry(job) for job in order.jobs)
        request.open_jobs = len(request.entries)
        with self._wake:
            if self._death is not None or not self._thread.is_alive():
                raise EngineDead(f"the engine of {self.name!r} has stopped working")
            if self.draining:
                raise Draining("this server is about to stop and takes no new work")
            self._scheduler.add(request.entries)
            self._requests |= dict.fromkeys(request.entries, request)
            self._gauge()
            self._wake.notify()
        return ticket

    def stop(self) -> None:
        """End the thread; what still runs fails."""
        with self._wake:
            self.draining = self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _cancel(self, request: _Request) -> None:
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    # From here on: the engine's own thread.

    def _work(self) -> None:
        try:
            while self._has_work():
                self._turn()
            self._fail_all(Draining("this server has stopped"))
        except BaseException as error:
            with self._wake:
                self._death = error
            log.critical("the engine of %r has died", self.name, exc_info=error)
            self._fail_all(EngineDead(f"the engine of {self.name!r} has stopped working"))

    def _has_work(self) -> bool:
        """Wait for something to do; False when the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or not self._scheduler.idle)
            return not self._stopping

    def _turn(self) -> None:
        try:
            self._drop()
            with self._wake:
                admitted = self._scheduler.admit()
            for entry in admitted:
                self._open(entry)
            shares = self._scheduler.shares()
            if shares:
                self._step(shares)
            self._gauge()
        finally:
            self._send()

    def _drop(self) -> None:
        now = self._clock()
        with self._wake:
            requests = list(dict.fromkeys(self._requests.values()))
        for request in requests:
            if request.cancelled:
                self._fail(request, Cancelled("the caller went away"))
            elif now > request.deadline:
                limit = f"{self._timeout_seconds:g} seconds"
                self._fail(request, TimedOut(f"this request took longer than {limit}"))

    def _open(self, entry: Entry) -> None:
        if entry not in self._requests:
            return  # another job of its request failed in this turn
        request, job, now = self._requests[entry], entry.job, self._clock()
        if request.admitted is None:
            request.admitted = now
        waited = now - request.submitted
        self._metrics.queue_time.labels(self.name, request.order.resolved.tier).observe(waited)
        try:
            sequence = self.model.sequence(
                job.capacity,
                prompt_tokens=len(job.prompt),
                most_tokens=job.most_tokens,
                scored=job.scored,
            )
        except ElastiError as error:
            self._fail(request, error)
        except Exception as error:
            log.exception("a sequence could not be opened")
            self._fail(request, StepFailed(f"no sequence could be opened: {_kind(error)}"))
        else:
            self._rows[entry] = _Row(
                request=request,
                sequence=sequence,
                generator=request.order.sampling.generator(job.number % request.order.choices),
                text=Detokenizer(self.inputs.tokenizer),
                stop=StopMatcher(request.order.stops),
            )

    def _step(self, shares: Many[Share]) -> None:
        rows = [self._rows[share.entry] for share in shares]
        try:
            chunks = [
                Chunk(row.sequence, share.ids) for row, share in zip(rows, shares, strict=True)
            ]
            logits = self.model.step(chunks)
            for share in shares:
                share.entry.done += share.count
            self._score(shares, logits)
            self._draw(shares, logits)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(shares))
            for request in dict.fromkeys(row.request for row in rows):
                self._fail(request, StepFailed(f"the model failed in a step: {_kind(error)}"))

    def _score(self, shares: Iterable[Share], logits: Iterable[Tensor]) -> None:
        """Read the log-probabilities of known tokens off the rows before them."""
        for share, logits_RV in zip(shares, logits, strict=True):
            entry, job = share.entry, share.entry.job
            if not (job.scored or job.given):
                continue
            row, known = self._rows[entry], job.known
            first = entry.done - len(logits_RV) + 1  # the token that the first row is about
            targets = known[first : entry.done + 1]
            if targets:
                top = row.request.order.sampling.logprobs or 0
                try:
                    row.scores += score(logits_RV[: len(targets)], targets, top)
                except BrokenLogits as error:
                    self._fail(row.request, StepFailed(str(error)))
                    continue
            if entry.done == job.fed_tokens:
                self._deliver(row, Scored(job.number, tuple(row.scores)))
                if not job.most_new:
                    self._end(entry, "length")

    def _draw(self, shares: Iterable[Share], logits: Iterable[Tensor]) -> None:
        """Choose the next token of every row that has one to come, all rows together."""
        entries: list[Entry] = []
        last: list[Tensor] = []
        for share, logits_RV in zip(shares, logits, strict=True):
            entry = share.entry
            if entry in self._rows and entry.ready == 0:
                if entry.job.most_new:
                    entries.append(entry)
                    last.append(logits_RV[-1])
                else:
                    self._end(entry, "length")
        while entries:
            try:
                sampled = sample(torch.stack(last), [self._wish(entry) for entry in entries])
            except BrokenLogits as error:
                for place in reversed(error.rows):
                    self._fail(self._rows[entries[place]].request, StepFailed(str(error)))
                    del entries[place], last[place]
                # A failed request takes its other rows with it.
                kept = [place for place, entry in enumerate(entries) if entry in self._rows]
                entries, last = [entries[p] for p in kept], [last[p] for p in kept]
                continue
            for entry, token in zip(entries, sampled, strict=True):
                self._append(entry, token)
            return

    def _wish(self, entry: Entry) -> Draw:
        row = self._rows[entry]
        order = row.request.order
        return Draw(
            order.sampling,
            row.generator,
            entry.job.known if order.sampling.has_penalties else (),
            entry.generated if order.sampling.has_penalties else (),
            self._ends if entry.generated_tokens < order.least_new else (),
        )

    def _append(self, entry: Entry, sampled: Sampled) -> None:
        row, now = self._rows[entry], self._clock()
        request, tier = row.request, row.request.order.resolved.tier
        if row.last_token is not None:
            passed = now - row.last_token
            self._metrics.between_tokens.labels(self.name, tier).observe(passed)
        row.last_token = now
        if request.first_token is None:
            request.first_token = now
        entry.tokens.append(sampled.token)
        request.generated_tokens += 1

        is_end = sampled.token in self._ends and not request.order.ignore_eos
        new = "" if is_end else row.text.push(sampled.token)
        may_stop = entry.generated_tokens >= request.order.least_new
        text = row.stop.push(new) if may_stop else new
        ended = "stop" if is_end or row.stop.stopped else None
        if ended is None and entry.generated_tokens == entry.job.most_new:
            ended = "length"
        if ended and not row.stop.stopped:
            text += row.stop.push(row.text.flush())
            if row.stop.stopped:
                ended = "stop"
            text += row.stop.flush()
        shown = None if is_end else sampled
        self._deliver(row, Generated(entry.job.number, text, shown, ended))
        if ended:
            self._end(entry, ended)

    # Endings.

    def _end(self, entry: Entry, reason: str) -> None:
        """One job is complete; the last one completes its request."""
        request = self._requests[entry]
        self._forget(entry)
        self._metrics.success.labels(self.name, reason).inc()
        request.open_jobs -= 1
        if request.open_jobs == 0:
            self._close(request, Done(self._summary(request)))

    def _fail(self, request: _Request, error: Exception) -> None:
        if request.ended:
            return
        reason = "abort" if isinstance(error, Cancelled) else "error"
        for entry in request.entries:
            if entry in self._requests:
                self._forget(entry)
                self._metrics.success.labels(self.name, reason).inc()
        self._close(request, Failed(error))

    def _fail_all(self, error: Exception) -> None:
        for request in list(dict.fromkeys(self._requests.values())):
            self._fail(request, error)
        self._gauge()
        self._send()

    def _close(self, request: _Request, ending: Done | Failed) -> None:
        assert not request.ended, "a request has one ending"
        request.ended = True
        resolved, summary = request.order.resolved, self._summary(request)
        self._metrics.finish(
            self.name,
            Finished(
                tier=resolved.tier,
                usage=summary.usage,
                prompt_tokens=summary.prompt_tokens,
                generated_tokens=summary.generated_tokens,
                asked=resolved.requested if isinstance(resolved.requested, float) else None,
                total_seconds=summary.total_seconds,
                first_token_seconds=summary.first_token_seconds,
            ),
        )
        self._outbox.append((request.ticket, ending))

    def _forget(self, entry: Entry) -> None:
        with self._wake:
            request = self._requests.pop(entry)
            self._scheduler.remove(entry)
        row = self._rows.pop(entry, None)
        if row is not None:
            request.usage += row.sequence.usage
            row.sequence.release()

    def _summary(self, request: _Request) -> Summary:
        now = self._clock()
        started = request.admitted if request.admitted is not None else now
        first = request.first_token
        return Summary(
            usage=request.usage,
            prompt_tokens=sum(
                entry.job.billed_tokens
                for entry in request.entries
                if entry.done >= entry.job.fed_tokens
            ),
            generated_tokens=request.generated_tokens,
            queue_seconds=started - request.submitted,
            first_token_seconds=None if first is None else first - request.submitted,
            total_seconds=now - request.submitted,
        )

    def _deliver(self, row: _Row, event: Event) -> None:
        self._outbox.append((row.request.ticket, event))

    def _send(self) -> None:
        """Hand a turn's events to their event loops, in one call each."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}
        for ticket, event in self._outbox:
            by_loop.setdefault(ticket.loop, []).append((ticket, event))
        self._outbox = []
        for loop, events in by_loop.items():
            with suppress(RuntimeError):  # a closed loop: whoever waited has gone with it
                loop.call_soon_threadsafe(_hand_over, events)

    def _gauge(self) -> None:
        scheduler = self._scheduler
        self._metrics.running.labels(self.name).set(len(scheduler.running))
        self._metrics.waiting.labels(self.name).set(len(scheduler.waiting))
        reserved = scheduler.reserved_tokens / self.limits.cache_tokens
        self._metrics.cache_usage.labels(self.name).set(reserved)


def end_tokens(model: ElasticModel) -> tuple[int, ...]:
    """The tokens that end a text, from the base model's generation settings and its tokenizer."""
    assert model.tokenizer is not None
    settings = model.base.generation_config
    asked = settings.eos_token_id if settings is not None else None
    ends = list(asked) if isinstance(asked, list | tuple) else [asked]
    ends.append(model.tokenizer.eos_token_id)
    return tuple(dict.fromkeys(token for token in ends if token is not None))


def _hand_over(events: Iterable[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.deliver(event)


def _kind(error: Exception) -> str:
    return type(error).__name__
