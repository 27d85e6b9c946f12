"""Sequences driven step by step, as an engine does it, and what each step took.

Prompts are cut into steps of so many tokens; then all sequences go on together, one token each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.machine import synchronize
from elastiformer import Capacity, Chunk, ElasticModel, Usage
from elastiformer import Sequence as Request
from elastiformer.costs import TRIAL_TURNS
from elastiformer.elastic import Elastic

STEP_TOKENS = 512  # of one step: the server's default
STAGGER = 8
# Of so many steps of a kind some find out which of two ways is faster: they are not measured.
TRIAL_STEPS = 2 * TRIAL_TURNS + 1


@dataclass(frozen=True, slots=True)
class Flops:
    """What some work cost: of the blocks, and with the output head."""

    blocks: int
    all: int

    @classmethod
    def of(cls, usages: Sequence[Usage]) -> Flops:
        return cls(sum(u.block_flops for u in usages), sum(u.flops for u in usages))

    def minus(self, other: Flops) -> Flops:
        return Flops(self.blocks - other.blocks, self.all - other.all)


def timed(model: Elastic, work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    synchronize(model.device)
    began = time.perf_counter()
    work()
    synchronize(model.device)
    return time.perf_counter() - began


def feed_prompts(
    model: ElasticModel, requests: Sequence[Request], prompts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Run all prompts in steps of STEP_TOKENS; the logits of each prompt's last token."""
    last: list[Tensor] = []
    chunks: list[Chunk] = []
    room = STEP_TOKENS
    waiting = [(request, list(ids)) for request, ids in zip(requests, prompts, strict=True)]
    ends: list[bool] = []
    while waiting:
        request, ids = waiting[0]
        chunks.append(Chunk(request, ids[:room]))
        ends.append(len(ids) <= room)
        room -= len(chunks[-1].ids)
        if ends[-1]:
            waiting.pop(0)
        else:
            waiting[0] = (request, ids[len(chunks[-1].ids) :])
        if room == 0 or not waiting:
            logits = model.step(chunks)
            last += [rows_RV[-1] for rows_RV, end in zip(logits, ends, strict=True) if end]
            chunks, ends, room = [], [], STEP_TOKENS
    return last


def generate(
    model: ElasticModel,
    capacities: Sequence[Capacity],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> list[Usage]:
    """Greedily continue every prompt at its capacity, all together; what each spent."""
    requests = [
        model.sequence(capacity, len(ids), len(ids) + new_tokens)
        for capacity, ids in zip(capacities, prompts, strict=True)
    ]
    last = feed_prompts(model, requests, prompts)
    for _ in range(new_tokens - 1):
        following = torch.stack(last).argmax(dim=-1).tolist()
        chunks = [
            Chunk(request, [token]) for request, token in zip(requests, following, strict=True)
        ]
        last = [rows_RV[-1] for rows_RV in model.step(chunks)]
    for request in requests:
        request.release()
    return [request.usage for request in requests]


class Decoding:
    """Sequences at one capacity, past their prompts, that take one token a step."""

    def __init__(
        self,
        model: ElasticModel,
        capacity: Capacity,
        ids: Sequence[int],
        rows: int,
        context: int,
        most_steps: int,
    ) -> None:
        self._model = model
        self._ids = ids
        self.steps = 0
        self.requests = [
            model.sequence(capacity, context, context + STAGGER + most_steps) for _ in range(rows)
        ]
        # Prompts begin at different places, so that no two rows hold the same text.
        self._starts = [row * 37 % max(len(ids) - context, 1) for row in range(rows)]
        prompts = [list(ids[start : start + context]) for start in self._starts]
        feed_prompts(model, self.requests, prompts)
        # Rows of a real batch are not all at the same place of their schedules.
        for step in range(STAGGER):
            late = [at for at in range(rows) if at % STAGGER > step]
            if late:
                model.step([self._chunk(at) for at in late])

    def step(self, rows: int) -> float:
        """One token for the first `rows` sequences; seconds."""
        chunks = [self._chunk(at) for at in range(rows)]
        self.steps += 1
        return timed(self._model, lambda: self._model.step(chunks))

    def spent(self, rows: int) -> Flops:
        """By the first `rows` sequences, so far."""
        return Flops.of([request.usage for request in self.requests[:rows]])

    def release(self) -> None:
        for request in self.requests:
            request.release()

    def _chunk(self, row: int) -> Chunk:
        request = self.requests[row]
        token = self._ids[(self._starts[row] + request.length) % len(self._ids)]
        return Chunk(request, [token])
