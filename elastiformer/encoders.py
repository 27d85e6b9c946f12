"""Where each encoder of Transformers keeps its modules, and what its head reads.

`describe_encoder(base)` gives the same `Layout` as for causal models: layers under one set of
names, so that the forms, the routers and the accounting are those of families.py. What comes
before the layers (tokens, patches, positions) and after them (pooler, head) is the base's own
code, called and never copied.

Shape letters: B items   T tokens   D width   P patches
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastiformer.accounting import LayerShape
from elastiformer.encoder_families import ENCODERS, HEADS, EncoderFamily, Pooling, Reads
from elastiformer.errors import UnsupportedModel
from elastiformer.families import Layer, Layout, has_module, optional_module, split
from elastiformer.tasks import Task


@dataclass(frozen=True, slots=True, eq=False)
class EncoderLayout:
    """An encoder's layers, and what stands before and after them."""

    layers: Layout
    outer: PreTrainedModel
    inner: PreTrainedModel  # the model under the head; itself where there is none
    embeddings: nn.Module
    opening: nn.Module | None
    pooler: nn.Module | None  # the base's own, where it is read
    pooling: Pooling  # of features, where nobody says another
    task: Task
    reads: Reads
    reads_images: bool
    takes_types: bool
    class_tokens: int
    hides_patches: bool
    interpolates: bool

    def embed(self, *given: Tensor, **more: Tensor) -> Tensor:
        """What the first layer reads, [B, T, D]: of an image all patches, in their order."""
        sides = given[0].shape[2:] if self.reads_images else ()
        other = self.of_sides(*sides) if sides else {}
        if self.hides_patches:
            patches = self.patch_count(*sides)
            noise_BP = torch.arange(patches, device=given[0].device).expand(len(given[0]), -1)
            with self.seeing(patches, patches):
                embedded_BTD: Tensor = self.embeddings(*given, noise=noise_BP, **other)[0]
            return embedded_BTD
        embedded_BTD = self.embeddings(*given, **more, **other)
        return embedded_BTD if self.opening is None else self.opening(embedded_BTD)

    def pooled(self, last_BTD: Tensor) -> Tensor | None:
        """What the base's own pooler makes of the last layer's tokens, [B, D], where it is read."""
        if self.pooler is None:
            return None
        pooled: Tensor = self.pooler(last_BTD)
        return pooled[:, 0] if pooled.ndim == last_BTD.ndim else pooled

    @contextmanager
    def seeing(self, patches: int, whole: int) -> Iterator[None]:
        """Where patches are hidden by noise: so many of the least noise are seen, and no others.

        Args:
            whole: how many patches the image has.
        """
        config: Any = self.inner.config
        if not self.hides_patches:
            yield
            return
        own = config.mask_ratio
        config.mask_ratio = 1 - (patches + 0.5) / whole  # which the base rounds down
        try:
            yield
        finally:
            config.mask_ratio = own

    @property
    def head_modules(self) -> list[nn.Linear]:
        """The matrices between the last layer and the answer that one row of an item meets."""
        under = {id(module) for module in self.inner.modules()}
        outside = [m for m in self.outer.modules() if id(m) not in under]
        if self.pooler is not None:
            outside += self.pooler.modules()
        return [module for module in outside if isinstance(module, nn.Linear)]

    @property
    def probes(self) -> list[nn.MultiheadAttention]:
        """Of the pooler: attention of one learned query over all of an item's tokens."""
        inside = [] if self.pooler is None else self.pooler.modules()
        return [module for module in inside if isinstance(module, nn.MultiheadAttention)]

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the images that it was made for, in pixels."""
        config: Any = self.inner.config
        side = config.image_size
        return (side, side) if isinstance(side, int) else tuple(side)

    def of_sides(self, height: int, width: int) -> dict[str, bool]:
        """What the base must be told of an image of so many pixels."""
        same = self.interpolates or (height, width) == self.image_sides
        return {} if same else {"interpolate_pos_encoding": True}

    def patch_count(self, height: int, width: int) -> int:
        """The patches of an image of so many pixels."""
        (patch,) = self.patches
        return (height // patch.stride[0]) * (width // patch.stride[1])

    @property
    def patches(self) -> list[nn.Conv2d]:
        """What turns an image into tokens."""
        return [m for m in self.embeddings.modules() if isinstance(m, nn.Conv2d)]


def describe_encoder(base: PreTrainedModel) -> EncoderLayout:
    """The layout of a pretrained encoder, with a head or without.

    Raises:
        UnsupportedModel: naming the architecture, and what of it is not known.
    """
    inner: PreTrainedModel = getattr(base, "vision_model", base.base_model)
    family = ENCODERS.get(type(inner).__name__)
    if family is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} has no entry in elastiformer/encoders.py (known: "
            f"{', '.join(sorted(ENCODERS))})"
        )
    task, reads = Task.FEATURES, Reads.TOKENS
    if inner is not base:
        if type(base).__name__ not in HEADS:
            raise UnsupportedModel(
                f"{type(base).__name__}: its head is not known (known: {', '.join(sorted(HEADS))})"
            )
        task, reads = HEADS[type(base).__name__]
    config: Any = base.config
    own = family.pooling is Pooling.OWN
    pooler = None
    if task is Task.FEATURES if own else inner is not base:
        pooler = getattr(inner, family.pooler, None)
    if own and pooler is not None:
        reads = Reads.CLASS if family.class_tokens else Reads.ALL
    if reads is Reads.CLASS and getattr(config, "classifier_pooling", "cls") == "mean":
        reads = Reads.ALL
    if missing := _missing(inner, family):
        raise UnsupportedModel(f"{type(inner).__name__}: this model lacks {', '.join(missing)}")
    if getattr(config, "is_decoder", False):
        raise UnsupportedModel(f"{type(base).__name__}: its config makes it a decoder")
    layers = tuple(
        _layer(inner, family, module, index)
        for index, module in enumerate(inner.get_submodule(family.layers).children())
    )
    prefix = "".join(f"{name}." for name, child in base.named_children() if child is inner)
    return EncoderLayout(
        layers=Layout(
            embedding=inner.embeddings,
            positions=None,
            rotary=inner.get_submodule(family.rotary) if family.rotary else None,
            rotary_by_layer_type=family.rotary is not None,
            rotary_by_length=False,
            layers=layers,
            layers_path=prefix + family.layers,
            final_norm=optional_module(inner, family.final_norm) or nn.Identity(),
            head=None,
            logit_softcap=None,
            width=layers[0].shape.width,
            vocabulary=0,
            causal=False,
        ),
        outer=base,
        inner=inner,
        embeddings=inner.embeddings,
        opening=optional_module(inner, family.opening),
        pooler=pooler,
        pooling=Pooling.MEAN if own and pooler is None else family.pooling,
        task=task,
        reads=reads,
        reads_images=family.reads_images,
        takes_types=family.takes_types and config.type_vocab_size > 1,
        class_tokens=family.class_tokens,
        hides_patches=family.hides_patches,
        interpolates=family.interpolates,
    )


def _layer(inner: PreTrainedModel, family: EncoderFamily, layer: nn.Module, index: int) -> Layer:
    config: Any = inner.config
    attention = layer.get_submodule(family.attention)
    heads: int = config.num_attention_heads
    (out,) = split(layer, "", (family.out,), {"out": config.hidden_size})
    size = out.weight_OI.shape[1]
    query, key, value = split(
        layer, "", family.queries, {"query": size, "key": size, "value": size}
    )
    (down,) = split(layer, "", (family.down,), {"down": config.hidden_size})
    mlp_width: int = down.weight_OI.shape[1]
    sizes = {"gate": mlp_width, "up": mlp_width} if family.gated else {"up": mlp_width}
    front = split(layer, "", (family.front,), sizes)
    types = getattr(config, "layer_types", None)
    return Layer(
        index=index,
        shape=LayerShape(
            width=config.hidden_size,
            heads=heads,
            kv_heads=heads,
            head_dim=size // heads,
            mlp_width=mlp_width,
            gated=family.gated,
        ),
        attention=attention,
        attention_norm=optional_module(layer, family.attention_norm) or nn.Identity(),
        after_attention=optional_module(layer, family.after_attention),
        query=query,
        key=key,
        value=value,
        out=out,
        query_norm=None,
        key_norm=None,
        scale=(size // heads) ** -0.5,
        window=getattr(attention, "sliding_window", None),
        softcap=None,
        rotate=(
            sys.modules[type(attention).__module__].apply_rotary_pos_emb if family.rotary else None
        ),
        layer_type=types[index] if types is not None else None,
        mlp=layer.get_submodule(family.mlp),
        mlp_norm=optional_module(layer, family.mlp_norm) or nn.Identity(),
        after_mlp=optional_module(layer, family.after_mlp),
        gate=front[0] if family.gated else None,
        up=front[-1],
        down=down,
        activation=layer.get_submodule(family.activation),
        attention_close=optional_module(layer, family.attention_close),
        mlp_close=optional_module(layer, family.mlp_close),
    )


def _missing(inner: nn.Module, family: EncoderFamily) -> list[str]:
    """The modules of `family` that this model does not have."""
    outer = ["embeddings", family.layers, family.final_norm, family.rotary, family.opening]
    inside = [
        family.attention,
        family.attention_norm,
        family.after_attention,
        family.attention_close,
        *family.queries,
        family.out,
        family.mlp,
        family.mlp_norm,
        family.after_mlp,
        family.mlp_close,
        family.front,
        family.down,
        family.activation,
    ]
    wanted = [path for path in outer if path]
    wanted += [f"{family.layers}.0.{path}" for path in inside if path]
    return [path for path in wanted if not has_module(inner, path)]
