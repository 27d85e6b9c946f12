"""ElasticModel: a pretrained causal LM whose every token may run under its own plan.

The base stays as it is, frozen and shared. `step` runs the sparse form, for serving; `masked` the
differentiable one, for training; `teacher` the base itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Many
from functools import cached_property
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastiformer.adapter import Adapter, blank
from elastiformer.cache import CacheShape, SequenceCache, blocks_of
from elastiformer.capacity import Capacity, Plan
from elastiformer.costs import CostTable
from elastiformer.elastic import NO_ROUTING, Elastic
from elastiformer.errors import CapacityError, InputError
from elastiformer.families import describe
from elastiformer.masked import MaskedResult, run_masked
from elastiformer.plan_grid import PlanGrid, Selection
from elastiformer.planning import PIECE_TOKENS, Planner
from elastiformer.pool import Pool
from elastiformer.prefixes import PrefixStore
from elastiformer.sequence import Chunk, Sequence
from elastiformer.weights import BaseIdentity, LoadedBase, load_base

_FIRST_TOKENS = 8  # more rows than one thread does alone (row_kernels.py)
_FIRST_ROWS = 5  # likewise (sub_layers.py)


class ElasticModel(Elastic):
    """A causal language model and, perhaps, an adapter. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        identity: BaseIdentity | None = None,
    ) -> None:
        super().__init__(base, describe(base), adapter, tokenizer, identity)

    @classmethod
    def load(
        cls,
        base: str,
        adapter: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> Self:
        """Load a base (a folder, a Hub id, or an embedded name) and its adapter.

        Raises:
            BaseModelError, UnsupportedModel, AdapterError: each saying what is wrong.
        """
        return cls._of(load_base(base, dtype, device), adapter)

    @classmethod
    def _of(cls, loaded: LoadedBase, adapter: str | os.PathLike[str] | None) -> Self:
        model = cls(loaded.model, tokenizer=loaded.tokenizer, identity=loaded.identity)
        model._originals = loaded.originals
        model.attach_saved(adapter)
        return model

    @cached_property
    def _cache_shape(self) -> CacheShape:
        return CacheShape.of(self.shape)

    @cached_property
    def _growing(self) -> Pool:
        """The memory of sequences where no cache was opened."""
        return self._cache_shape.pool(0, self.dtype, self.device, grows=True)

    # The sparse form: packed, cached, each token under its own plan.

    def open_cache(
        self, tokens: int, prefixes: bool = True, piece_tokens: int = PIECE_TOKENS
    ) -> None:
        """Bound the keys and values of all sequences together; those made before are lost.

        Without it the pool grows as sequences ask.

        Args:
            tokens: that fit at capacity 1.0, in every layer.
            prefixes: whether prompts' beginnings are kept in what is free.
            piece_tokens: in pieces of so many, scored texts will be run. Fewer keys are attended
                to in smaller ones, so what is spent misses a capacity where others are run.
        """
        self._planner = Planner(self.shape, self.adapter, piece_tokens)
        self.cache = self._cache_shape.pool(tokens, self.dtype, self.device)
        self.prefixes = PrefixStore(self.cache) if prefixes else None

    def blocks_for(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool = False
    ) -> int:
        """The blocks of the cache that a sequence takes.

        Raises:
            CapacityError: as `sequence`.
        """
        self._planner.check(capacity, prompt_tokens, most_tokens, scored)
        rooms = self._planner.rooms(capacity, prompt_tokens, most_tokens, scored)
        return sum(map(blocks_of, rooms))

    def stores_where_steps_end(self, capacity: Capacity, prompt_tokens: int) -> bool:
        """Whether a beginning of this prompt can be stored only where a step ends."""
        return self._planner.routes_prompt(capacity, prompt_tokens)

    def sequence(
        self,
        capacity: Capacity,
        prompt_tokens: int,
        most_tokens: int,
        scored: bool = False,
        prompt: Many[int] | None = None,
        shared: bool = False,
    ) -> Sequence:
        """A new request.

        Args:
            most_tokens: of prompt and completion together.
            scored: the logits of every prompt token are needed, so all are of phase output.
            prompt: its tokens. Given, they may go on from a stored beginning: `length` of the
                sequence says how many must not be fed again.
            shared: whether others will come with the very same prompt.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: an empty prompt, or more tokens than the context holds.
            CacheFull: an opened cache has no room for it now.
        """
        if prompt_tokens < 1:
            raise InputError("a prompt has at least one token; got none")
        self._check_context(most_tokens)
        cache = self._room_for(capacity, prompt_tokens, most_tokens, scored)
        plan_at = self._planner.plan_at(capacity, prompt_tokens, scored)
        sequence = Sequence(plan_at, prompt_tokens, most_tokens, scored, cache)
        if prompt is not None and not scored:
            most = self._planner.most_stored(capacity, prompt_tokens, most_tokens)
            self._adopt(sequence, tuple(prompt), shared, most)
        return sequence

    def _check_context(self, tokens: int) -> None:
        if tokens > self.context:
            raise InputError(
                f"prompt and completion have {tokens} tokens together; "
                f"the context holds {self.context}"
            )

    def _room_for(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool
    ) -> SequenceCache:
        planner = self._planner
        planner.check(capacity, prompt_tokens, most_tokens, scored)
        rooms = planner.rooms(capacity, prompt_tokens, most_tokens, scored)
        complete = self.shape.kv == "complete"
        pool = self.cache or self._growing
        return SequenceCache(pool, self._cache_shape, rooms, complete, self.device)

    def _adopt(self, sequence: Sequence, keys: tuple[int, ...], shared: bool, most: int) -> None:
        """Let a new sequence begin after what is stored under the keys of its prompt's tokens."""
        if self.prefixes is not None:
            assert len(keys) == sequence.prompt_tokens, "a prompt of another length"
            sequence.prompt, sequence.shares_prompt = keys, shared
            self.prefixes.adopt(sequence, keys, most)

    def step(self, chunks: Many[Chunk]) -> list[Tensor]:
        """Run the next tokens of any mix of sequences.

        Returns:
            For each chunk the float32 logits [output rows, vocabulary]: of the last prompt token
            and every generated one, or of every token of a scored sequence.
        """
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks), "one chunk a sequence"
        for chunk in chunks:
            end = chunk.sequence.length + len(chunk.ids)
            assert chunk.ids, "a chunk has at least one token"
            assert end <= chunk.sequence.most_tokens, "a chunk beyond the sequence's bound"
        logits = self._sparse.step(chunks)
        if self.prefixes is not None:
            for chunk in chunks:
                if chunk.sequence.prompt is not None:
                    self.prefixes.store(chunk.sequence, chunk.sequence.prompt)
        return logits

    def measure_costs(self, seconds: float = 1.0) -> CostTable:
        """Lay out the weights now, and measure from how many rows on a dense product is faster.

        Some steps are run as well: what is compiled or loaded at its first use then is.
        """
        costs = super().measure_costs(seconds)
        for share in sorted({1.0, self.lowest}):
            capacity = Capacity(share, share)
            try:
                requests = [
                    self.sequence(capacity, _FIRST_TOKENS, _FIRST_TOKENS + 3)
                    for _ in range(_FIRST_ROWS)
                ]
            except CapacityError:
                continue  # the range of so short a request is narrower
            # Alone a prompt has few rows that run its late layers; together they have many.
            for some in (requests[:1], requests[1:]):
                self.step([Chunk(request, [0] * _FIRST_TOKENS) for request in some])
            for rows in (_FIRST_ROWS, 2, 1):
                self.step([Chunk(request, [0]) for request in requests[:rows]])
            for request in requests:
                request.release()
        return costs

    # The masked form, and the base itself: whole windows.

    def masked(
        self,
        ids_BT: Tensor,
        plans: PlanGrid | Many[tuple[Plan, Plan]],
        output_BT: Tensor,
        selection: Selection = Selection.THRESHOLD,
        mask_BT: Tensor | None = None,
    ) -> MaskedResult:
        """One differentiable forward over whole windows.

        Args:
            plans: a plan for each token, or one (prompt plan, output plan) for each row.
            output_BT: bool, where a token is of phase output.
            selection: by rank over the window, or causally by threshold as in serving.
            mask_BT: False on padding.
        """
        return self._masked({"input_ids": ids_BT}, plans, output_BT, selection, mask_BT)

    def _masked(
        self,
        inputs: Mapping[str, Tensor],
        plans: PlanGrid | Many[tuple[Plan, Plan]],
        output_BT: Tensor,
        selection: Selection,
        mask_BT: Tensor | None,
    ) -> MaskedResult:
        grid = plans if isinstance(plans, PlanGrid) else PlanGrid.by_phase(plans, output_BT)
        adapter = self.adapter
        if adapter is None:
            adapter = blank(NO_ROUTING, self.layout, self.identity)
        return run_masked(
            self.base,
            self.layout,
            self.shape,
            adapter,
            inputs,
            grid,
            output_BT,
            selection,
            mask_BT,
        )

    def teacher(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The untouched base's logits [B, T, V]."""
        logits: Tensor = self.base(ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return logits
