"""The workshop of an encoder: whole texts and images, side by side in one step, then answered.

Queue, turns, deadlines and endings are those of engine.py. A job is one item; it runs in one
step, and its answer is what the model's head makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from elastiformer import Capacity, Sequence
from elastiformer.encoder import ElasticEncoder
from elastiformer.sequence import Item
from service.engine import Engine
from service.errors import StepFailed
from service.orders import Encoded
from service.scheduler import Entry, Share


class EncoderEngine(Engine):
    """One encoder and its queue."""

    @property
    def encoder(self) -> ElasticEncoder:
        assert isinstance(self.model, ElasticEncoder), "this engine runs an encoder"
        return self.model

    def _longest(self, capacity: Capacity) -> int:
        """The most tokens of one item."""
        return self.model.context

    def _sequence(self, entry: Entry) -> Sequence:
        job = entry.job
        assert isinstance(job.item, Item), "a job of an encoder has an item"
        return self.encoder.sequence(job.capacity, job.item)

    def _end_tokens(self) -> tuple[int, ...]:
        return ()

    def _read(self, shares: Many[Share], logits: Many[Tensor]) -> None:
        for share, outputs in zip(shares, logits, strict=True):
            row = self._ledger.rows.get(share.entry)
            if row is None:
                continue  # another item of its request has failed
            if not bool(torch.isfinite(outputs).all()):
                error = StepFailed("the model gave a number that is not finite")
                self._ledger.fail(row.request, error)
                continue
            self._ledger.deliver(row, Encoded(share.entry.job.number, outputs.cpu()))
            self._ledger.end(share.entry, "stop")
