"""Conversations with images: data URIs become pictures, and the prompt holds their tokens.

The text around them is rendered by the model's own chat template, which says where an image
stands. This file knows no HTTP and no model weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from elastiformer.encoder_inputs import ImageItems
from elastiformer.errors import InputError
from elastiformer.imaged import Picture
from elastiformer.images import decode_bytes
from elastiformer.inputs import TextInputs
from elastiformer.sequence import Item

TYPES = ("text", "image_url")


class PictureInputs:
    """An image processor, and the token that stands for an image in a prompt."""

    def __init__(self, processor: Any, channels: int, tokens: int, image_token: int) -> None:
        self._items = ImageItems(processor, channels, self._item)
        self._tokens, self.image_token = tokens, image_token

    def picture(self, uri: str, name: str) -> Picture:
        """An image in a data URI.

        Raises:
            InputError: see images.py.
        """
        pixels_CHW = self._items.prepare(uri, name).item.pixels_CHW
        assert pixels_CHW is not None, "an image without pixels"
        return picture_of(pixels_CHW, self._tokens)

    def read(self, content: bytes, name: str) -> Picture:
        """An image in a file's bytes.

        Raises:
            InputError: see images.py.
        """
        image = np.array(decode_bytes(content, self._items.mode, name))
        pixels_CHW = self._items.item(image).pixels_CHW
        assert pixels_CHW is not None, "an image without pixels"
        return picture_of(pixels_CHW, self._tokens)

    def expanded(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids with as many image tokens as an image has, for each that stands there."""
        running: list[int] = []
        for token in ids:
            running += [token] * (self._tokens if token == self.image_token else 1)
        return tuple(running)

    def chat(
        self, inputs: TextInputs, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[int, ...], tuple[Picture, ...]]:
        """The ids of a conversation, each image's tokens among them, and its pictures.

        Raises:
            InputError: a part of another type, an image that cannot be read, no chat template, or
                a text that spells the image token.
        """
        pictures: list[Picture] = []
        plain = [
            {**message, "content": self._parts(message.get("content"), place, pictures)}
            for place, message in enumerate(messages)
        ]
        return self._conversation(inputs, plain, len(pictures), "messages"), tuple(pictures)

    def question(
        self,
        inputs: TextInputs,
        text: str,
        images: int = 0,
        any_length: bool = False,
        name: str = "messages",
    ) -> tuple[int, ...]:
        """The ids of one message of the user: so many images, then a text.

        Args:
            any_length: also of a text that can fit no context, to be cut.

        Raises:
            InputError: as `chat`.
        """
        parts = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        message = {"role": "user", "content": parts}
        return self._conversation(inputs, [message], images, name, any_length)

    def _conversation(
        self,
        inputs: TextInputs,
        plain: Sequence[Mapping[str, Any]],
        images: int,
        name: str,
        any_length: bool = False,
    ) -> tuple[int, ...]:
        ids = inputs.conversation(plain, any_length, name)
        if ids.count(self.image_token) != images:
            spelled = inputs.piece(self.image_token).text
            raise InputError(
                f"{name}: they hold {images} images, and {spelled!r} stands "
                f"{ids.count(self.image_token)} times in the prompt; a text must not spell it"
            )
        return self.expanded(ids)

    def refuse_image_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises InputError where a prompt without pictures holds their token."""
        for ids in prompts:
            if self.image_token in ids:
                raise InputError(
                    f"prompt: token {self.image_token} stands for an image, and none is here; "
                    "images come with /v1/chat/completions"
                )

    def _parts(self, content: object, place: int, pictures: list[Picture]) -> list[dict[str, str]]:
        if content is None:
            return []
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        assert isinstance(content, Sequence), f"content of a {type(content).__name__}"
        parts: list[dict[str, str]] = []
        for number, part in enumerate(content):
            name = f"messages.{place}.content.{number}"
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                if not isinstance(text := part.get("text"), str):
                    raise InputError(
                        f"{name}.text: a part of type 'text' holds a string; got {text!r}"
                    )
                parts.append({"type": "text", "text": text})
            elif kind == "image_url":
                pictures.append(self.picture(_address(part.get("image_url"), name), name))
                parts.append({"type": "image"})
            else:
                raise InputError(f"{name}: a part is one of {', '.join(TYPES)}; got {kind!r}")
        return parts

    def _item(self, pixels_CHW: Tensor) -> Item:
        return Item(tuple(range(self._tokens)), pixels_CHW=pixels_CHW)


def picture_of(pixels_CHW: Tensor, tokens: int) -> Picture:
    """Processed pixels as a picture of so many image tokens."""
    digest = hashlib.sha256(pixels_CHW.contiguous().numpy().tobytes()).digest()
    return Picture(pixels_CHW, tokens, int.from_bytes(digest, "big"))


def _address(given: object, name: str) -> str:
    address = given.get("url") if isinstance(given, Mapping) else None
    if not isinstance(address, str):
        raise InputError(f'{name}.image_url: {{"url": data URI}}; got {address!r}')
    return address
