"""Where each causal architecture of Transformers keeps its modules; no other file knows of that.

`describe(base)` turns a pretrained causal LM into a `Layout`: the same modules under one set of
names, so that everything else is written once for all families. Nothing is copied: a `Projection`
is a slice of the base's own weight.

A head is a query head. With grouped-query attention several of them read one key/value head;
they are routed singly, since a key/value head that one token leaves out, another may read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elastiformer.accounting import LayerShape
from elastiformer.capacity import Site
from elastiformer.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of one architecture's modules; those of a layer start at the layer."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str | None = None  # a learned table of positions, instead of rotation
    rotary: str | None = "model.rotary_emb"
    rotary_by_layer_type: bool = False
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    after_attention: str | None = None  # a norm on the branch, before it joins the residual
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    after_mlp: str | None = None
    queries: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: fused
    out: str = "o_proj"
    head_norms: bool = False
    front: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True  # with one name in `front`: gate and up are fused in it
    down: str = "down_proj"
    activation: str = "act_fn"
    softcaps_attention: bool = False


_GEMMA = {
    "after_attention": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(head_norms=True),
    "Phi3ForCausalLM": Family(
        queries=("qkv_proj",), front=("gate_up_proj",), activation="activation_fn"
    ),
    "Gemma2ForCausalLM": Family(softcaps_attention=True, **_GEMMA),  # type: ignore[arg-type]
    "Gemma3ForCausalLM": Family(
        head_norms=True,
        rotary_by_layer_type=True,
        **_GEMMA,  # type: ignore[arg-type]
    ),
    "GPT2LMHeadModel": Family(
        layers="transformer.h",
        embedding="transformer.wte",
        positions="transformer.wpe",
        rotary=None,
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        queries=("c_attn",),
        out="c_proj",
        front=("c_fc",),
        gated=False,
        down="c_proj",
        activation="act",
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One linear map, `outputs` x `inputs`: a slice of a base module's weight, never a copy."""

    part: str  # "query", "key", "value", "out", "gate", "up" or "down"
    module: nn.Module
    path: str  # of the module, from the layer
    start: int
    stop: int

    @property
    def weight_OI(self) -> Tensor:
        return self.part_of(self.module.weight)  # type: ignore[arg-type]

    def part_of(self, weight: Tensor) -> Tensor:
        """What it is of its module's weight, or of another in its place: [O, I]."""
        # GPT-2's Conv1D keeps its weight as inputs x outputs.
        return (weight.T if isinstance(self.module, Conv1D) else weight)[self.start : self.stop]

    @property
    def bias_O(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return None if bias is None else bias[self.start : self.stop]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One transformer layer under the names that the rest of the library uses."""

    index: int
    shape: LayerShape
    attention: nn.Module
    attention_norm: nn.Module
    after_attention: nn.Module | None  # a norm on the branch, before it joins the residual
    query: Projection
    key: Projection
    value: Projection
    out: Projection
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    scale: float
    window: int | None  # a token attends to so many latest tokens, itself included
    softcap: float | None
    rotate: Callable[..., tuple[Tensor, Tensor]] | None
    layer_type: str | None
    mlp: nn.Module
    mlp_norm: nn.Module
    after_mlp: nn.Module | None
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    # Norms over the residual and the branch together, where a family norms after a sub-layer.
    attention_close: nn.Module | None = None
    mlp_close: nn.Module | None = None

    @property
    def attention_branch(self) -> nn.Module:
        """What gives the attention's branch, as it joins the residual."""
        if self.attention_close is not None:
            return self.out.module
        return self.after_attention or self.attention

    @property
    def mlp_branch(self) -> nn.Module:
        if self.mlp_close is not None:
            return self.down.module
        return self.after_mlp or self.mlp

    @property
    def projections(self) -> tuple[Projection, ...]:
        gate = () if self.gate is None else (self.gate,)
        return (self.query, self.key, self.value, self.out, *gate, self.up, self.down)

    def at_site(self, site: Site) -> tuple[Projection, ...]:
        """The projections that read the channels of `site`."""
        if site is Site.ATTENTION_IN:
            return (self.query, self.key, self.value)
        if site is Site.ATTENTION_OUT:
            return (self.out,)
        if site is Site.MLP_IN:
            return (self.up,) if self.gate is None else (self.gate, self.up)
        return (self.down,)

    @property
    def modules(self) -> dict[str, tuple[Projection, ...]]:
        """The base's linear modules by path, each with the projections that it holds."""
        held: dict[str, tuple[Projection, ...]] = {}
        for projection in self.projections:
            held[projection.path] = (*held.get(projection.path, ()), projection)
        return held


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A model under the names that the rest of the library uses."""

    embedding: nn.Module
    positions: nn.Module | None
    rotary: nn.Module | None
    rotary_by_layer_type: bool
    rotary_by_length: bool  # frequencies depend on the length of the sequence at hand
    layers: tuple[Layer, ...]
    layers_path: str
    final_norm: nn.Module
    head: nn.Module | None  # None where the base's own code reads what the layers leave
    logit_softcap: float | None
    width: int
    vocabulary: int  # 0 without a head here
    causal: bool = True
    _norms: dict[tuple[int, Site], Tensor] = field(default_factory=dict)

    def column_norms(self, layer: Layer, site: Site) -> Tensor:
        """The length of each input's column over all projections at `site`, float32 [inputs]."""
        key = (layer.index, site)
        if key not in self._norms:
            squares = [p.weight_OI.detach().float().pow(2).sum(0) for p in layer.at_site(site)]
            self._norms[key] = torch.stack(squares).sum(0).sqrt()
        return self._norms[key]


def describe(base: PreTrainedModel) -> Layout:
    """The layout of a pretrained causal LM.

    Raises:
        UnsupportedModel: naming the architecture, and which modules were not found.
    """
    name = type(base).__name__
    family = FAMILIES.get(name)
    if family is None:
        missing = _missing(base, Family())
        reason = (
            "of the places where a Llama keeps its modules, it lacks " + ", ".join(missing)
            if missing
            else "its modules stand where a Llama keeps them, but nobody has checked its forward"
        )
        raise UnsupportedModel(
            f"{name} has no entry in elastiformer/families.py (known: "
            f"{', '.join(sorted(FAMILIES))}); {reason}"
        )
    if missing := _missing(base, family):
        raise UnsupportedModel(f"{name}: this model lacks {', '.join(missing)}")

    config: Any = base.config
    layers = tuple(
        _layer(base, family, module, index)
        for index, module in enumerate(base.get_submodule(family.layers).children())
    )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if _is_dict(v)}
    embedding = base.get_submodule(family.embedding)
    return Layout(
        embedding=embedding,
        positions=base.get_submodule(family.positions) if family.positions else None,
        rotary=base.get_submodule(family.rotary) if family.rotary else None,
        rotary_by_layer_type=family.rotary_by_layer_type,
        rotary_by_length=bool(kinds & {"dynamic", "longrope"}),
        layers=layers,
        layers_path=family.layers,
        final_norm=base.get_submodule(family.final_norm),
        head=base.lm_head,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def _layer(base: PreTrainedModel, family: Family, layer: nn.Module, index: int) -> Layer:
    config: Any = base.config
    attention = layer.get_submodule(family.attention)
    mlp = layer.get_submodule(family.mlp)
    attention_any: Any = attention
    head_dim: int = attention_any.head_dim
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    query, key, value = split(
        attention,
        family.attention,
        family.queries,
        {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim},
    )
    (out,) = split(attention, family.attention, (family.out,), {"out": config.hidden_size})
    (down,) = split(mlp, family.mlp, (family.down,), {"down": config.hidden_size})
    mlp_width: int = down.weight_OI.shape[1]
    sizes = {"gate": mlp_width, "up": mlp_width} if family.gated else {"up": mlp_width}
    front = split(mlp, family.mlp, family.front, sizes)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        window = None
    # Only the eager attention of Transformers caps the scores; its SDPA leaves them alone.
    eager = config._attn_implementation == "eager"
    softcap = attention_any.attn_logit_softcapping if family.softcaps_attention and eager else None
    return Layer(
        index=index,
        shape=LayerShape(
            width=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=mlp_width,
            gated=family.gated,
        ),
        attention=attention,
        attention_norm=layer.get_submodule(family.attention_norm),
        after_attention=optional_module(layer, family.after_attention),
        query=query,
        key=key,
        value=value,
        out=out,
        query_norm=attention.get_submodule("q_norm") if family.head_norms else None,
        key_norm=attention.get_submodule("k_norm") if family.head_norms else None,
        scale=attention_any.scaling,
        window=window,
        softcap=softcap,
        rotate=(
            sys.modules[type(attention).__module__].apply_rotary_pos_emb if family.rotary else None
        ),
        layer_type=types[index] if types is not None else None,
        mlp=mlp,
        mlp_norm=layer.get_submodule(family.mlp_norm),
        after_mlp=optional_module(layer, family.after_mlp),
        gate=front[0] if family.gated else None,
        up=front[-1],
        down=down,
        activation=mlp.get_submodule(family.activation),
    )


def optional_module(layer: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else layer.get_submodule(path)


def split(
    parent: nn.Module, parent_path: str, names: tuple[str, ...], sizes: dict[str, int]
) -> list[Projection]:
    """The projections of `sizes`, in order: each its own module, or all in one fused module."""
    found = []
    start = 0
    for place, (part, size) in enumerate(sizes.items()):
        fused = len(names) == 1
        name = names[0] if fused else names[place]
        begin = start if fused else 0
        found.append(
            Projection(
                part,
                parent.get_submodule(name),
                f"{parent_path}.{name}".removeprefix("."),
                begin,
                begin + size,
            )
        )
        start += size
    return found


def _missing(base: PreTrainedModel, family: Family) -> list[str]:
    """The modules of `family` that `base` does not have."""
    wanted = [family.embedding, family.final_norm, "lm_head", family.layers]
    wanted += [path for path in (family.positions, family.rotary) if path]
    first = f"{family.layers}.0."
    inner = [family.attention_norm, family.mlp_norm, family.after_attention, family.after_mlp]
    inner += [f"{family.attention}.{name}" for name in (*family.queries, family.out)]
    inner += [f"{family.mlp}.{name}" for name in (*family.front, family.down, family.activation)]
    wanted += [first + path for path in inner if path]
    return [path for path in wanted if not has_module(base, path)]


def has_module(base: nn.Module, path: str) -> bool:
    try:
        base.get_submodule(path)
    except AttributeError:
        return False
    return True


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
