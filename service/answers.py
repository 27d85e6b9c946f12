"""The HTTP contract of answers: usage, the `elasti` object, choices, chunks and labels.

Completions and chat differ in shape only; each shape is a class with the same three methods.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastiformer.capacity import Unit
from elastiformer.inputs import Offsets, TextInputs
from elastiformer.sampling import Sampled
from elastiformer.usage import Usage
from service.desk import Placed, PlacedLabels
from service.items import PlacedItems
from service.metrics import TOKEN_UNITS
from service.orders import Done, Encoded, Event, Generated, Scored, Summary
from service.zero_shot import probabilities

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class Choice:
    """One sequence's answer while it is gathered."""

    text: str = ""
    sampled: list[Sampled] = field(default_factory=list)
    scored: tuple[Sampled, ...] = ()
    ended: str | None = None
    outputs: Tensor | None = None  # an encoder's

    def take(self, event: Scored | Generated | Encoded) -> None:
        if isinstance(event, Encoded):
            self.outputs = event.outputs
            return
        if isinstance(event, Scored):
            self.scored = event.sampled
            return
        self.text += event.text
        self.ended = event.ended
        if event.sampled is not None:
            self.sampled.append(event.sampled)


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything that a ticket delivered."""

    choices: tuple[Choice, ...]
    summary: Summary


async def gather(events: AsyncIterator[Event], jobs: int) -> Answer:
    """Wait for the ending; raises what the order failed with."""
    choices = tuple(Choice() for _ in range(jobs))
    async for event in events:
        if isinstance(event, Done):
            return Answer(choices, event.summary)
        if isinstance(event, Scored | Generated | Encoded):
            choices[event.number].take(event)
    raise AssertionError("events end with Done or an error")


def usage_json(summary: Summary) -> Json:
    """OpenAI's usage, and what was computed for it."""
    compute = compute_json(summary.usage)
    if summary.energy_joules is not None:
        compute["energy_joules"] = round(summary.energy_joules, 6)
    return {
        **counts_json(summary.prompt_tokens, summary.generated_tokens),
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
        "compute": compute,
    }


def counts_json(prompt_tokens: int, generated_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated_tokens,
        "total_tokens": prompt_tokens + generated_tokens,
    }


def compute_json(usage: Usage) -> Json:
    return {
        "flops": usage.flops,
        "dense_flops": usage.dense_flops,
        "block_flops": usage.block_flops,
        "dense_block_flops": usage.dense_block_flops,
        "parameters_used": usage.parameters_used,
        "dense_parameters": usage.dense_parameters,
        "tokens_routed": {unit.value: usage.unit_routed(unit) for unit in TOKEN_UNITS},
        "tokens_skipped": {unit.value: usage.unit_skipped(unit) for unit in TOKEN_UNITS},
        "heads_skipped": usage.unit_skipped(Unit.HEADS),
        "experts_skipped": usage.unit_skipped(Unit.EXPERTS),
        "channels_skipped": usage.unit_skipped(Unit.CHANNELS),
    }


def elasti_json(placed: Placed | PlacedLabels | PlacedItems, summary: Summary) -> Json:
    resolved = placed.order.resolved
    first = summary.first_token_seconds
    return {
        "capacity_requested": resolved.requested,
        "capacity_applied": resolved.applied.as_json(),
        "capacity_spent": summary.usage.capacity_spent,
        "limited_by": resolved.limited_by,
        "queue_ms": _milliseconds(summary.queue_seconds),
        "time_to_first_token_ms": None if first is None else _milliseconds(first),
        "total_ms": _milliseconds(summary.total_seconds),
    }


class CompletionShape:
    """`text_completion`: texts beside lists of tokens."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._inputs = placed.served.engine.inputs
        self._head = head_json("cmpl", "text_completion", placed.name)
        self._offsets: dict[int, Offsets] = {}  # of each choice's new text

    def whole(self, answer: Answer) -> Json:
        choices = [
            {
                "index": number,
                "text": self._echo(number) + choice.text,
                "logprobs": self._logprobs(number, choice.scored, choice.sampled, True),
                "finish_reason": choice.ended or "length",
            }
            for number, choice in enumerate(answer.choices)
        ]
        return {**self._head, "choices": choices}

    def opening(self, number: int, scored: tuple[Sampled, ...]) -> Json | None:
        """The chunk before a choice's first token: the prompt, where it is given back."""
        if not self._placed.echoes:
            return None
        logprobs = self._logprobs(number, scored, (), True)
        return self._chunk(number, self._echo(number), logprobs, None)

    def chunk(self, event: Generated) -> Json:
        sampled = [event.sampled] if event.sampled is not None else []
        logprobs = self._logprobs(event.number, (), sampled, False)
        return self._chunk(event.number, event.text, logprobs, event.ended)

    def closing(self, number: int) -> Json:
        """The last chunk of a choice that generates nothing."""
        return self._chunk(number, "", None, "length")

    def empty(self) -> Json:
        return {**self._head, "choices": []}

    def _chunk(self, number: int, text: str, logprobs: Json | None, ended: str | None) -> Json:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": ended}
        return {**self._head, "choices": [choice]}

    def _prompt(self, number: int) -> tuple[int, ...]:
        return self._placed.echoes[number // self._placed.order.choices]

    def _echo(self, number: int) -> str:
        return self._inputs.decode(self._prompt(number)) if self._placed.echoes else ""

    def _logprobs(
        self, number: int, scored: Sequence[Sampled], sampled: Sequence[Sampled], opens: bool
    ) -> Json | None:
        if self._placed.logprobs is None:
            return None
        listed: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if opens and self._placed.echoes:  # nothing stands before the first token
            known = [Sampled(self._prompt(number)[0]), *scored]
            self._list(listed, known, Offsets(self._inputs.tokenizer))
        if number not in self._offsets:
            self._offsets[number] = Offsets(self._inputs.tokenizer, len(self._echo(number)))
        self._list(listed, sampled, self._offsets[number])
        return listed

    def _list(self, listed: Json, entries: Sequence[Sampled], offsets: Offsets) -> None:
        for entry in entries:
            piece = self._inputs.piece(entry.token)
            own = entry.logprob
            top = None
            if own is not None:
                top = {
                    self._inputs.piece(likely.token).text: _finite(likely.logprob)
                    for likely in reversed(entry.top)
                }
                # Two tokens may share a text; the likelier one is written last and stays.
            listed["tokens"].append(piece.text)
            listed["token_logprobs"].append(None if own is None else _finite(own))
            listed["top_logprobs"].append(top)
            listed["text_offset"].append(offsets.push(entry.token, piece.text))


class ChatShape:
    """`chat.completion`: messages beside lists of tokens."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._inputs = placed.served.engine.inputs
        self._id_head = head_json("chatcmpl", "chat.completion", placed.name)
        self._chunk_head = {**self._id_head, "object": "chat.completion.chunk"}

    def whole(self, answer: Answer) -> Json:
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.sampled),
                "finish_reason": choice.ended or "length",
            }
            for number, choice in enumerate(answer.choices)
        ]
        return {**self._id_head, "choices": choices}

    def opening(self, number: int, scored: tuple[Sampled, ...]) -> Json | None:
        """The chunk before a choice's first token: who speaks."""
        return self._chunk(number, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, event: Generated) -> Json:
        sampled = [event.sampled] if event.sampled is not None else []
        delta = {"content": event.text} if event.text or not event.ended else {}
        return self._chunk(event.number, delta, self._logprobs(sampled), event.ended)

    def closing(self, number: int) -> Json:
        """The last chunk of a choice that generates nothing."""
        return self._chunk(number, {}, None, "length")

    def empty(self) -> Json:
        return {**self._chunk_head, "choices": []}

    def _chunk(self, number: int, delta: Json, logprobs: Json | None, ended: str | None) -> Json:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": ended}
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, sampled: Sequence[Sampled]) -> Json | None:
        if self._placed.logprobs is None:
            return None
        content = [
            {
                **_token_json(self._inputs, each.token, each.logprob),
                "top_logprobs": [
                    _token_json(self._inputs, likely.token, likely.logprob) for likely in each.top
                ],
            }
            for each in sampled
        ]
        return {"content": content, "refusal": None}


Shape = CompletionShape | ChatShape


def classification_json(placed: PlacedLabels, answer: Answer) -> Json:
    """`/v1/classify`: per text the likeliest label and the probability of each."""
    data = []
    for index, scores in enumerate(label_scores(placed, answer)):
        probs = probabilities(scores)
        data.append(
            {
                "index": index,
                "label": placed.labels[probs.index(max(probs))],
                "probs": probs,
                "num_classes": len(probs),
                "labels": list(placed.labels),
            }
        )
    return {**head_json("classify", "list", placed.name), "data": data}


def prediction_json(placed: PlacedLabels, answer: Answer, raw: bool) -> list[list[Json]]:
    """`/predict`: per text all labels, the likeliest first."""
    predictions = []
    for scores in label_scores(placed, answer):
        values = scores if raw else probabilities(scores)
        pairs = sorted(zip(placed.labels, values, strict=True), key=lambda pair: -pair[1])
        predictions.append([{"label": label, "score": value} for label, value in pairs])
    return predictions


def label_scores(placed: PlacedLabels, answer: Answer) -> list[list[float]]:
    """The log-likelihood of each label after each text."""
    scores = [
        sum(_finite(token.logprob or 0.0) for token in choice.scored) for choice in answer.choices
    ]
    width = len(placed.labels)
    return [scores[start : start + width] for start in range(0, len(scores), width)]


def head_json(prefix: str, kind: str, model: str) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _token_json(inputs: TextInputs, token: int, logprob: float | None) -> Json:
    piece = inputs.piece(token)
    return {
        "token": piece.text,
        "logprob": _finite(logprob if logprob is not None else LEAST_LOGPROB),
        "bytes": list(piece.raw),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
