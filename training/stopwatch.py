"""Measured time and greedy text at each capacity, through the form that is served.

Capacities take turns within one run, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastiformer import Capacity, Chunk, ElasticModel
from elastiformer.sequence import Sequence as Request
from training.progress import track


@dataclass(frozen=True, slots=True)
class Timing:
    """Median milliseconds at one capacity, for one request alone."""

    capacity: float
    prefill_ms: float
    decode_ms: float  # for one generated token
    prefill_ratio: float  # over capacity 1.0 in the same run
    decode_ratio: float


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy text at one capacity beside the pretrained model's."""

    capacity: float
    tokens: int  # generated for each prompt
    agreement: float  # share of places that hold the same token
    same_prefix: float  # mean number of tokens until the first that differs
    spent: float
    spent_least: float
    spent_most: float


@torch.inference_mode()
def time_capacities(
    model: ElasticModel,
    ids_T: Tensor,
    capacities: Sequence[float],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
) -> list[Timing]:
    """Time the prompt in one chunk, then single tokens; `capacities` hold 1.0."""
    assert 1.0 in capacities, "ratios are over capacity 1.0"
    ids = ids_T.tolist()
    prefill: dict[float, list[float]] = {capacity: [] for capacity in capacities}
    decode: dict[float, list[float]] = {capacity: [] for capacity in capacities}
    turns = [capacity for _ in range(repeats + 1) for capacity in capacities]
    for turn, capacity in enumerate(track(turns, label="timing")):
        request = model.sequence(
            Capacity(capacity, capacity), prompt_tokens, prompt_tokens + decode_tokens
        )
        took = _seconds(model, request, ids[:prompt_tokens])
        each = [
            _seconds(model, request, [token])
            for token in ids[prompt_tokens : prompt_tokens + decode_tokens]
        ]
        request.release()
        if turn >= len(capacities):  # the first round only warms up
            prefill[capacity].append(took)
            decode[capacity] += each
    return [
        Timing(
            capacity=capacity,
            prefill_ms=1000 * statistics.median(prefill[capacity]),
            decode_ms=1000 * statistics.median(decode[capacity]),
            prefill_ratio=statistics.median(prefill[capacity]) / statistics.median(prefill[1.0]),
            decode_ratio=statistics.median(decode[capacity]) / statistics.median(decode[1.0]),
        )
        for capacity in capacities
    ]


@torch.inference_mode()
def greedy_texts(
    model: ElasticModel, prompts: Sequence[Sequence[int]], capacities: Sequence[float], tokens: int
) -> list[Greedy]:
    """Continue every prompt greedily at each capacity; `capacities` hold 1.0."""
    assert 1.0 in capacities, "what agrees, agrees with capacity 1.0"
    texts: dict[float, list[list[int]]] = {}
    spent: dict[float, list[float]] = {}
    for capacity in track(capacities, label="greedy text"):
        texts[capacity], spent[capacity] = _continued(model, prompts, capacity, tokens)
    return [
        _greedy(capacity, texts[capacity], texts[1.0], spent[capacity]) for capacity in capacities
    ]


def _continued(
    model: ElasticModel, prompts: Sequence[Sequence[int]], capacity: float, tokens: int
) -> tuple[list[list[int]], list[float]]:
    asked = Capacity(capacity, capacity)
    requests = [model.sequence(asked, len(ids), len(ids) + tokens) for ids in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    following: list[list[int]] = [list(ids) for ids in prompts]
    for _ in range(tokens):
        chunks = [Chunk(request, ids) for request, ids in zip(requests, following, strict=True)]
        following = [[int(logits_NV[-1].argmax())] for logits_NV in model.step(chunks)]
        for text, ids in zip(texts, following, strict=True):
            text += ids
    shares = [request.usage.capacity_spent for request in requests]
    for request in requests:
        request.release()
    return texts, shares


def _greedy(
    capacity: float, texts: list[list[int]], teacher: list[list[int]], spent: list[float]
) -> Greedy:
    same = [
        [mine == theirs for mine, theirs in zip(text, other, strict=True)]
        for text, other in zip(texts, teacher, strict=True)
    ]
    places = sum(map(len, same))
    prefixes = [[*each, False].index(False) for each in same]
    return Greedy(
        capacity=capacity,
        tokens=len(teacher[0]),
        agreement=sum(map(sum, same)) / places,
        same_prefix=sum(prefixes) / len(prefixes),
        spent=sum(spent) / len(spent),
        spent_least=min(spent),
        spent_most=max(spent),
    )


def _seconds(model: ElasticModel, request: Request, ids: list[int]) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    began = time.perf_counter()
    model.step([Chunk(request, ids)])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began
