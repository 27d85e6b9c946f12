"""What callers send to an encoder becomes items, and items become an order's jobs.

Texts, pairs of texts and images, one or many; each is one job, and all of a request run under its
one capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastiformer.encoder_inputs import ImageItems, Prepared
from elastiformer.errors import InputError
from elastiformer.sampling import GREEDY
from elastiformer.sequence import Item
from elastiformer.tasks import Task
from service.errors import BadRequest
from service.knob import Resolved
from service.orders import Order
from service.scheduler import Job
from service.schemas import Image, Pair
from service.served import Served

if TYPE_CHECKING:
    from elastiformer.encoder import ElasticEncoder

Given = str | Pair | Image | Sequence[int]


@dataclass(frozen=True, slots=True)
class PlacedItems:
    """Items for an encoder, and the order that runs them."""

    served: Served
    order: Order
    name: str
    prepared: tuple[Prepared, ...]
    operation: str

    @property
    def encoder(self) -> ElasticEncoder:
        assert self.served.encoder is not None, "items are for an encoder"
        return self.served.encoder


def place_items(
    served: Served,
    resolved: Resolved,
    name: str,
    given: Sequence[Given],
    truncate: bool,
    field: str = "input",
) -> PlacedItems:
    """Raises InputError, CapacityError."""
    encoder = served.encoder
    assert encoder is not None, "items are for an encoder"
    several = len(given) > 1
    prepared = tuple(
        _prepared(encoder, each, truncate, f"{field}.{place}" if several else field)
        for place, each in enumerate(given)
    )
    jobs = tuple(
        Job(
            number=place,
            prompt=each.item.ids,
            capacity=resolved.applied,
            most_new=0,
            billed_tokens=len(each.item.ids),
            item=each.item,
        )
        for place, each in enumerate(prepared)
    )
    order = served.engine.checked(Order(jobs, resolved, GREEDY, field=field))
    operation = "embeddings" if encoder.task == Task.FEATURES else "classify"
    return PlacedItems(served, order, name, prepared, operation)


def refuse_labels(served: Served, labels: Sequence[str] | None) -> None:
    """Raises BadRequest: a head has labels of its own, and features have none."""
    assert served.encoder is not None, "a model with a head"
    if served.encoder.task == Task.FEATURES:
        raise BadRequest(
            f"model: {served.name!r} gives features; POST /v1/embeddings asks for them", "model"
        )
    if labels is not None:
        own = served.encoder.labels
        shown = ", ".join(own[:8]) + (", …" if len(own) > 8 else "")
        raise BadRequest(f"labels: {served.name!r} has labels of its own: {shown}", "labels")


def _prepared(encoder: ElasticEncoder, given: Given, truncate: bool, name: str) -> Prepared:
    inputs = encoder.inputs
    if isinstance(inputs, ImageItems):
        if not isinstance(given, Image):
            raise InputError(f'{name}: this model reads images: {{"image": data URI}}; got a text')
        return inputs.prepare(given.image, name)
    if isinstance(given, Image):
        raise InputError(f"{name}: this model reads text only; got an image")
    if isinstance(given, str):
        return inputs.prepare(given, None, truncate, name)
    if isinstance(given, Pair):
        return inputs.prepare(given.text, given.text_pair, truncate, name)
    vocabulary = encoder.config.vocab_size
    for place, token in enumerate(given):
        if not 0 <= token < vocabulary:
            raise InputError(
                f"{name}: token id {token} at place {place} is outside the vocabulary, "
                f"0 to {vocabulary - 1}"
            )
    ids = tuple(given)[: encoder.context] if truncate else tuple(given)
    if len(ids) > encoder.context:
        raise InputError(
            f"{name}: {len(ids)} tokens are more than the {encoder.context} that this model takes; "
            "truncate: true cuts it"
        )
    return Prepared(Item(ids))
