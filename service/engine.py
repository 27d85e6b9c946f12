"""The workshop of one served model: it turns orders into events, turn by turn on its bench.

Each turn drops what was cancelled or is too late, admits what the cache has room for, runs one
step over all running sequences of whatever capacity, has their next tokens chosen (outputs.py) and
delivers them.
A sequence begins after what stored prefixes hold of its prompt. Every order gets exactly one
ending: `Done`, or `Failed` with the error that its caller is told. A step that raises fails the
orders that were in it; the engine goes on. If a turn itself fails, the engine dies: every order
fails and it says that it is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from elastiformer import Capacity, Chunk, ElasticModel, Sequence
from elastiformer.elastic import Elastic
from elastiformer.errors import CapacityError, ElastiError, InputError
from elastiformer.imaged import ImagedPrompt
from elastiformer.inputs import Detokenizer, StopMatcher, TextInputs
from elastiformer.vlm import ElasticVlm
from service.bench import Bench
from service.energy import Bill, Meter
from service.errors import Cancelled, Draining, EngineDead, StepFailed, TimedOut
from service.ledger import Ledger
from service.load import Load
from service.metrics import Metrics
from service.orders import Order, Ticket, fetched_for, waited_before
from service.outputs import Outputs, end_tokens
from service.pace import Pace
from service.rows import Request, Row, draw_of, grouped
from service.scheduler import Entry, Job, Limits, Scheduler, Share

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

log = logging.getLogger("elasti.engine")


class Engine:
    """One model and its queue. The model's cache is open, for nobody else."""

    def __init__(
        self,
        name: str,
        model: Elastic,
        limits: Limits,
        metrics: Metrics,
        timeout_seconds: float = 600.0,
        max_decode_delay_seconds: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        meter: Meter | None = None,
        bench: Bench | None = None,
        load: Load | None = None,
    ) -> None:
        """An engine that gets turns on a bench, its own if none is named, once it has started."""
        self.name = name
        self.model = model
        self.limits = limits
        self.inputs = TextInputs(model.tokenizer, model.layout.vocabulary, model.context)
        self.longest = lru_cache(maxsize=256)(self._longest)
        self.draining = False
        self.load = load or Load(patience_seconds=2.0, clock=clock)
        self._metrics = metrics
        self._series = metrics.series(name)
        metrics.open_tiers(name, model.lowest, energy=meter is not None)
        self._timeout_seconds = timeout_seconds
        self._max_decode_delay_seconds = max_decode_delay_seconds
        self._clock = clock
        self._meter = meter
        self._scheduler = Scheduler(limits)
        self._pace = Pace()
        self._leaving: list[Request] = []  # cancelled since the last turn
        self._bench = bench or Bench(f"engine {name}")
        self._wake = self._bench.wake
        self._ledger = Ledger(name, metrics, self._scheduler, self._wake, clock, meter)
        self._outputs = Outputs(self._ledger, self._end_tokens())
        self._stopping = False
        self._death: BaseException | None = None

    def start(self) -> None:
        if self._meter is not None:
            self._meter.begin()
        self._bench.add(self)
        self._series.alive.set(1)

    @property
    def alive(self) -> bool:
        return self._death is None and self._bench.holds(self)

    @property
    def idle(self) -> bool:
        with self._wake:
            return not self._ledger.requests

    def checked(self, order: Order) -> Order:
        """The order with what each of its jobs reserves, before it waits; any thread.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: more keys and values than the whole cache holds.
        """
        known: dict[tuple[int, int, Capacity, bool], Job] = {}
        jobs: list[Job] = []
        for job in order.jobs:
            alike = (len(job.prompt), job.most_tokens, job.capacity, job.scored)
            if alike not in known:
                known[alike] = self._sized(job, order.field)
            jobs.append(replace(job, blocks=known[alike].blocks, cut=known[alike].cut))
        return replace(order, jobs=tuple(jobs))

    def _sized(self, job: Job, field: str) -> Job:
        prompt_tokens = len(job.prompt)
        blocks = self.model.blocks_for(job.capacity, prompt_tokens, job.most_tokens, job.scored)
        if blocks > self.limits.cache_blocks:
            raise InputError(
                f"{field}: {prompt_tokens} tokens and up to {job.most_tokens - prompt_tokens} more "
                f"need {blocks} blocks of keys and values; the whole cache has "
                f"{self.limits.cache_blocks}"
            )
        # What routed tokens left out is known only where a step ends.
        cut = 0
        if (
            self.shares_prefixes
            and isinstance(self.model, ElasticModel)
            and self.model.stores_where_steps_end(job.capacity, prompt_tokens)
        ):
            cut = job.storable_tokens
        return replace(job, blocks=blocks, cut=cut)

    @property
    def shares_prefixes(self) -> bool:
        return self.model.prefixes is not None

    def most_new(
        self, capacity: Capacity, prompt_tokens: int, most: int, scored: bool = False
    ) -> int:
        """How many of `most` tokens may follow a prompt: what fits the whole cache, and what this
        capacity can reach; one at least."""

        def does_not_fit(new: int) -> bool:
            needed = self._blocks(capacity, prompt_tokens, prompt_tokens + new, scored)
            return needed is None or needed > self.limits.cache_blocks

        if not does_not_fit(most):
            return most
        return max(1, bisect_left(range(1, most + 1), True, key=does_not_fit))

    def _longest(self, capacity: Capacity) -> int:
        """The most tokens that a prompt and its answer may have together, whatever their parts:
        by the model's context, by the whole cache, and by what this capacity can reach.

        Raises:
            CapacityError: it can reach no length.
        """

        def does_not_fit(tokens: int) -> bool:
            needed = self._blocks(capacity, tokens, tokens)  # an answer is short
            if needed is None:
                return True
            return max(needed, self._blocks(capacity, 1, tokens) or 0) > self.limits.cache_blocks

        longest = bisect_left(range(1, self.model.context + 1), True, key=does_not_fit)
        if longest == 0:
            self.model.blocks_for(capacity, 1, 1)  # says why, if it is not the cache
        return longest

    def _blocks(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool = False
    ) -> int | None:
        """What a sequence takes of the cache; None where its capacity is out of its reach."""
        try:
            return self.model.blocks_for(capacity, prompt_tokens, most_tokens, scored)
        except CapacityError:
            return None

    def submit(self, order: Order) -> Ticket:
        """Take an order; called on the event loop that its events shall arrive on.

        Raises:
            Draining, EngineDead, QueueFull: nothing was taken.
            InputError: more sequences than could ever wait.
        """
        if len(order.jobs) > self.limits.max_waiting:
            raise InputError(
                f"{order.field}: {len(order.jobs)} sequences in one request; at most "
                f"{self.limits.max_waiting} may wait"
            )
        now = self._clock()
        request: Request
        ticket = Ticket(order, lambda: self._cancel(request), asyncio.get_running_loop())
        request = Request(
            order=order,
            ticket=ticket,
            submitted=now - waited_before.get(),
            deadline=now + self._timeout_seconds,
            between_tokens=self._metrics.between_tokens.labels(self.name, order.resolved.tier),
            entries=(
                grouped(order.jobs)
                if self.shares_prefixes
                else tuple(Entry(job) for job in order.jobs)
            ),
            fetch_seconds=fetched_for.get(),
            bill=Bill() if self._meter is not None else None,
        )
        with self._wake:
            if not self.alive:
                raise EngineDead(f"the engine of {self.name!r} has stopped working")
            if self.draining:
                raise Draining("this server is about to stop and takes no new work")
            self._scheduler.add(request.entries)
            self._ledger.add(request)
            self._gauge()
            self._wake.notify_all()
        return ticket

    def stop(self) -> None:
        """Take no more turns; what still runs fails."""
        with self._wake:
            self.draining = self._stopping = True
            self._wake.notify_all()
        self._bench.wait_for_end(self)

    def _cancel(self, request: Request) -> None:
        with self._wake:
            if not request.ended:
                self._leaving.append(request)
                self._wake.notify_all()

    # From here on: the bench's thread.

    @property
    def has_work(self) -> bool:
        return self._stopping or not self._scheduler.idle

    def take_turn(self) -> bool:
        """One turn; or, when the engine is to stop or has died, the end of all that runs."""
        try:
            if not self._stopping:
                self._turn()
                return True
            self._abandon(Draining("this server has stopped"))
        except BaseException as error:
            with self._wake:
                self._death = error
            self._series.alive.set(0)
            log.critical("the engine of %r has died", self.name, exc_info=error)
            self._abandon(EngineDead(f"the engine of {self.name!r} has stopped working"))
        return False

    def resting(self) -> AbstractContextManager[None]:
        return self._meter.resting() if self._meter else nullcontext()

    def _turn(self) -> None:
        try:
            self._drop()
            with self._wake:
                admitted = self._scheduler.admit()
                waiting = (self._ledger.requests[entry] for entry in self._scheduler.waiting)
                longest = next((each for each in waiting if each.admitted is None), None)
            if longest is not None:
                self.load.waited(self._clock() - longest.submitted)
            for entry in admitted:
                self._open(entry)
            room = self._pace.prompt_tokens(self._max_decode_delay_seconds)
            shares = self._scheduler.shares(room)
            if shares:
                begun = self._clock()
                self._step(shares)
                self._pace.learn(self._clock() - begun, shares)
            self._gauge()
        finally:
            self._ledger.send()

    def _drop(self) -> None:
        with self._wake:
            leaving, self._leaving = self._leaving, []
        for request in leaving:
            self._ledger.fail(request, Cancelled("the caller went away"))
        now = self._clock()
        # Whoever came first is late first.
        while (first := self._ledger.oldest()) is not None and now > first.deadline:
            limit = f"{self._timeout_seconds:g} seconds"
            self._ledger.fail(first, TimedOut(f"this request took longer than {limit}"))

    def _open(self, entry: Entry) -> None:
        if entry not in self._ledger.requests:
            return  # another job of its request failed in this turn
        request, job, now = self._ledger.requests[entry], entry.job, self._clock()
        waited = now - request.submitted
        if request.admitted is None:
            request.admitted = now
            self.load.waited(waited)
        self._metrics.queue_time.labels(self.name, request.order.resolved.tier).observe(waited)
        try:
            sequence = self._sequence(entry)
        except ElastiError as error:
            self._ledger.fail(request, error)
        except Exception as error:
            log.exception("a sequence could not be opened")
            self._ledger.fail(request, StepFailed(f"no sequence could be opened: {_kind(error)}"))
        else:
            entry.done = entry.cached = sequence.cached_tokens
            if self.shares_prefixes and not job.scored:
                self._series.prefix_queries.inc(len(job.prompt))
                self._series.prefix_hits.inc(entry.cached)
            self._ledger.rows[entry] = Row(
                request=request,
                entry=entry,
                sequence=sequence,
                draw=draw_of(request.order, job),
                text=Detokenizer(self.inputs.tokenizer),
                stop=StopMatcher(request.order.stops),
            )

    def _sequence(self, entry: Entry) -> Sequence:
        job, shared = entry.job, entry.group is not None
        if isinstance(job.imaged, ImagedPrompt):
            assert isinstance(self.model, ElasticVlm), "pictures for a model that reads none"
            most_new = job.most_tokens - len(job.prompt)
            return self.model.imaged_sequence(job.imaged, most_new, shared)
        assert isinstance(self.model, ElasticModel), "this engine writes texts"
        return self.model.sequence(
            job.capacity,
            prompt_tokens=len(job.prompt),
            most_tokens=job.most_tokens,
            scored=job.scored,
            prompt=None if job.scored else job.prompt,
            shared=shared,
        )

    def _end_tokens(self) -> tuple[int, ...]:
        return end_tokens(self.model)

    def _step(self, shares: Many[Share]) -> None:
        rows = [self._ledger.rows[share.entry] for share in shares]
        try:
            chunks = [
                Chunk(row.sequence, share.ids) for row, share in zip(rows, shares, strict=True)
            ]
            logits = self._metered(rows, chunks)
            for share in shares:
                share.entry.done += share.count
            self._read(shares, logits)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(shares))
            failure = StepFailed(f"the model failed in a step: {_kind(error)}")
            for request in dict.fromkeys(row.request for row in rows):
                self._ledger.fail(request, failure)

    def _read(self, shares: Many[Share], logits: Many[Tensor]) -> None:
        """What is made of a step's outputs."""
        self._outputs.read(shares, logits)

    def _metered(self, rows: Many[Row], chunks: Many[Chunk]) -> Many[Tensor]:
        """One step of the model; what it took is on its requests' bills before any of them ends."""
        if self._meter is None:
            return self.model.step(chunks)
        before = [row.sequence.usage.flops for row in rows]
        logits = self.model.step(chunks)
        self._meter.share(
            (row.request.bill, row.sequence.usage.flops - flops)
            for row, flops in zip(rows, before, strict=True)
            if row.request.bill is not None
        )
        return logits

    def _abandon(self, error: Exception) -> None:
        self._ledger.fail_all(error)
        self._gauge()
        self._ledger.send()

    def _gauge(self) -> None:
        scheduler, series = self._scheduler, self._series
        series.cache_usage.set(scheduler.reserved_blocks / self.limits.cache_blocks)
        series.waiting.set(len(scheduler.waiting))
        series.running.set(len(scheduler.running))


def _kind(error: Exception) -> str:
    return type(error).__name__
