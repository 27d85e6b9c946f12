"""ElasticModel: a pretrained causal LM whose every token may run under its own plan.

The base stays as it is, frozen and shared. `step` runs the sparse form, for serving; `masked` the
differentiable one, for training; `teacher` the base itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from functools import lru_cache
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
from elastiformer.calibration import Calibration, Schedule, output_context
from elastiformer.capacity import (
    Capacity,
    Phase,
    Plan,
    Share,
    Unit,
    UnitShares,
    dense_plan,
)
from elastiformer.errors import AdapterError, CapacityError, InputError
from elastiformer.experts import coactivation_order
from elastiformer.families import Layout, describe
from elastiformer.lora import PARTS, LoraPhases
from elastiformer.masked import MaskedResult, PlanGrid, Selection, run_masked
from elastiformer.priced import PricedPlan, Pricing
from elastiformer.routers import TOKEN_UNITS, PartGate, TokenGate
from elastiformer.sequence import Chunk, Sequence
from elastiformer.sparse import SparseForm
from elastiformer.weights import BaseIdentity, config_hash, load_base

_NO_ROUTING = AdapterSpec(units=())


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
        self._pricing = {phase: Pricing(self.shape.of_phase(phase)) for phase in Phase}
        self._sparse = SparseForm(self.layout, adapter, self.shape)
        self._schedule = lru_cache(maxsize=4096)(self._make_schedule)

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

    def sequence(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool = False
    ) -> Sequence:
        """A new request.

        Args:
            most_tokens: of prompt and completion together.
            scored: the logits of every prompt token are needed, so all are of phase output.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: an empty prompt, or more tokens than the context holds.
        """
        if prompt_tokens < 1:
            raise InputError("a prompt has at least one token; got none")
        if most_tokens > self.context:
            raise InputError(
                f"prompt and completion have {most_tokens} tokens together; "
                f"the context holds {self.context}"
            )
        if not scored:
            self._check(capacity.prompt, Phase.PROMPT, prompt_tokens)
        for context in (prompt_tokens, output_context(most_tokens - 1)):
            self._check(capacity.output, Phase.OUTPUT, context)

        def plan_at(phase: Phase, position: int) -> PricedPlan:
            share, pricing = capacity.of(phase), self._pricing[phase]
            if share == 1.0:
                return pricing.dense
            # A prompt is run whole, and each of its tokens owes all of its keys.
            within = position < prompt_tokens
            context = prompt_tokens if within else output_context(position)
            if isinstance(share, UnitShares):
                return pricing.of((share.layer_plan(),) * len(self.layout.layers))
            schedule = self._schedule(share, phase, context)
            return pricing.of(schedule.plan_at(position))

        return Sequence(
            self.shape, plan_at, prompt_tokens, most_tokens, scored, self.dtype, self.device
        )

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
        return self._sparse.step(chunks)

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
        found: list[Plan] = []
        for phase in Phase:
            share = capacity.of(phase)
            self._check(share, phase, context)
            if share == 1.0:
                found.append(dense_plan(len(self.layout.layers)))
            elif isinstance(share, UnitShares):
                found.append((share.layer_plan(),) * len(self.layout.layers))
            else:
                found.append(self._schedule(share, phase, context).nearest)
        return found[0], found[1]

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

    def _make_schedule(self, share: float, phase: Phase, context: int) -> Schedule:
        assert self.calibration is not None
        return self.calibration.schedule(share, phase, self.shape, context)

    def _check(self, share: Share, phase: Phase, context: int) -> None:
        """Refuse a share that this model cannot run."""
        if isinstance(share, UnitShares):
            units = self.adapter.units if self.adapter is not None else ()
            # Token units without a router are spread evenly over the tokens.
            lacking = [
                name
                for name in share.named
                if name not in units and name not in (*TOKEN_UNITS, Unit.CHANNELS)
            ]
            if lacking:
                raise CapacityError(
                    f"capacity: this model's adapter has no routers for {', '.join(lacking)}; "
                    f"it has {', '.join(units) or 'none'}"
                )
        elif share < 1.0:
            if self.calibration is None:
                raise CapacityError(
                    f"capacity {share:g}: this model has no calibration, so only 1.0 can be asked"
                )
            self._schedule(share, phase, context)
