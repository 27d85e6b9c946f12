"""ElasticModel: a pretrained causal LM whose every token may run under its own plan.

The base stays as it is, frozen and shared. `step` runs the sparse form, for serving; `masked` the
differentiable one, for training; `teacher` the base itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastiformer.accounting import KVPolicy, ModelShape
from elastiformer.adapter import (
    Adapter,
    AdapterSpec,
    ExpertSplit,
    SavedAdapter,
    blank,
    elastic_shape,
)
from elastiformer.cache import CacheShape, SequenceCache, blocks_of
from elastiformer.calibration import Calibration
from elastiformer.capacity import Capacity, Plan, Unit
from elastiformer.costs import CostTable
from elastiformer.errors import AdapterError, InputError
from elastiformer.experts import coactivation_order
from elastiformer.families import Layout, describe
from elastiformer.lora import PARTS, LoraPhases
from elastiformer.masked import MaskedResult, PlanGrid, Selection, run_masked
from elastiformer.planning import Planner
from elastiformer.pool import Pool
from elastiformer.prefixes import PrefixStore
from elastiformer.routers import PartGate, TokenGate
from elastiformer.sequence import Chunk, Sequence
from elastiformer.sparse import SparseForm
from elastiformer.weights import BaseIdentity, config_hash, load_base

_NO_ROUTING = AdapterSpec(units=())
_FIRST_TOKENS = 8  # more rows than one thread does alone (row_kernels.py)


class ElasticModel:
    """A base model and, perhaps, an adapter. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        identity: BaseIdentity | None = None,
    ) -> None:
        self.base = base.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity or BaseIdentity(
            base.config.name_or_path or type(base).__name__, "unknown", config_hash(base.config)
        )
        self.layout: Layout = describe(base)
        self.adapter: Adapter | None = None
        self.shape: ModelShape
        self.attach(adapter)

    @classmethod
    def load(
        cls,
        base: str,
        adapter: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> ElasticModel:
        """Load a base (a folder, a Hub id, or an embedded name) and its adapter.

        Raises:
            BaseModelError, UnsupportedModel, AdapterError: each saying what is wrong.
        """
        loaded = load_base(base, dtype, device)
        model = cls(loaded.model, tokenizer=loaded.tokenizer, identity=loaded.identity)
        if adapter is not None:
            model.attach(SavedAdapter.load(adapter).fit(model.layout, model.identity))
        return model

    def attach(self, adapter: Adapter | None) -> None:
        """Use this adapter from now on; sequences made before must not be used after."""
        self.adapter = adapter.to(self.device) if adapter is not None else None
        self.shape = elastic_shape(self.layout, adapter)
        self._planner = Planner(self.shape, adapter)
        self._cache_shape = CacheShape.of(self.shape)
        self.cache: Pool | None = None
        self.prefixes: PrefixStore | None = None
        for made_before in ("_sparse", "_growing"):
            self.__dict__.pop(made_before, None)

    @cached_property
    def _sparse(self) -> SparseForm:
        return SparseForm(self.layout, self.adapter, self.shape)

    @cached_property
    def _growing(self) -> Pool:
        """The memory of sequences where no cache was opened."""
        return self._cache_shape.pool(0, self.dtype, self.device, grows=True)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.dtype
        return dtype

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its completion may have together."""
        return int(self.config.max_position_embeddings)

    @property
    def calibration(self) -> Calibration | None:
        return self.adapter.calibration if self.adapter is not None else None

    @property
    def lowest(self) -> float:
        """The lowest capacity that was calibrated; 1.0 without a calibration."""
        return self.calibration.lowest if self.calibration is not None else 1.0

    # The sparse form: packed, cached, each token under its own plan.

    def open_cache(self, tokens: int, prefixes: bool = True) -> None:
        """Bound the keys and values of all sequences together; those made before are lost.

        Without it the pool grows as sequences ask.

        Args:
            tokens: that fit at capacity 1.0, in every layer.
            prefixes: whether prompts' beginnings are kept in what is free.
        """
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
    ) -> Sequence:
        """A new request.

        Args:
            most_tokens: of prompt and completion together.
            scored: the logits of every prompt token are needed, so all are of phase output.
            prompt: its tokens. Given, they may go on from a stored beginning: `length` of the
                sequence says how many must not be fed again.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: an empty prompt, or more tokens than the context holds.
            CacheFull: an opened cache has no room for it now.
        """
        if prompt_tokens < 1:
            raise InputError("a prompt has at least one token; got none")
        if most_tokens > self.context:
            raise InputError(
                f"prompt and completion have {most_tokens} tokens together; "
                f"the context holds {self.context}"
            )
        planner = self._planner
        planner.check(capacity, prompt_tokens, most_tokens, scored)
        rooms = planner.rooms(capacity, prompt_tokens, most_tokens, scored)
        complete = self.shape.kv == "complete"
        pool = self.cache or self._growing
        cache = SequenceCache(pool, self._cache_shape, rooms, complete, self.device)
        plan_at = planner.plan_at(capacity, prompt_tokens)
        sequence = Sequence(plan_at, prompt_tokens, most_tokens, scored, cache)
        if self.prefixes is not None and prompt is not None and not scored:
            assert len(prompt) == prompt_tokens, "a prompt of another length"
            sequence.prompt = tuple(prompt)
            self.prefixes.adopt(sequence, sequence.prompt)
        return sequence

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
        costs = self._sparse.prepare(seconds)
        for share in sorted({1.0, self.lowest}):
            capacity = Capacity(share, share)
            requests = [self.sequence(capacity, _FIRST_TOKENS, _FIRST_TOKENS + 2) for _ in range(2)]
            for request in requests:
                self.step([Chunk(request, [0] * _FIRST_TOKENS)])
            self.step([Chunk(request, [0]) for request in requests])
            self.step([Chunk(requests[0], [0])])
            for request in requests:
                request.release()
        return costs

    @property
    def attention_backend(self) -> str:
        """The name of what computes attention here."""
        return self._sparse.workshop.backend.name

    @property
    def bytes_per_weight(self) -> float:
        """What a weight takes in the form that steps of few rows read."""
        return self._sparse.workshop.bytes_per_weight

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
        grid = plans if isinstance(plans, PlanGrid) else PlanGrid.by_phase(plans, output_BT)
        adapter = self.adapter
        if adapter is None:
            adapter = blank(_NO_ROUTING, self.layout, self.identity)
        return run_masked(
            self.base,
            self.layout,
            self.shape,
            adapter,
            ids_BT,
            grid,
            output_BT,
            selection,
            mask_BT,
        )

    def teacher(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The untouched base's logits [B, T, V]."""
        logits: Tensor = self.base(ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return logits

    def plans(self, capacity: Capacity, context: int) -> tuple[Plan, Plan]:
        """The (prompt plan, output plan) nearest to a capacity, for tokens over `context` keys."""
        return self._planner.plans(capacity, context)

    # Adapters.

    def blank_adapter(
        self,
        units: Many[Unit],
        *,
        experts: int = 16,
        expert_split: ExpertSplit = "coactivation",
        calibration_ids: Tensor | None = None,
        token_gate: TokenGate = "hard",
        part_gate: PartGate = "hard",
        kv: KVPolicy = "complete",
        lora_rank: int = 1,
        lora_parts: Many[str] = PARTS,
        lora_phases: LoraPhases = "shared",
    ) -> Adapter:
        """An untrained adapter for this base.

        Args:
            calibration_ids: a little text [B, T], needed to split experts by co-activation.
        """
        spec = AdapterSpec(
            units=tuple(Unit(unit) for unit in units),
            experts=experts if Unit.EXPERTS in units else 0,
            expert_split=expert_split,
            token_gate=token_gate,
            part_gate=part_gate,
            kv=kv,
            lora_rank=lora_rank,
            lora_parts=tuple(lora_parts) if lora_rank else (),
            lora_phases=lora_phases,
        )
        problems = spec.problems()
        known = {p.part for layer in self.layout.layers for p in layer.projections}
        if stray := sorted(set(spec.lora_parts) - known - {"gate"}):
            problems.append(f"lora parts: of {', '.join(PARTS)}; got {', '.join(stray)}")
        for layer in self.layout.layers:
            if spec.experts and layer.shape.mlp_width % spec.experts:
                width = layer.shape.mlp_width
                fitting = [n for n in range(2, min(width, 65)) if width % n == 0]
                problems.append(
                    f"experts: {spec.experts} do not divide {width} neurons; these do: "
                    f"{', '.join(map(str, fitting))}"
                )
                break
        if problems:
            raise AdapterError("; ".join(problems))
        adapter = blank(spec, self.layout, self.identity)
        if spec.experts and spec.expert_split == "coactivation":
            assert calibration_ids is not None, "co-activation needs a little text"
            adapter.neuron_order = coactivation_order(
                self.base, self.layout, calibration_ids, spec.experts
            )
        return adapter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Routers and LoRA, by name; the base is never among them."""
        return self.adapter.parameters() if self.adapter is not None else {}
