"""What is made of a step's outputs: the log-probabilities of known tokens, and the next tokens.

All rows that have a token to come draw it together. Rows whose logits are no numbers fail their
requests, and nobody else's. Which rows ran, and when, is the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from elastiformer.elastic import Elastic
from elastiformer.sampling import BrokenLogits, Draw, Sampled, sample, score, side_by_side
from service.errors import StepFailed
from service.ledger import Ledger
from service.orders import Scored
from service.scheduler import Entry, Share

if TYPE_CHECKING:
    from collections.abc import Sequence as Many


class Outputs:
    """Reads the logits of one engine's steps, on its thread; what it finds goes to the ledger."""

    def __init__(self, ledger: Ledger, ends: tuple[int, ...]) -> None:
        """
        Args:
            ends: the tokens that end a text.
        """
        self._ledger, self._ends = ledger, ends

    def read(self, shares: Many[Share], logits: Many[Tensor]) -> None:
        """One step's; each share's entry has counted its tokens as done."""
        self._score(shares, logits)
        self._draw(shares, logits)

    def _score(self, shares: Iterable[Share], logits: Iterable[Tensor]) -> None:
        """Read the log-probabilities of known tokens off the rows before them."""
        for share, logits_RV in zip(shares, logits, strict=True):
            entry, job = share.entry, share.entry.job
            if not (job.scored or job.given):
                continue
            row, known = self._ledger.rows[entry], job.known
            first = entry.done - len(logits_RV) + 1  # the token that the first row is about
            targets = known[first : entry.done + 1]
            if targets:
                top = row.request.order.sampling.logprobs or 0
                try:
                    row.scores += score(logits_RV[: len(targets)], targets, top)
                except BrokenLogits as error:
                    self._ledger.fail(row.request, StepFailed(str(error)))
                    continue
            if entry.done == job.fed_tokens:
                self._ledger.deliver(row, Scored(job.number, tuple(row.scores)))
                if not job.most_new:
                    self._ledger.end(entry, "length")

    def _draw(self, shares: Iterable[Share], logits: Iterable[Tensor]) -> None:
        """Choose the next token of every row that has one to come, all rows together."""
        ledger = self._ledger
        entries: list[Entry] = []
        last: list[Tensor] = []
        for share, logits_RV in zip(shares, logits, strict=True):
            entry = share.entry
            if entry in ledger.rows and entry.ready == 0:
                if entry.job.most_new:
                    entries.append(entry)
                    last.append(logits_RV[-1])
                else:
                    ledger.end(entry, "length")
        while entries:
            try:
                sampled = sample(side_by_side(last), [self._wish(entry) for entry in entries])
            except BrokenLogits as error:
                # A failed request takes its other rows with it.
                for request in {ledger.rows[entries[place]].request for place in error.rows}:
                    ledger.fail(request, StepFailed(str(error)))
                kept = [place for place, entry in enumerate(entries) if entry in ledger.rows]
                entries, last = [entries[p] for p in kept], [last[p] for p in kept]
                continue
            for entry, token in zip(entries, sampled, strict=True):
                self._append(entry, token)
            return

    def _wish(self, entry: Entry) -> Draw:
        row = self._ledger.rows[entry]
        if entry.generated_tokens < row.request.order.least_new:
            return replace(row.draw, banned=self._ends)
        return row.draw

    def _append(self, entry: Entry, sampled: Sampled) -> None:
        row = self._ledger.rows[entry]
        event = row.take(sampled, self._ends, self._ledger.now())
        self._ledger.deliver(row, event)
        if event.ended:
            self._ledger.end(entry, event.ended)


def end_tokens(model: Elastic) -> tuple[int, ...]:
    """The tokens that end a text, from the base model's generation settings and its tokenizer."""
    assert model.tokenizer is not None
    settings = model.base.generation_config
    asked = settings.eos_token_id if settings is not None else None
    ends = list(asked) if isinstance(asked, list | tuple) else [asked]
    ends.append(model.tokenizer.eos_token_id)
    return tuple(dict.fromkeys(token for token in ends if token is not None))
