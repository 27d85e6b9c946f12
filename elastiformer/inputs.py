"""Text into token ids and back, by the base model's own tokenizer and chat template.

A prompt that the model cannot take is refused here, with the number that was exceeded. The way
back is incremental: `Detokenizer` never emits half a character, `StopMatcher` never emits half a
stop string. This file knows no HTTP and no model weights.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from elastiformer.errors import InputError
from elastiformer.text_bounds import BYTE_OF_LETTER, TextBound

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BOUNDARIES_KEPT = 5  # a decoder may look a few tokens back, at a space for example
_UNFINISHED = 3  # tokens that a character may still lack its last byte after: it has four at most


class TextInputs:
    """A tokenizer with the bounds of its model; safe to share between threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context
        self._bound = TextBound(tokenizer, context)
        # A fast tokenizer is changed for the length of a call when its truncation differs.
        self._encoding = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text(
        self, text: str, special_tokens: bool = True, any_length: bool = False, name: str = "prompt"
    ) -> tuple[int, ...]:
        """The ids of a text, special tokens added as the tokenizer does for a prompt.

        Args:
            any_length: also of one that can fit no context, to be cut.
            name: the field that it came in.

        Raises:
            InputError: the text gives no token, or can fit no context.
        """
        if not any_length:
            # Tokenizing takes seconds where others wait for the lock.
            self._bound.check(text, name)
        with self._encoding:
            # Not verbose: what is too long is refused here, with the numbers.
            ids = self.tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False)
        return self.ids(ids)

    def ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids as given.

        Raises:
            InputError: no id at all, or one outside the vocabulary.
        """
        if not ids:
            raise InputError("prompt: it holds no token; at least one is needed")
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocabulary:
                raise InputError(
                    f"prompt: token id {token} at place {place} is outside the vocabulary, "
                    f"0 to {self.vocabulary - 1}"
                )
        return tuple(ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        any_length: bool = False,
        name: str = "messages",
    ) -> tuple[int, ...]:
        """The ids of a conversation, up to where the model's answer begins.

        Args:
            any_length, name: as `text`.

        Raises:
            InputError: no chat template, a part that is not text, a refusal by the template, or
                more than can fit any context.
        """
        plain = [
            {**message, "content": _plain_text(message.get("content"), place)}
            for place, message in enumerate(messages)
        ]
        return self.conversation(plain, any_length, name)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        any_length: bool = False,
        name: str = "messages",
    ) -> tuple[int, ...]:
        """The ids of messages whose content is as the model's chat template takes it.

        Args:
            any_length, name: as `text`.

        Raises:
            InputError: no chat template, a refusal by it, or more than can fit any context.
        """
        if not self.has_chat_template:
            raise InputError(
                "messages: this model has no chat template; use /v1/completions with a prompt"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"messages: the model's chat template refused them: {error}") from None
        return self.text(rendered, special_tokens=False, any_length=any_length, name=name)

    def room(self, prompt_tokens: int, name: str = "prompt") -> int:
        """How many tokens may follow a prompt.

        Raises:
            InputError: the prompt alone is longer than the context; names both numbers.
        """
        if prompt_tokens > self.context:
            raise InputError(
                f"{name}: {prompt_tokens} tokens are more than the context of {self.context}"
            )
        return self.context - prompt_tokens

    def checked_room(
        self,
        prompt_tokens: int,
        most_new: int,
        name: str = "max_tokens",
        prompt_name: str = "prompt",
    ) -> None:
        """Refuse a prompt and an answer that do not fit the context together.

        Args:
            name: what says how long the answer may be.
            prompt_name: what the prompt came in.

        Raises:
            InputError: naming all three numbers.
        """
        room = self.room(prompt_tokens, prompt_name)
        if most_new > room:
            raise InputError(
                f"{name}: {prompt_tokens} prompt tokens and up to {most_new} new ones are more "
                f"than the context of {self.context}"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of finished tokens, special ones left out."""
        return decoded(self.tokenizer, ids, skip_special=True)

    def piece(self, token: int) -> Piece:
        """One token by itself, as log-probabilities name it."""
        text = decoded(self.tokenizer, [token], skip_special=False)
        if HALF_CHARACTER not in text:
            return Piece(text, text.encode())
        raw = _raw_bytes(self.tokenizer.convert_ids_to_tokens(token))
        if raw is None:
            return Piece(text, text.encode())
        return Piece("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text, and its bytes; a token of half a character is written out as bytes."""

    text: str
    raw: bytes


class Detokenizer:
    """Turns a growing list of tokens into growing text, one whole character at a time.

    The parts add up to the text of all tokens decoded at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Places where the text so far ended with a whole character; decoding starts at one.
        self._boundaries: deque[int] = deque([0], maxlen=_BOUNDARIES_KEPT)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        return self._new_text(whole=True)

    def flush(self) -> str:
        """What is left at the end, an unfinished character included."""
        return self._new_text(whole=False)

    def _new_text(self, whole: bool) -> str:
        start, done = self._boundaries[0], self._boundaries[-1]
        before = decoded(self._tokenizer, self._ids[start:done], skip_special=True)
        now = decoded(self._tokenizer, self._ids[start:], skip_special=True)
        end = len(self._ids)
        if whole and now.endswith(HALF_CHARACTER):
            # Bytes that are no characters are let go, or all of them would be decoded every time.
            end -= _UNFINISHED
            if end <= done:
                return ""
            certain = decoded(self._tokenizer, self._ids[start:end], skip_special=True)
            if certain + decoded(self._tokenizer, self._ids[end:], skip_special=True) != now:
                return ""
            now = certain
        self._boundaries.append(end)
        return now[len(before) :]


class Offsets:
    """Where each token of a growing text begins in it, in characters.

    Tokens that share a character all begin where it does; a token without text, as a special one,
    begins where the next text does.
    """

    def __init__(self, tokenizer: Any, start: int = 0) -> None:
        """
        Args:
            start: the characters before it.
        """
        self._text = Detokenizer(tokenizer)
        self._length = start

    def push(self, token: int, text: str) -> int:
        """The place of the next token, whose text by itself is given."""
        start, new = self._length, self._text.push(token)
        self._length += len(new)
        if HALF_CHARACTER in new and text and new.endswith(text):
            return self._length - len(text)  # what was held back before it was no character
        return start


class StopMatcher:
    """Lets text through until a stop string appears; the stop string itself stays inside.

    What might be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certainly not part of a stop string."""
        assert not self.stopped, "no text may follow a stop string"
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def decoded(tokenizer: Any, ids: Sequence[int], skip_special: bool) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _plain_text(content: object, place: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    assert isinstance(content, Sequence), f"content of a {type(content).__name__}"
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        name = f"messages.{place}.content.{number}"
        if kind != "text":
            raise InputError(f"{name}: this model reads text only; got a part of type {kind!r}")
        if not isinstance(text := part.get("text"), str):
            raise InputError(f"{name}.text: a part of type 'text' holds a string; got {text!r}")
        texts.append(text)
    return "".join(texts)


def _raw_bytes(piece: str) -> bytes | None:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(letter in BYTE_OF_LETTER for letter in piece):
        return bytes(BYTE_OF_LETTER[letter] for letter in piece)
    return None
