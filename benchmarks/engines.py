"""What is compared with the library at capacity 1.0: each engine as its own users call it.

All of them continue greedily, never stop at an end token, and run on the same weights, type of
numbers and threads. Engines that are not installed are left out by whoever asks.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import synchronize
from benchmarks.runs import feed_prompts, generate, timed
from elastiformer import Capacity, Chunk, ElasticModel

NO_END = -1  # as an end token: none is ever drawn
VLLM_MEMORY = 0.2  # share of the memory, as vLLM takes it whole at start
CONTEXT = 1024  # tokens that engines with a fixed size of cache are given room for


class Engine(Protocol):
    """Something that generates. Each way returns the seconds that it took."""

    def prefill(self, ids: Sequence[int]) -> float:
        """Run one prompt, up to its first token."""

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        """Continue one prompt; seconds for each token after the first."""

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Continue all prompts by so many tokens each, prompts included."""


class Ours:
    """The library at one capacity."""

    def __init__(self, model: ElasticModel, capacity: Capacity) -> None:
        self._model, self._capacity = model, capacity

    def prefill(self, ids: Sequence[int]) -> float:
        request = self._model.sequence(self._capacity, len(ids), len(ids))
        seconds = timed(self._model, lambda: feed_prompts(self._model, [request], [ids]))
        request.release()
        return seconds

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        request = self._model.sequence(self._capacity, len(ids), len(ids) + tokens)
        (logits_V,) = feed_prompts(self._model, [request], [ids])

        def go_on() -> None:
            nonlocal logits_V
            for _ in range(tokens):
                chunk = Chunk(request, [int(logits_V.argmax())])
                logits_V = self._model.step([chunk])[0][-1]

        seconds = timed(self._model, go_on)
        request.release()
        return seconds / tokens

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        capacities = [self._capacity] * len(prompts)
        return timed(self._model, lambda: generate(self._model, capacities, prompts, tokens))


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands over each token; the first is the prompt itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moments: list[float] = []

    def put(self, value: object) -> None:
        synchronize(self._device)
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


class Eager:
    """Transformers' `generate`, uncompiled; batches are padded on the left."""

    def __init__(self, model: ElasticModel) -> None:
        self._base: Any = model.base
        self._model = model

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> float:
        ids_1T = torch.tensor([list(ids)], device=self._model.device)
        return timed(self._model, lambda: self._base(ids_1T, use_cache=True, logits_to_keep=1))

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        clock = _Clock(self._model.device)
        ids_1T = torch.tensor([list(ids)], device=self._model.device)
        self._base.generate(ids_1T, generation_config=_greedy(tokens + 1), streamer=clock)
        first, last = clock.moments[1], clock.moments[-1]
        return (last - first) / (len(clock.moments) - 2)

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        longest = max(map(len, prompts))
        padded_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(padded_BT)
        for row, ids in enumerate(prompts):
            padded_BT[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BT[row, longest - len(ids) :] = 1
        device = self._model.device
        return timed(
            self._model,
            lambda: self._base.generate(
                padded_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=_greedy(tokens),
            ),
        )


class OneByOne(Eager):
    """Transformers' `generate`, one prompt after the other: what a batch is without padding."""

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        return sum(super(OneByOne, self).batch([ids], tokens) for ids in prompts)


class Continuous:
    """Transformers' continuous batching, over a copy of the model: it changes its attention."""

    def __init__(self, model: ElasticModel, step_tokens: int, room_tokens: int) -> None:
        self._model = model
        self._base: Any = copy.deepcopy(model.base)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        page = 32
        self._settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=room_tokens // page + 1,
            max_batch_tokens=step_tokens,
            allow_block_sharing=False,  # the same prompts come again in every round
        )

    def prefill(self, ids: Sequence[int]) -> float:
        return self.batch([ids], 1)

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        return (self.batch([ids], tokens + 1) - self.batch([ids], 1)) / tokens

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        found: dict[str, Any] = {}

        def work() -> None:
            found.update(
                self._base.generate_batch(
                    [list(ids) for ids in prompts],
                    generation_config=_greedy(tokens),
                    continuous_batching_config=self._settings,
                    persistent_manager=True,
                )
            )

        seconds = timed(self._model, work)
        made = [len(each.generated_tokens) for each in found.values()]
        if made != [tokens] * len(prompts):
            raise RuntimeError(f"continuous batching made {made} tokens, not {tokens} each")
        return seconds

    def close(self) -> None:
        self._base.destroy_cached_continuous_batching_manager()


class LlamaCpp:
    """llama.cpp through its Python binding, which runs one sequence at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        self._llama: Any = importlib.import_module("llama_cpp").Llama(
            str(path),
            n_ctx=CONTEXT,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self, ids: Sequence[int]) -> float:
        self._llama.reset()
        began = time.perf_counter()
        self._llama.eval(list(ids))
        return time.perf_counter() - began

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        self.prefill(ids)
        began = time.perf_counter()
        for _ in range(tokens):
            self._llama.eval([self._llama.sample(temp=0.0)])
        return (time.perf_counter() - began) / tokens

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        began = time.perf_counter()
        for ids in prompts:
            self.decode(ids, tokens)
        return time.perf_counter() - began

    def close(self) -> None:
        self._llama.close()


class Vllm:
    """vLLM in this process, without a prefix cache: the same prompts come again."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._llm: Any = self._vllm.LLM(
            str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=CONTEXT,
            gpu_memory_utilization=VLLM_MEMORY,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def prefill(self, ids: Sequence[int]) -> float:
        return self.batch([ids], 1)

    def decode(self, ids: Sequence[int], tokens: int) -> float:
        return (self.batch([ids], tokens + 1) - self.batch([ids], 1)) / tokens

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        settings = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        began = time.perf_counter()
        self._llm.generate(asked, settings, use_tqdm=False)
        return time.perf_counter() - began


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=NO_END, pad_token_id=0
    )
