"""What passes between the desk and the workshop: an order in, events back, one ending.

An `Order` is one request made concrete. Its `Ticket` lives on the asyncio side: it receives what
the engine delivers, and ends with exactly one `Done` or `Failed`. No torch, no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastiformer.usage import Usage
from service.knob import Resolved
from service.scheduler import Job

if TYPE_CHECKING:  # for their names only: this file stays importable without torch
    from torch import Tensor

    from elastiformer.sampling import Sampled, Sampling

log = logging.getLogger("elasti.engine")

# Seconds that the request of this context waited at a proxy, before it came to this process.
waited_before: ContextVar[float] = ContextVar("waited_before", default=0.0)
# Seconds that fetching took, of the images that it names by address, before it was queued.
fetched_for: ContextVar[float] = ContextVar("fetched_for", default=0.0)


@dataclass(frozen=True, slots=True)
class Order:
    """One request: its jobs, how they draw, and when they end."""

    jobs: tuple[Job, ...]
    resolved: Resolved
    sampling: Sampling
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    least_new: int = 0
    choices: int = 1  # sequences per prompt
    field: str = "prompt"  # of the request: what refusals call the texts or images


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probabilities of a job's known tokens, from its second token on or its first
    given one."""

    number: int
    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """One more token of a job, and the text it completes; `ended` on the last one."""

    number: int
    text: str
    sampled: Sampled | None  # None for the token that ends a text and stands for nothing
    ended: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder's head, or its pooling, makes of a job's item."""

    number: int
    outputs: Tensor


@dataclass(frozen=True, slots=True)
class Summary:
    """What a request took, over all its jobs.

    What was fetched for it is part of the times to the first token and in total, not of the queue.
    """

    usage: Usage
    prompt_tokens: int
    cached_tokens: int  # of the prompt's: taken from stored prefixes, not computed
    generated_tokens: int
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float
    # Of the tokens that came before the first drawn one of each sequence.
    prefill_block_flops: int = 0
    prefill_dense_block_flops: int = 0
    finish_reasons: tuple[str, ...] = ()  # of the sequences that ended, as they did
    energy_joules: float | None = None  # None where no counter can be read
    fetch_seconds: float = 0.0  # of images that it named by address; 0 where there was none


@dataclass(frozen=True, slots=True)
class Done:
    """The ending of a request that got its answer."""

    summary: Summary


@dataclass(frozen=True, slots=True)
class Failed:
    """The ending of a request that got none; what it took all the same."""

    error: Exception
    summary: Summary


Event = Scored | Generated | Encoded | Done | Failed


@dataclass(eq=False, slots=True)
class Ticket:
    """The caller's end of an order: events as they come, and the right to cancel."""

    order: Order
    cancel: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    ending: Done | Failed | None = None
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _told: list[Callable[[Done | Failed], None]] = field(default_factory=list)

    def deliver(self, event: Event) -> None:
        """Called on the event loop only."""
        self._events.put_nowait(event)
        if isinstance(event, Done | Failed):
            self.ending = event
            for tell in self._told:
                try:
                    tell(event)
                except Exception:  # whoever looks on must not cost anybody an ending
                    log.exception("an ending could not be told")

    def when_ended(self, tell: Callable[[Done | Failed], None]) -> None:
        """Call back with the ending, also after the caller has gone; on the event loop only."""
        if self.ending is not None:
            tell(self.ending)
        else:
            self._told.append(tell)

    async def batches(self) -> AsyncIterator[list[Event]]:
        """All that has arrived, each time that something has, up to and including `Done`.

        Raises:
            Exception: what the order failed with.
        """
        while True:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            last = batch[-1]
            if isinstance(last, Failed):
                if batch[:-1]:
                    yield batch[:-1]
                raise last.error
            yield batch
            if isinstance(last, Done):
                return

    async def events(self) -> AsyncIterator[Event]:
        """Everything up to and including `Done`.

        Raises:
            Exception: what the order failed with.
        """
        async for batch in self.batches():
            for event in batch:
                yield event
