"""A prompt with images: which image tokens stay, and where each token stands in what was sent.

Dropped image tokens never reach the language model, so what runs is shorter than what was sent.
A token's *place* counts what runs and is where its keys lie in the cache; its *original* position
counts what was sent and is what it is rotated by. How many tokens of an image stay is known when
the prompt is made; which ones, when the projector has spoken.

Shape letters: C colours   H rows   W columns   P image tokens   K kept ones   D width
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from elastiformer.cache import SequenceCache
from elastiformer.capacity import Capacity, Phase
from elastiformer.priced import PricedPlan
from elastiformer.sequence import Sequence as TextSequence


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A processed image of so many image tokens; `digest` is a hash of its pixels."""

    pixels_CHW: Tensor
    tokens: int
    digest: int


@dataclass(frozen=True, slots=True, eq=False)
class PlacedPicture:
    """A picture in a prompt, of which `kept` tokens run."""

    picture: Picture
    place: int  # of its first kept token
    origin: int  # the original position of its first token
    kept: int

    @property
    def end(self) -> int:
        """The place after its last kept token."""
        return self.place + self.kept

    @property
    def dropped(self) -> int:
        return self.picture.tokens - self.kept


@dataclass(frozen=True)
class ImagedPrompt:
    """A prompt as it runs: `ids` of the tokens that stay, `tokens` as many as were sent.

    `capacity` is what is left to ask of the language model, whose first `opening` tokens of phase
    output run whole.
    """

    ids: tuple[int, ...]
    tokens: int
    pictures: tuple[PlacedPicture, ...]
    capacity: Capacity
    opening: int = 0

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        image_token: int,
        pictures: Sequence[Picture],
        kept: Sequence[int],
        capacity: Capacity,
        opening: int = 0,
    ) -> ImagedPrompt:
        """A prompt in whose `ids` each run of `image_token` is as long as its picture."""
        running: list[int] = []
        placed: list[PlacedPicture] = []
        at = 0
        for picture, count in zip(pictures, kept, strict=True):
            first = ids.index(image_token, at)
            running += ids[at:first]
            placed.append(PlacedPicture(picture, len(running), first, count))
            running += [image_token] * count
            at = first + picture.tokens
            assert set(ids[first:at]) == {image_token}, "fewer image tokens than the picture has"
        running += ids[at:]
        assert image_token not in ids[at:], "image tokens without a picture"
        return cls(tuple(running), len(ids), tuple(placed), capacity, opening)

    @property
    def dropped(self) -> int:
        return self.tokens - len(self.ids)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """What tells stored beginnings apart: the ids, and for image tokens what is seen there.

        Which tokens of an image stay follows from its pixels and their number.
        """
        keys = list(self.ids)
        for placed in self.pictures:
            seen = (placed.picture.digest << 32 | placed.kept) << 32
            for number in range(placed.kept):
                keys[placed.place + number] = -1 - (seen | number)
        return tuple(keys)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """The kept tokens of one picture: their features, and their numbers among all, ascending."""

    features_KD: Tensor
    number_K: np.ndarray


class ImagedSequence(TextSequence):
    """A request whose prompt holds images. Made by `ElasticVlm.sequence`."""

    def __init__(
        self,
        plan_at: Callable[[Phase, int], PricedPlan],
        most_tokens: int,
        cache: SequenceCache,
        imaged: ImagedPrompt,
    ) -> None:
        super().__init__(plan_at, len(imaged.ids), most_tokens, False, cache)
        self.imaged = imaged
        self.shown: dict[PlacedPicture, Shown] = {}  # by identity
        self._ends = [placed.end for placed in imaged.pictures]

    @property
    def unseen(self) -> list[PlacedPicture]:
        """The pictures that are still to run and were not looked at."""
        to_run = [placed for placed in self.imaged.pictures if placed.end > self.length]
        return [placed for placed in to_run if placed not in self.shown]

    def forget(self) -> None:
        """Drop the features of pictures that have run; their numbers are never asked for again."""
        for placed in [placed for placed in self.shown if placed.end <= self.length]:
            del self.shown[placed]

    @property
    def moved(self) -> bool:
        return self.imaged.dropped > 0

    def original(self, place: int) -> int:
        placed, before = self._around(place)
        if placed is None or place < placed.place:
            return place + before
        return placed.origin + int(self.shown[placed].number_K[place - placed.place])

    def dense_extent(self, tokens: int) -> tuple[int, int]:
        stop = self._begins(self.length + tokens)
        return stop - self._begins(self.length), stop

    def _begins(self, place: int) -> int:
        """How many tokens were sent before those that belong to `place`.

        What is dropped in front of an image's first kept token belongs to that one.
        """
        placed, before = self._around(place)
        if placed is None or place <= placed.place:
            return place + before
        return self.original(place)

    def _around(self, place: int) -> tuple[PlacedPicture | None, int]:
        """The first picture that does not end before `place`, and what those before it dropped."""
        at = bisect_right(self._ends, place)
        before = sum(placed.dropped for placed in self.imaged.pictures[:at])
        return (self.imaged.pictures[at] if at < len(self._ends) else None), before
