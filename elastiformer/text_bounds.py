"""How long a text can be, at most, that fits a context: known before it is tokenized.

A byte-level tokenizer spells every byte of a text that it knows, so what it spells is at most as
long as the context times the longest token. Others have tokens that stand for any length, as one
for every unknown word, or leave white space out: of these nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastiformer.errors import InputError

# By normalizer, at most so many bytes become one: of composed characters 3.5.
_SHRINKING = {None: 1, "NFC": 4}
_NEVER = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])  # stand in no text


@dataclass(frozen=True, slots=True)
class _Spelling:
    """What every token stands for at most, and what stands in none."""

    token_bytes: int
    unspelt: bytes


class TextBound:
    """The most of a text that can fit a context, by its tokenizer."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context

    def check(self, text: str, name: str, cure: str = "") -> None:
        """Refuse what fits in no case; what is let through may still be too long.

        Args:
            cure: what a caller can do about it.

        Raises:
            InputError: naming the text's length, the context and the longest token.
        """
        if len(text) <= self._context or (spelling := self._spelling) is None:
            return
        size = len(text.encode(errors="surrogatepass").translate(None, spelling.unspelt))
        if size > spelling.token_bytes * self._context:
            raise InputError(
                f"{name}: a text of {size} bytes is more than the context of {self._context} "
                f"tokens, none of which stands for more than {spelling.token_bytes}{cure}"
            )

    @cached_property
    def _spelling(self) -> _Spelling | None:
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        model, added = described["model"], described["added_tokens"]
        shrinking = _SHRINKING.get((described["normalizer"] or {}).get("type"))
        steps = list(_steps(described["pre_tokenizer"] or {}))
        spells = any(step.get("type") == "ByteLevel" for step in steps)
        if model["type"] != "BPE" or shrinking is None or not spells:
            return None
        if not all(map(_keeps_all, steps)):
            return None
        # These take white space beside them along, of any length.
        if any(token["lstrip"] or token["rstrip"] for token in added):
            return None
        known = model["vocab"]
        unspelt = bytes(byte for letter, byte in BYTE_OF_LETTER.items() if letter not in known)
        if shrinking > 1 and set(unspelt) - set(_NEVER):
            return None  # what is unspelt would be known only of the composed text
        longest = max(map(len, known))
        of_added = max((len(token["content"].encode()) for token in added), default=0)
        return _Spelling(shrinking * max(longest, of_added), unspelt)


def _steps(described: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer's steps, one after the other."""
    if described.get("type") == "Sequence":
        for each in described["pretokenizers"]:
            yield from _steps(each)
    else:
        yield described


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer only divides a text, and leaves nothing of it out."""
    if step.get("type") == "Split":
        return bool(step["behavior"] != "Removed")
    return step.get("type") in ("ByteLevel", "Digits")


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable letter (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
