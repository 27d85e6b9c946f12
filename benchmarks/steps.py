"""How long steps take: rows that decode beside tokens of prompts, as an engine runs them.

Every row is a request of a mix of capacities, between the end of its prompt and the end of its
answer. The choice of tokens is part of a step; what threads and HTTP cost is not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import models
from benchmarks.runs import timed
from benchmarks.simulation import StepTimes
from benchmarks.timing import take_turns
from elastiformer import Chunk, ElasticModel
from elastiformer import Sequence as Sequenced
from elastiformer.sampling import GREEDY, Draw, sample
from service.engine import Engine
from service.scheduler import Job

PROMPT_TOKENS = (0, 32, 128, 512)  # of a measured step


class Rows:
    """Sequences of a mix that decode, each begun anew when its answer is complete."""

    def __init__(
        self, model: ElasticModel, jobs: Sequence[Job], ids: Sequence[int], starts: Iterator[int]
    ) -> None:
        self._model, self._jobs, self._ids, self._starts = model, jobs, ids, starts
        self._rows: list[Sequenced] = []
        self._steps = 0

    def seconds(self, rows: int, tokens: int) -> float:
        """One step as the engine runs it, the choice of tokens included."""
        if len(self._rows) < rows or self._steps + 1 >= self._jobs[0].most_new:
            self._begin(max(rows, len(self._rows)))
        self._steps += 1
        chunks = [Chunk(row, [self._ids[row.length % len(self._ids)]]) for row in self._rows[:rows]]
        prompts = self._prompts(tokens)
        chunks += prompts
        whole = {id(chunk) for chunk in prompts if len(chunk.ids) == len(self._jobs[0].prompt)}
        drawing = [
            place for place, chunk in enumerate(chunks) if place < rows or id(chunk) in whole
        ]
        draws = [Draw(GREEDY, GREEDY.generator()) for _ in drawing]

        def work() -> None:
            logits = self._model.step(chunks)
            if drawing:
                sample(torch.stack([logits[place][-1] for place in drawing]), draws)

        taken = timed(self._model, work)
        for chunk in prompts:
            chunk.sequence.release()
        return taken

    def release(self) -> None:
        for row in self._rows:
            row.release()
        self._rows = []

    def _begin(self, rows: int) -> None:
        self.release()
        self._steps = 0
        for place in range(rows):
            job = self._jobs[place % len(self._jobs)]
            self._rows.append(self._sequence(job))
            self._model.step([Chunk(self._rows[-1], self._text(len(job.prompt)))])

    def _prompts(self, tokens: int) -> list[Chunk]:
        """So many tokens of prompts, of as many requests as that takes."""
        chunks: list[Chunk] = []
        while tokens > 0:
            job = self._jobs[len(chunks) % len(self._jobs)]
            part = min(tokens, len(job.prompt))
            chunks.append(Chunk(self._sequence(job), self._text(part)))
            tokens -= part
        return chunks

    def _sequence(self, job: Job) -> Sequenced:
        return self._model.sequence(job.capacity, len(job.prompt), job.most_tokens)

    def _text(self, tokens: int) -> list[int]:
        start = next(self._starts) % (len(self._ids) - tokens)
        return list(self._ids[start : start + tokens])


def step_times(
    engine: Engine,
    jobs: Sequence[Job],
    starts: Iterator[int],
    seconds: float,
    least: int,
    label: str,
) -> StepTimes:
    """Medians over rounds in which every kind of step has its turn."""
    most = min(engine.limits.max_running, engine.limits.max_step_tokens)
    # A row more than fills a tile costs what a whole tile does.
    rows = sorted({each for each in (1, 2, 4, 5, most // 2, most) if each <= most})
    tokens = [each for each in PROMPT_TOKENS if each <= engine.limits.max_step_tokens]
    cells = [(0, each) for each in tokens[1:]]
    # Beside decodes few prompt tokens run: of more, each is taken to cost what it does alone, and
    # nothing where a few rounds on a busy machine say that more take less.
    cells += [(row, each) for row in rows for each in tokens[:3]]
    model = engine.model
    assert isinstance(model, ElasticModel), "steps of a model that writes"
    measured = Rows(model, jobs, models.text_ids(model, 4096), starts)
    taken = take_turns(
        {str(cell): partial(measured.seconds, *cell) for cell in cells},
        seconds,
        least,
        f"steps, {label}",
    )
    measured.release()
    middle = {cell: statistics.median(taken[str(cell)]) for cell in cells}
    middle[0, 0] = 0.0
    for each in tokens[3:]:
        more = max(middle[0, each] - middle[0, tokens[2]], 0.0)
        for row in rows:
            middle[row, each] = middle[row, tokens[2]] + more
    return StepTimes(
        rows=(0, *rows),
        tokens=tuple(tokens),
        seconds=tuple(tuple(middle[row, each] for each in tokens) for row in (0, *rows)),
    )
