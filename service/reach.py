"""What a ceiling or a default becomes where a request cannot go down to it.

A model's range holds for what its adapter can leave out of a request: one that leaves out image
tokens alone has nothing to leave out of text. A caller's own number is never lifted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from elastiformer.capacity import Capacity, Share
from elastiformer.errors import CapacityError
from elastiformer.imaged import Picture
from elastiformer.vlm import ElasticVlm
from service.engine import Engine
from service.knob import Resolved

_HUNDREDTHS = range(1, 101)

Serve = Callable[[Capacity], object]  # raises CapacityError for what cannot be served


def of_texts(
    engine: Engine, texts: Sequence[Sequence[int]], new: int | None, scored: bool = False
) -> Serve:
    """Prompts with so many tokens to follow; None: as many as are served, so one."""

    def serve(capacity: Capacity) -> None:
        for ids in texts:
            _serve(engine, capacity, len(ids), new, scored)

    return serve


def of_chat(
    engine: Engine,
    vlm: ElasticVlm,
    ids: tuple[int, ...],
    pictures: tuple[Picture, ...],
    new: int | None,
) -> Serve:
    """A conversation with these pictures, perhaps none, and so many tokens to follow."""

    def serve(capacity: Capacity) -> None:
        run = ids
        if pictures:
            prompt = vlm.prompt(capacity, ids, pictures)
            capacity, run = prompt.capacity, prompt.ids
        _serve(engine, capacity, len(run), new)

    return serve


def _serve(
    engine: Engine, capacity: Capacity, tokens: int, new: int | None, scored: bool = False
) -> None:
    # What is beyond the context is refused for that.
    most = min(tokens + (1 if new is None else new), engine.model.context)
    engine.model.blocks_for(capacity, tokens, most, scored)


def within_reach(resolved: Resolved, serve: Serve) -> Resolved:
    """What is applied, or where the model cannot go down to that, the least that it can.

    Raises:
        CapacityError: of what was resolved, if nothing that may be applied instead is served.
    """
    try:
        serve(resolved.applied)
        return resolved
    except CapacityError:
        most = _lifted(resolved, 1.0)
        if most == resolved.applied or not _serves(serve, most):
            raise
    at = bisect_left(
        _HUNDREDTHS, True, key=lambda least: _serves(serve, _lifted(resolved, least / 100))
    )
    return replace(resolved, applied=_lifted(resolved, _HUNDREDTHS[at] / 100), limited_by="model")


def as_run(resolved: Resolved, vlm: ElasticVlm) -> Resolved:
    """The same of a prompt with pictures, after which all runs whole if nothing of it can give."""
    applied = resolved.applied
    if vlm.outputs_give or not isinstance(applied.output, float) or applied.output == 1.0:
        return resolved
    return replace(resolved, applied=replace(applied, output=1.0), limited_by="model")


def _lifted(resolved: Resolved, least: float) -> Capacity:
    """What is applied, with no less than this of anything, but for what the caller named."""
    applied, most = resolved.applied, resolved.most
    return Capacity(
        _at_least(applied.prompt, least, most.prompt), _at_least(applied.output, least, most.output)
    )


def _at_least(share: Share, least: float, most: Share) -> Share:
    if not isinstance(share, float) or not isinstance(most, float):
        return share
    return min(max(share, least), max(share, most))


def _serves(serve: Serve, capacity: Capacity) -> bool:
    try:
        serve(capacity)
    except CapacityError:
        return False
    return True
