"""ElasticEncoder: a pretrained encoder whose every item runs under its own plan.

It reads whole texts or images and answers each in one step: `step` runs the sparse form, for
serving; `masked` the differentiable one, for training; `teacher` the base itself. A head that
reads the class token alone leaves the other tokens in phase prompt: they owe keys and values, and
where none of them asks not even those (direct_reading.py).

Shape letters: B items   T tokens, padded   D width
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter, blank
from elastiformer.capacity import DENSE, Capacity, Plan
from elastiformer.costs import CostTable
from elastiformer.direct_reading import absorbing
from elastiformer.elastic import NO_ROUTING, Elastic
from elastiformer.encoder_families import Pooling, Reads
from elastiformer.encoder_inputs import ImageItems, TextItems
from elastiformer.encoder_weights import load_encoder
from elastiformer.encoders import EncoderLayout, describe_encoder
from elastiformer.encoding import EncoderForm, padded, said
from elastiformer.errors import BaseModelError, InputError
from elastiformer.masked import MaskedPass
from elastiformer.plan_grid import PlanGrid, Route, Selection
from elastiformer.sequence import Chunk, Item, ItemKinds, WholeSequence
from elastiformer.sparse import SparseForm
from elastiformer.tasks import Task
from elastiformer.weights import BaseIdentity

_FIRST_TOKENS = 8
_REMEMBERED = 1024  # capacities and lengths
_STRETCHED = 4  # how many times as long as wide an image may be, where its shape is kept


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Items side by side, padded, as the base takes them.

    `mask_BT` is False on padding, `output_BT` True where what the last layer leaves is read.
    """

    inputs: dict[str, Any]
    mask_BT: Tensor
    output_BT: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What the masked form gives, as `teacher`, and its routes."""

    outputs: Tensor
    routes: list[Route]


class ElasticEncoder(Elastic):
    """An encoder with its head and, perhaps, an adapter. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        images: Any = None,
        identity: BaseIdentity | None = None,
        pooling: Pooling | None = None,
        normalized: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        """
        Args:
            images: the image processor of a model that reads images.
            pooling: of features; if None, as its family's are.
            normalized: whether features are made unit length, as their model was trained.
            most_tokens: of a text, where the model's own files ask for less than it can take.
        """
        self.encoder: EncoderLayout = describe_encoder(base)
        self.task = self.encoder.task.value
        self.pooling = pooling or self.encoder.pooling
        self.normalized, self.images, self._most_tokens = normalized, images, most_tokens
        super().__init__(base, self.encoder.layers, adapter, tokenizer, identity)

    @classmethod
    def load(
        cls,
        base: str,
        adapter: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        task: Task | None = None,
    ) -> ElasticEncoder:
        """Load a base (a folder, a Hub id, or an embedded name) and its adapter.

        Args:
            task: what to load it for; if None, what its config says that it is.

        Raises:
            BaseModelError, UnsupportedModel, AdapterError: each saying what is wrong.
        """
        loaded = load_encoder(base, task, dtype, device)
        model = cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            images=loaded.images,
            identity=loaded.identity,
            pooling=None if loaded.pooling is None else Pooling(loaded.pooling),
            normalized=loaded.normalized,
            most_tokens=loaded.most_tokens,
        )
        model.attach_saved(adapter)
        return model

    def _shape(self, adapter: Adapter | None) -> ModelShape:
        shape = super()._shape(adapter)
        if self._outputs is None:
            return shape
        return replace(shape, absorbing=absorbing(self.layout, shape, self._outputs))

    @cached_property
    def _sparse(self) -> SparseForm:
        return EncoderForm(self.encoder, self.adapter, self.shape, self.pooling, self.normalized)

    @cached_property
    def context(self) -> int:
        """The most tokens of one text, or the tokens of an image."""
        if self.encoder.reads_images:
            return self.encoder.class_tokens + max(
                self.encoder.patch_count(*sides) for sides in self._image_sides
            )
        tokens = int(self.config.max_position_embeddings)
        # RoBERTa counts positions from behind the padding's.
        first = getattr(self.encoder.embeddings, "padding_idx", None)
        tokens -= 0 if first is None else first + 1
        return min(tokens, self._most_tokens or tokens)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the head's outputs, in order."""
        names = self.config.id2label
        return tuple(str(names[place]) for place in range(self.config.num_labels))

    @property
    def _outputs(self) -> int | None:
        """How many tokens in front are read of the last layer; None: all."""
        if self.encoder.task is Task.FEATURES and self.pooling is not Pooling.OWN:
            return 1 if self.pooling is Pooling.CLASS else None
        return self.encoder.class_tokens if self.encoder.reads is Reads.CLASS else None

    @property
    def reads_class(self) -> bool:
        """Whether only class tokens are read, so that all others are of phase prompt."""
        return self._outputs is not None

    # Items.

    @cached_property
    def inputs(self) -> TextItems | ImageItems:
        """What makes items of that which callers send."""
        if self.encoder.reads_images:
            assert self.images is not None, "a model that reads images without their processor"
            return ImageItems(self.images, self._channels, self.image)
        assert self.tokenizer is not None, "a model that reads texts without a tokenizer"
        return TextItems(self.tokenizer, self.context)

    def image(self, pixels_CHW: Tensor, seen: Many[int] | None = None) -> Item:
        """A processed image as an item.

        Args:
            seen: the patches that are shown to a masked autoencoder; if None, all.

        Raises:
            InputError: patches are hidden from a model that cannot do without.
        """
        first = self.encoder.class_tokens
        if seen is None:
            tokens = first + self.encoder.patch_count(*pixels_CHW.shape[1:])
            return Item(tuple(range(tokens)), pixels_CHW=pixels_CHW)
        if not self.encoder.hides_patches:
            raise InputError(
                f"image: {type(self.base).__name__} reads whole images; patches can be hidden "
                "from masked autoencoders alone"
            )
        ids = (*range(first), *(first + patch for patch in sorted(seen)))
        return Item(ids, pixels_CHW=pixels_CHW)

    @property
    def _channels(self) -> int:
        config: Any = self.encoder.inner.config
        return int(config.num_channels)

    @cached_property
    def _image_sides(self) -> tuple[tuple[int, int], ...]:
        """Height and width of images as they leave the processor: of one of the base's own shape,
        a wide one and a tall one; alike, unless it keeps their shape. Without a processor, those
        that the base was made for.

        Raises:
            BaseModelError: an image has not even one patch.
        """
        if self.images is None:
            return (self.encoder.image_sides,)
        inputs, sides = ImageItems(self.images, self._channels, self.image), []
        height, width = self.encoder.image_sides
        for times_high, times_wide in ((1, 1), (1, _STRETCHED), (_STRETCHED, 1)):
            shape_HWC = (height * times_high, width * times_wide, self._channels)
            pixels_CHW = inputs.item(np.zeros(shape_HWC, np.uint8)).pixels_CHW
            assert pixels_CHW is not None, "an image without pixels"
            sides.append((pixels_CHW.shape[1], pixels_CHW.shape[2]))
        if not all(self.encoder.patch_count(*each) for each in sides):
            (patch,) = self.encoder.patches
            shown = " x ".join(map(str, min(sides)))
            raise BaseModelError(
                f"base model '{self.identity.id}': its image processor makes images of {shown} "
                f"pixels, smaller than one patch of {' x '.join(map(str, patch.stride))}"
            )
        return tuple(sides)

    # The sparse form: packed, whole items, each under its own plan.

    def sequence(self, capacity: Capacity, item: Item) -> WholeSequence:
        """A new request; its one chunk is all of its ids.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: no token, or more than the model takes.
        """
        return WholeSequence(self._kinds(capacity, len(item.ids)), item)

    @cached_property
    def _kinds(self) -> Callable[[Capacity, int], ItemKinds]:
        """What an item of so many tokens runs under; worked out once, as many ask alike."""
        return lru_cache(maxsize=_REMEMBERED)(self._find_kinds)

    def _find_kinds(self, capacity: Capacity, tokens: int) -> ItemKinds:
        if not 1 <= tokens <= self.context:
            raise InputError(f"input: {tokens} tokens; this model takes 1 to {self.context}")
        capacity = self._spread(capacity, tokens)
        self._planner.check(capacity, tokens, tokens, self._outputs is None)
        return self._planner.of_whole(capacity, tokens, self._outputs)

    def blocks_for(
        self, capacity: Capacity, prompt_tokens: int, most_tokens: int, scored: bool = False
    ) -> int:
        """None, as no keys are kept; raises CapacityError as `sequence`."""
        capacity = self._spread(capacity, prompt_tokens)
        self._planner.check(capacity, prompt_tokens, prompt_tokens, self._outputs is None)
        return 0

    def _spread(self, capacity: Capacity, tokens: int) -> Capacity:
        """Under one number for all, the class tokens run whole and the others make up for it."""
        share = capacity.prompt
        if self._outputs is None or share != capacity.output or not isinstance(share, float):
            return capacity
        if share < self.lowest:
            return capacity  # which is refused
        if share == 1.0 or tokens <= self._outputs:
            return DENSE
        return Capacity(self._planner.others_of_item(share, tokens, self._outputs), 1.0)

    def encode(self, items: Many[Item], capacities: Many[Capacity]) -> list[Tensor]:
        """Run whole items in one step; what is read of each, in float32."""
        sequences = [self.sequence(*pair) for pair in zip(capacities, items, strict=True)]
        return self.step([Chunk(each, list(each.item.ids)) for each in sequences])

    def step(self, chunks: Many[Chunk]) -> list[Tensor]:
        """Run any mix of items, each whole.

        Returns:
            For each chunk, in float32: the head's outputs [O], of every token [T, O], or pooled
            features [D].
        """
        for chunk in chunks:
            assert len(chunk.ids) == chunk.sequence.most_tokens, "an encoder reads whole items"
        return super().step(chunks)

    def measure_costs(self, seconds: float = 1.0) -> CostTable:
        """Lay out the weights now, and measure from how many rows on a dense product is faster.

        A step is run as well: what is compiled or loaded at its first use then is.
        """
        costs = super().measure_costs(seconds)
        item = Item((0,) * min(_FIRST_TOKENS, self.context))
        if self.encoder.reads_images:
            item = self.image(torch.zeros(self._channels, *self._image_sides[0]))
        self.encode([item, item], [DENSE, Capacity(self.lowest, self.lowest)])
        return costs

    # The masked form, and the base itself: whole batches.

    def collate(self, items: Many[Item]) -> Batch:
        """Items of one kind as a batch."""
        longest = max(len(item.ids) for item in items)
        counts_B1 = torch.tensor([[len(item.ids)] for item in items], device=self.device)
        at_T = torch.arange(longest, device=self.device)
        mask_BT = at_T < counts_B1
        output_BT = mask_BT if self._outputs is None else (at_T < self._outputs) & mask_BT
        if self.encoder.reads_images:
            pixels = [item.pixels_CHW for item in items if item.pixels_CHW is not None]
            sides = {tuple(each.shape[1:]) for each in pixels}
            assert len(sides) == 1, f"side by side, images have one size; got {sorted(sides)}"
            pixels_BCHW = torch.stack(pixels).to(self.device, self.dtype)
            height, width = pixels_BCHW.shape[2:]
            told = self.encoder.of_sides(height, width)
            inputs: dict[str, Any] = {"pixel_values": pixels_BCHW, **told}
            if self.encoder.hides_patches:
                assert bool(mask_BT.all()), "side by side, images show as many patches"
                inputs["noise"] = self._noise(items, self.encoder.patch_count(height, width))
            return Batch(inputs, mask_BT, output_BT)
        pad = self.config.pad_token_id or 0
        inputs = {"input_ids": padded([item.ids for item in items], pad)}
        inputs["attention_mask"] = mask_BT.long()
        if self.encoder.takes_types:
            types = [item.types or (0,) * len(item.ids) for item in items]
            inputs["token_type_ids"] = padded(types, 0)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return Batch(inputs, mask_BT, output_BT)

    def _noise(self, items: Many[Item], patches: int) -> Tensor:
        """What makes a masked autoencoder see each item's patches, in their order: [B, P]."""
        first = self.encoder.class_tokens
        noise_BP = torch.ones(len(items), patches)
        for noise_P, item in zip(noise_BP, items, strict=True):
            seen = torch.tensor(item.ids[first:]) - first
            noise_P[seen] = torch.arange(len(seen)) / patches
        return noise_BP.to(self.device)

    def masked(self, batch: Batch, plans: PlanGrid | Many[tuple[Plan, Plan]]) -> Encoded:
        """One differentiable forward; tokens are chosen by rank, as in serving.

        Args:
            plans: a plan for each token, or one (prompt plan, output plan) for each item.
        """
        grid = plans if isinstance(plans, PlanGrid) else PlanGrid.by_phase(plans, batch.output_BT)
        adapter = self.adapter or blank(NO_ROUTING, self.layout, self.identity)
        masked = MaskedPass(
            self.layout,
            self.shape,
            adapter,
            grid,
            batch.output_BT,
            Selection.RANK,
            None if bool(batch.mask_BT.all()) else batch.mask_BT,
        )
        with masked.hooked():
            outputs = self.teacher(batch)
        return Encoded(outputs, masked.routes)

    def teacher(self, batch: Batch, mask_BT: Tensor | None = None) -> Tensor:
        """The untouched base's logits [B, O] or [B, T, O], or features.

        Features are those of every token [B, T, D], or [B, D] where the base pools them itself.
        """
        seen, whole = batch.mask_BT.shape[1] - self.encoder.class_tokens, 0
        if self.encoder.hides_patches:
            whole = self.encoder.patch_count(*batch.inputs["pixel_values"].shape[2:])
        with self.encoder.seeing(seen, whole):
            given = self.base(**batch.inputs)
        if self.encoder.task is Task.FEATURES and self.pooling is not Pooling.OWN:
            features_BTD: Tensor = given.last_hidden_state
            return features_BTD
        return said(self.encoder, given)
