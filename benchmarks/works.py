"""The kinds of work whose saving is measured: each can be done at any capacity, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from benchmarks.runs import Decoding, Flops, timed
from elastiformer import Capacity, Chunk, ElasticModel


class Work(Protocol):
    """One kind: how many rows it decodes, 0 where it does not, and what a turn takes and spends."""

    name: str
    rows: int

    def turn(self, capacity: Capacity) -> float: ...

    def flops(self, capacity: Capacity) -> Flops: ...


class Texts:
    """Some texts in one step, in new sequences every turn.

    Args:
        scored: every token's logits are wanted, so all are of phase output.
        label: a token that follows each text, in a step of its own: of a label of two tokens
            the second's logits need the first.
    """

    rows = 0

    def __init__(
        self,
        name: str,
        model: ElasticModel,
        texts: list[list[int]],
        scored: bool = False,
        label: int | None = None,
    ) -> None:
        self.name = name
        self._model, self._texts, self._scored, self._label = model, texts, scored, label
        self._flops: dict[Capacity, Flops] = {}

    def turn(self, capacity: Capacity) -> float:
        requests = [
            self._model.sequence(capacity, len(text), len(text) + 1, self._scored)
            for text in self._texts
        ]
        chunks = [Chunk(request, text) for request, text in zip(requests, self._texts, strict=True)]
        seconds = timed(self._model, lambda: self._model.step(chunks))
        if self._label is not None:
            labels = [Chunk(request, [self._label]) for request in requests]
            seconds += timed(self._model, lambda: self._model.step(labels))
        self._flops[capacity] = Flops.of([request.usage for request in requests])
        for request in requests:
            request.release()
        return seconds

    def flops(self, capacity: Capacity) -> Flops:
        return self._flops[capacity]


class Decode:
    """One token for each of so many sequences, in one step."""

    def __init__(self, running: Mapping[Capacity, Decoding], rows: int) -> None:
        self.name, self.rows = f"decode, batch {rows}", rows
        self._running = running
        self._before = {capacity: each.spent(rows) for capacity, each in running.items()}

    def turn(self, capacity: Capacity) -> float:
        return self._running[capacity].step(self.rows)

    def flops(self, capacity: Capacity) -> Flops:
        return self._running[capacity].spent(self.rows).minus(self._before[capacity])
