"""Texts, pairs and images into items, by the encoder's own tokenizer or image processor.

What the model cannot take is refused here, with the number that was exceeded; a text is cut only
where that was asked. This file knows no HTTP and no model weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastiformer.errors import InputError
from elastiformer.images import decode
from elastiformer.sequence import Item
from elastiformer.text_bounds import TextBound


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token stands: its number in the item, its piece, and its characters in the text."""

    token: int
    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """An item, and of a text the places of the tokens that are not special."""

    item: Item
    places: tuple[Place, ...] = ()


class TextItems:
    """A tokenizer with the bound of its model; safe to share between threads."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer, self.context = tokenizer, context
        self._bound = TextBound(tokenizer, context)
        # A fast tokenizer is changed for the length of a call when its truncation differs.
        self._encoding = threading.Lock()

    def prepare(
        self, text: str, pair: str | None = None, truncate: bool = False, name: str = "input"
    ) -> Prepared:
        """A text, or two that are read as a pair.

        Args:
            truncate: whether what is too long is cut, the longer one of a pair first.

        Raises:
            InputError: longer than the model takes, or no token at all.
        """
        if not truncate:
            for each in (text, pair or ""):
                self._bound.check(each, name, cure="; truncate: true cuts it")
        with self._encoding:
            # Not verbose: what is too long is refused here, with the numbers.
            given = self._tokenizer(
                text,
                pair,
                truncation=truncate,
                max_length=self.context if truncate else None,
                return_special_tokens_mask=True,
                return_offsets_mapping=bool(self._tokenizer.is_fast),
                return_token_type_ids=True,
                verbose=False,
            )
        ids: list[int] = given["input_ids"]
        if not ids:
            raise InputError(f"{name}: it holds no token; at least one is needed")
        if len(ids) > self.context:
            raise InputError(
                f"{name}: {len(ids)} tokens are more than the {self.context} that this model "
                "takes; truncate: true cuts it"
            )
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        offsets = given.get("offset_mapping") or ((0, 0),) * len(ids)
        places = [
            Place(token, str(pieces[token]), start, end)
            for token, (special, (start, end)) in enumerate(
                zip(given["special_tokens_mask"], offsets, strict=True)
            )
            if not special
        ]
        types = given.get("token_type_ids")
        return Prepared(Item(tuple(ids), None if types is None else tuple(types)), tuple(places))


class ImageItems:
    """An image processor, and what makes its pixels an item."""

    def __init__(self, processor: Any, channels: int, item: Callable[[Tensor], Item]) -> None:
        self._processor, self.mode, self._item = processor, _MODES[channels], item

    def prepare(self, uri: str, name: str = "input") -> Prepared:
        """An image in a data URI.

        Raises:
            InputError: see images.py.
        """
        image = np.array(decode(uri, self.mode, name))
        return Prepared(self.item(image))

    def item(self, image_HWC: np.ndarray) -> Item:
        """An image's numbers, 0 to 255, as the model reads them."""
        channels_CHW = image_HWC[None] if image_HWC.ndim == 2 else image_HWC.transpose(2, 0, 1)
        given = self._processor(
            images=np.ascontiguousarray(channels_CHW),
            return_tensors="pt",
            input_data_format="channels_first",
        )
        pixels_CHW: Tensor = given["pixel_values"][0]
        return self._item(pixels_CHW.to(torch.float32))


_MODES = {1: "L", 3: "RGB"}
