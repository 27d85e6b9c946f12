"""Elastic: a frozen pretrained model and, perhaps, an adapter; what all kinds of models share.

What a kind computes, and of what, is its own business: model.py (causal), encoder.py, vlm.py.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastiformer.accounting import KVPolicy, ModelShape
from elastiformer.adapter import Adapter, AdapterSpec, ExpertSplit, blank, elastic_shape
from elastiformer.calibration import Calibration
from elastiformer.capacity import Capacity, Plan, Unit
from elastiformer.costs import CostTable
from elastiformer.errors import AdapterError
from elastiformer.experts import coactivation_order
from elastiformer.families import Layout
from elastiformer.lora import PARTS, LoraPhases
from elastiformer.originals import Originals
from elastiformer.planning import Planner
from elastiformer.pool import Pool
from elastiformer.prefixes import PrefixStore
from elastiformer.routers import ImageScorer, PartGate, TokenGate
from elastiformer.saved_adapter import SavedAdapter
from elastiformer.sequence import Chunk
from elastiformer.sparse import SparseForm
from elastiformer.tasks import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION
from elastiformer.weights import BaseIdentity, config_hash

NO_ROUTING = AdapterSpec(units=())


class Elastic(ABC):
    """A base model and, perhaps, an adapter. Not thread-safe: one thread owns it."""

    task: str = TEXT_GENERATION

    def __init__(
        self,
        base: PreTrainedModel,
        layout: Layout,
        adapter: Adapter | None,
        tokenizer: PreTrainedTokenizerBase | None,
        identity: BaseIdentity | None,
    ) -> None:
        self.base = base.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity or BaseIdentity(
            base.config.name_or_path or type(base).__name__, "unknown", config_hash(base.config)
        )
        self.layout = layout
        self._originals: Originals | None = None
        self.adapter: Adapter | None = None
        self.cache: Pool | None = None
        self.prefixes: PrefixStore | None = None
        self.shape: ModelShape
        self.attach(adapter)

    def attach(self, adapter: Adapter | None) -> None:
        """Use this adapter from now on; sequences made before must not be used after.

        Raises:
            AdapterError: it was made for another task.
        """
        if adapter is not None and adapter.spec.task != self.task:
            raise AdapterError(
                f"adapter: made for {adapter.spec.task}, this model's task is {self.task}"
            )
        self.adapter = adapter.to(self.device) if adapter is not None else None
        self.shape = self._shape(adapter)
        self._planner = Planner(self.shape, adapter)
        self.cache = None
        self.prefixes = None
        for made_before in ("_sparse", "_growing", "_cache_shape", "_kinds"):
            self.__dict__.pop(made_before, None)

    def _shape(self, adapter: Adapter | None) -> ModelShape:
        """What accounting works on."""
        return elastic_shape(self.layout, adapter)

    def attach_saved(self, adapter: str | os.PathLike[str] | None) -> None:
        """Use the adapter in this folder or of this Hub id, if one is named.

        Raises:
            AdapterError: naming every misfit.
        """
        if adapter is not None:
            self.attach(SavedAdapter.load(adapter).fit(self.layout, self.identity))

    @cached_property
    def _sparse(self) -> SparseForm:
        return SparseForm(self.layout, self.adapter, self.shape, self._originals)

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
        """The most tokens that one request may have."""
        return int(self.config.max_position_embeddings)

    @property
    def calibration(self) -> Calibration | None:
        return self.adapter.calibration if self.adapter is not None else None

    @property
    def lowest(self) -> float:
        """The lowest capacity that was calibrated; 1.0 without a calibration."""
        return self.calibration.lowest if self.calibration is not None else 1.0

    @abstractmethod
    def blocks_for(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool = False
    ) -> int:
        """The blocks of the cache that a sequence takes.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
        """

    def step(self, chunks: Many[Chunk]) -> list[Tensor]:
        """Run the next tokens of any mix of sequences; what is read of each, in float32."""
        return self._sparse.step(chunks)

    @abstractmethod
    def teacher(self, batch: Any, mask_BT: Tensor | None = None) -> Tensor:
        """What the untouched base makes of a batch."""

    def measure_costs(self, seconds: float = 1.0) -> CostTable:
        """Lay out the weights now, and measure from how many rows on a dense product is faster."""
        return self._sparse.prepare(seconds)

    @property
    def attention_backend(self) -> str:
        """The name of what computes attention here."""
        return self._sparse.workshop.backend.name

    @property
    def bytes_per_weight(self) -> float:
        """What a weight takes in the form that steps of few rows read."""
        return self._sparse.workshop.bytes_per_weight

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
        calibration_ids: Any = None,
        token_gate: TokenGate = "hard",
        part_gate: PartGate = "hard",
        kv: KVPolicy = "complete",
        lora_rank: int = 1,
        lora_parts: Many[str] = PARTS,
        lora_phases: LoraPhases = "shared",
        image_scorer: ImageScorer = "linear",
        image_spread: float = 0.0,
    ) -> Adapter:
        """An untrained adapter for this base.

        Args:
            calibration_ids: a little data, needed to split experts by co-activation: text
                [B, T] for a causal model, a batch for an encoder.
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
            task=self.task,
            image_scorer=image_scorer,
            image_spread=image_spread,
        )
        problems = spec.problems()
        if Unit.IMAGE_TOKENS in spec.units and self.task != IMAGE_TEXT_TO_TEXT:
            problems.append(f"{Unit.IMAGE_TOKENS}: this model reads none; its task is {self.task}")
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
            assert calibration_ids is not None, "co-activation needs a little data"
            adapter.neuron_order = coactivation_order(
                partial(self.teacher, calibration_ids), self.layout, spec.experts
            )
        return adapter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Routers and LoRA, by name; the base is never among them."""
        return self.adapter.parameters() if self.adapter is not None else {}
