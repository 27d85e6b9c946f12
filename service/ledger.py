"""What an engine owes: the requests it took and has not ended, their rows, and what to tell whom.

Every request gets exactly one ending here, and what it spent is counted before anyone is told.
Events wait in an outbox until the end of a turn, and reach each event loop in one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Condition

from service.energy import Meter
from service.errors import Cancelled
from service.metrics import Finished, Metrics
from service.orders import Done, Event, Failed, Ticket
from service.rows import Request, Row
from service.scheduler import Entry, Scheduler


class Ledger:
    """The open requests of one engine. The engine's thread writes; others take `wake` first."""

    def __init__(
        self,
        name: str,
        metrics: Metrics,
        scheduler: Scheduler,
        wake: Condition,
        clock: Callable[[], float],
        meter: Meter | None,
    ) -> None:
        """A ledger without entries.

        Args:
            wake: held while requests or the scheduler's entries change.
        """
        self.requests: dict[Entry, Request] = {}  # in the order of their submission
        self.rows: dict[Entry, Row] = {}
        self._name, self._metrics, self._scheduler = name, metrics, scheduler
        self._wake, self._clock, self._meter = wake, clock, meter
        self._outbox: list[tuple[Ticket, Event]] = []

    def add(self, request: Request) -> None:
        """Owe it an ending; `wake` is held."""
        self.requests |= dict.fromkeys(request.entries, request)

    def now(self) -> float:
        """In seconds, by the engine's clock."""
        return self._clock()

    def oldest(self) -> Request | None:
        with self._wake:
            return next(iter(self.requests.values()), None)

    def deliver(self, row: Row, event: Event) -> None:
        self._outbox.append((row.request.ticket, event))

    def end(self, entry: Entry, reason: str) -> None:
        """One job is complete; the last one completes its request."""
        request = self.requests[entry]
        # Counted first: who sees the engine idle finds everything counted.
        self._metrics.success.labels(self._name, reason).inc()
        request.finish_reasons.append(reason)
        self._forget(entry)
        request.open_jobs -= 1
        if request.open_jobs == 0:
            self._close(request)

    def fail(self, request: Request, error: Exception) -> None:
        """All its jobs end with this; nothing, where it has ended."""
        if request.ended:
            return
        reason = "abort" if isinstance(error, Cancelled) else "error"
        for entry in request.entries:
            if entry in self.requests:
                self._metrics.success.labels(self._name, reason).inc()
                self._forget(entry)
        self._close(request, error)

    def fail_all(self, error: Exception) -> None:
        for request in list(dict.fromkeys(self.requests.values())):
            self.fail(request, error)

    def send(self) -> None:
        """Hand a turn's events to their event loops."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}
        for ticket, event in self._outbox:
            by_loop.setdefault(ticket.loop, []).append((ticket, event))
        self._outbox = []
        for loop, events in by_loop.items():
            with suppress(RuntimeError):  # a closed loop: whoever waited has gone with it
                loop.call_soon_threadsafe(_hand_over, events)

    def _close(self, request: Request, error: Exception | None = None) -> None:
        assert not request.ended, "a request has one ending"
        request.ended = True
        if self._meter is not None and request.bill is not None:
            self._meter.close(request.bill)
        resolved, summary = request.order.resolved, request.summary(self._clock())
        self._metrics.finish(
            self._name,
            Finished(
                tier=resolved.tier,
                usage=summary.usage,
                prompt_tokens=summary.prompt_tokens,
                generated_tokens=summary.generated_tokens,
                asked=resolved.requested if isinstance(resolved.requested, float) else None,
                total_seconds=summary.total_seconds,
                first_token_seconds=summary.first_token_seconds,
                energy_joules=summary.energy_joules,
            ),
        )
        ending = Done(summary) if error is None else Failed(error, summary)
        self._outbox.append((request.ticket, ending))

    def _forget(self, entry: Entry) -> None:
        with self._wake:
            request = self.requests.pop(entry)
            self._scheduler.remove(entry)
        row = self.rows.pop(entry, None)
        if row is not None:
            request.usage += row.sequence.usage
            row.sequence.release()


def _hand_over(events: Iterable[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.deliver(event)
