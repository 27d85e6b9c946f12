"""What each sub-layer costs under a plan, from shapes alone. Pure Python: no torch.

All costs are FLOPs of matrix products, two for each multiply-add, as PyTorch's FlopCounterMode
counts them: the attention of q tokens over k keys costs the whole q x k rectangle, causal or not.
Norms, activations and rotations are not matrix products and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from elastiformer.capacity import WHOLE_LAYER, LayerPlan, Phase, Plan

KVPolicy = Literal["complete", "kept"]
# For each layer, of how many kinds the weights are that an item's class tokens absorb; 0 where
# keys are made. Empty: everywhere.
Direct = tuple[int, ...]
NOWHERE: Direct = ()


@dataclass(frozen=True, slots=True)
class LoraShape:
    """One low-rank pair: on which projections of a layer it acts, with how many directions."""

    parts: tuple[str, ...]  # "query", "key", "value", "out", "gate", "up", "down"; fused: several
    rank: int


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The matrices of one transformer layer, and what an adapter adds to it."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    gated: bool  # two matrices in front of the activation (gate and up), or one (up)
    experts: int = 0  # 0: the MLP is not divided
    token_routers: tuple[str, ...] = ()  # the token units that a router decides
    lora: tuple[LoraShape, ...] = ()

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def width_of(self, part: str) -> tuple[int, int]:
        """(inputs, outputs) of one projection."""
        return {
            "query": (self.width, self.attention_width),
            "key": (self.width, self.kv_width),
            "value": (self.width, self.kv_width),
            "out": (self.attention_width, self.width),
            "gate": (self.width, self.mlp_width),
            "up": (self.width, self.mlp_width),
            "down": (self.mlp_width, self.width),
        }[part]


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """How many things one token keeps in one layer: what a layer's shares come to."""

    heads: int
    experts: int  # 0: the MLP is not divided, or kept whole
    neurons: int
    attention_in: int
    attention_out: int  # of the kept heads' channels
    mlp_in: int
    mlp_out: int  # of the kept experts' neurons


@lru_cache(maxsize=65536)
def layer_counts(shape: LayerShape, plan: LayerPlan) -> LayerCounts:
    """Shares become counts here and nowhere else: rounded, and at least one."""
    heads = plan.kept("heads", shape.heads)
    experts, neurons = 0, shape.mlp_width
    if shape.experts and plan.experts < 1:
        kept = plan.kept("experts", shape.experts)
        if kept < shape.experts:
            experts, neurons = kept, kept * (shape.mlp_width // shape.experts)
    return LayerCounts(
        heads=heads,
        experts=experts,
        neurons=neurons,
        attention_in=plan.kept("attention_in", shape.width),
        attention_out=plan.kept("attention_out", heads * shape.head_dim),
        mlp_in=plan.kept("mlp_in", shape.width),
        mlp_out=plan.kept("mlp_out", neurons),
    )


def repaired_from(plan: Plan) -> int:
    """The first layer in which a token's low-rank repair runs; the number of layers: in none.

    What was computed before anything was left out is exact, and a repair could only spoil it. A
    layer of which whole sub-layers are left out still reads what is exact.
    """
    for place, layer in enumerate(plan):
        if layer != WHOLE_LAYER:
            inner = replace(layer, attention_tokens=1.0, mlp_tokens=1.0)
            return place if inner != WHOLE_LAYER else place + 1
    return len(plan)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """FLOPs of one token in one layer under one plan, by what the token router decides.

    Of an attention's costs, what depends on the number of keys stands apart.
    """

    attention_kept: int
    attention_skipped: int
    attention_per_key: int  # for a kept token, for each key that it attends to
    mlp_kept: int
    mlp_skipped: int


@lru_cache(maxsize=65536)
def layer_cost(
    shape: LayerShape,
    plan: LayerPlan,
    kv: KVPolicy,
    exact: bool,
    unread: bool = False,
    sides: int = 0,
) -> LayerCost:
    """What one layer costs one token.

    Args:
        exact: this layer comes before `repaired_from`, so no LoRA runs in it.
        unread: nobody reads what the token leaves this layer with, only its keys and values.
        sides: of how many kinds the weights of keys and values are that the token's queries
            absorb; 0: keys and values are made (direct_reading.py).
    """
    width = shape.width
    counts = layer_counts(shape, plan)
    attention_width = counts.heads * shape.head_dim
    neurons = counts.neurons

    def lora(*parts: str) -> int:
        if exact:
            return 0
        total = 0
        for pair in shape.lora:
            run = [part for part in pair.parts if part in parts]
            if run:
                total += pair.rank * lora_inputs(run[0])
                total += pair.rank * sum(lora_outputs(part) for part in run)
        return 2 * total

    def lora_inputs(part: str) -> int:
        # The repair reads the whole input, zeros where a head or a channel was left out.
        return {"out": shape.attention_width, "down": shape.mlp_width}.get(part, width)

    def lora_outputs(part: str) -> int:
        outputs = {"query": attention_width, "gate": neurons, "up": neurons}
        return outputs.get(part, shape.width_of(part)[1])

    router_tokens = 0
    if "attention_tokens" in shape.token_routers and 0 < plan.attention_tokens < 1:
        router_tokens = 2 * width
    router_heads = 2 * width * shape.heads if counts.heads < shape.heads else 0
    keys_values = 2 * counts.attention_in * 2 * shape.kv_width
    attention_kept = (
        router_tokens
        + router_heads
        + 2 * counts.attention_in * attention_width
        + keys_values
        + 2 * counts.attention_out * width
        + lora("query", "key", "value")
        + lora("out")
    )
    attention_skipped = router_tokens
    if kv == "complete":
        attention_skipped += keys_values + lora("key", "value")

    attention_per_key = 4 * attention_width
    if sides:
        absorbed = 2 * 2 * width * attention_width  # what stands for its key, and for its value
        attention_kept += sides * absorbed - keys_values - lora("key", "value")
        attention_skipped = router_tokens
        attention_per_key = 4 * counts.heads * width
    if unread and sides:
        return LayerCost(0, 0, 0, 0, 0)
    if unread:
        attention = router_tokens + keys_values + lora("key", "value")
        return LayerCost(attention, attention_skipped, 0, 0, 0)

    router_mlp = 0
    if "mlp_tokens" in shape.token_routers and 0 < plan.mlp_tokens < 1:
        router_mlp = 2 * width
    router_experts = 2 * width * shape.experts if counts.experts else 0
    front = ("gate", "up") if shape.gated else ("up",)
    mlp_kept = (
        router_mlp
        + router_experts
        + 2 * counts.mlp_in * neurons * len(front)
        + 2 * counts.mlp_out * width
        + lora(*front)
        + lora("down")
    )
    return LayerCost(
        attention_kept=attention_kept,
        attention_skipped=attention_skipped,
        attention_per_key=attention_per_key,
        mlp_kept=mlp_kept,
        mlp_skipped=router_mlp,
    )


@dataclass(frozen=True)
class ModelShape:
    """A whole model's layers and its output head."""

    layers: tuple[LayerShape, ...]
    width: int
    vocabulary: int
    kv: KVPolicy = "complete"
    repaired: tuple[Phase, ...] = tuple(Phase)  # the phases in which low-rank repair runs
    last_unread: bool = False  # only keys and values of the last layer are ever read
    absorbing: frozenset[int] = frozenset()  # the layers whose keys class tokens can do without

    def of_phase(self, phase: Phase) -> ModelShape:
        """The shape as tokens of one phase meet it.

        Without a repair that is not theirs; and what a prompt token leaves the last layer with
        is read by nobody.
        """
        layers = self.layers
        if phase not in self.repaired:
            layers = tuple(replace(layer, lora=()) for layer in layers)
        return replace(self, layers=layers, last_unread=phase is Phase.PROMPT)

    def costs(self, plan: Plan, direct: Direct = NOWHERE) -> Iterator[LayerCost]:
        """What each layer costs one token under a plan."""
        last, first = len(self.layers) - 1, repaired_from(plan)
        for place, (shape, layer) in enumerate(zip(self.layers, plan, strict=True)):
            unread, sides = self.last_unread and place == last, direct[place] if direct else 0
            yield layer_cost(shape, layer, self.kv, place < first, unread, sides)

    def direct(self, *prompts: Plan) -> Direct:
        """Where class tokens that run whole need no keys: no other token of their item asks there.

        Args:
            prompts: the plans of these others.
        """
        last = len(self.layers) - 1

        def sides(place: int) -> int:
            of_layer = [plan[place] for plan in prompts]
            asked = place < last and any(layer.attention_tokens > 0 for layer in of_layer)
            picked = any(layer.attention_in < 1 for layer in of_layer)
            if place not in self.absorbing or asked or picked:
                return 0
            return 1 + any(self._repairs_keys(place, plan) for plan in prompts)  # its own is not

        return tuple(map(sides, range(last + 1))) if self.absorbing else NOWHERE

    def _repairs_keys(self, place: int, prompt: Plan) -> bool:
        if Phase.PROMPT not in self.repaired or place < repaired_from(prompt):
            return False
        return any({"key", "value"} & set(pair.parts) for pair in self.layers[place].lora)

    @property
    def head_flops(self) -> int:
        """The output head, for one token."""
        return 2 * self.width * self.vocabulary

    def dense_token_flops(self, context: int) -> int:
        """Block FLOPs of one token that attends to `context` keys, at capacity 1.0."""
        linear, per_key = self._dense_flops
        return linear + context * per_key

    @cached_property
    def _dense_flops(self) -> tuple[int, int]:
        costs = [layer_cost(shape, WHOLE_LAYER, "complete", True) for shape in self.layers]
        linear = sum(cost.attention_kept + cost.mlp_kept for cost in costs)
        return linear, sum(cost.attention_per_key for cost in costs)

    def planned_token_flops(self, plan: Plan, context: int, direct: Direct = NOWHERE) -> float:
        """Block FLOPs of one token under a plan, routers and LoRA included.

        A token share that is a fraction is met on average, so the cost is one too. Where skipped
        tokens leave no keys behind (`kv: kept`), the keys met are taken to be as many as the
        share keeps.

        Args:
            direct: the layers of which no keys are made.
        """
        return sum(
            self._planned(cost, layer, context)
            for cost, layer in zip(self.costs(plan, direct), plan, strict=True)
        )

    def planned_layer_flops(self, place: int, plan: LayerPlan, context: int) -> float:
        """The same of one layer alone, which is repaired, as after something was left out."""
        unread = self.last_unread and place == len(self.layers) - 1
        cost = layer_cost(self.layers[place], plan, self.kv, False, unread)
        return self._planned(cost, plan, context)

    def _planned(self, cost: LayerCost, layer: LayerPlan, context: int) -> float:
        keys = context * layer.attention_tokens if self.kv == "kept" else context
        kept = layer.attention_tokens
        total = kept * (cost.attention_kept + keys * cost.attention_per_key)
        total += (1 - kept) * cost.attention_skipped
        return total + layer.mlp_tokens * cost.mlp_kept + (1 - layer.mlp_tokens) * cost.mlp_skipped

    def planned_share(self, plan: Plan, context: int, direct: Direct = NOWHERE) -> float:
        """The share of the dense block FLOPs that a token under this plan spends."""
        return self.planned_token_flops(plan, context, direct) / self.dense_token_flops(context)
