"""ElasticVlm: a pretrained vision-language model whose every request sets what it pays.

It is a causal model whose prompts may hold images. Image tokens can be left out before the
language model (`prompt` says how many stay, sight.py which ones), so that its layers, and its
cache, never meet them; the language model's own units work on those that stay. `masked_images`
is the differentiable form, for training.

Shape letters: B batch   T tokens as sent   S tokens that stay, padded   P image tokens
    D width   V vocabulary
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastiformer.adapter import Adapter
from elastiformer.capacity import DENSE, Capacity, Phase, Plan, Share, Unit, UnitShares, dense_plan
from elastiformer.costs import CostTable
from elastiformer.errors import CapacityError, InputError
from elastiformer.imaged import ImagedPrompt, ImagedSequence, Picture
from elastiformer.imaging import ImagingForm
from elastiformer.model import ElasticModel
from elastiformer.picture_inputs import PictureInputs
from elastiformer.plan_grid import PlanGrid, Route, Selection
from elastiformer.planning import Opening, answer_opening, opened
from elastiformer.sequence import Chunk
from elastiformer.sight import Sight, gated, keep, kept_count
from elastiformer.sparse import SparseForm
from elastiformer.tasks import IMAGE_TEXT_TO_TEXT
from elastiformer.vlm_weights import load_vlm
from elastiformer.vlms import describe_vlm
from elastiformer.weights import BaseIdentity, config_hash

NOTHING_WHOLE = Opening(0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class ImagedBatch:
    """Prompts with their continuations, padded at the end; one image's tokens after another.

    `mask_BT` is False on padding, `output_BT` True where a token is of phase output.
    """

    ids_BT: Tensor
    pixels_NCHW: Tensor  # of all images, in the order of their tokens
    mask_BT: Tensor
    output_BT: Tensor

    def repeated(self, times: int) -> ImagedBatch:
        """All of it again and again, so many times."""
        parts = (self.ids_BT, self.pixels_NCHW, self.mask_BT, self.output_BT)
        return ImagedBatch(*(torch.cat([part] * times) for part in parts))


@dataclass(frozen=True, slots=True, eq=False)
class ImagedResult:
    """What the masked form gives, of the tokens that stay.

    `original_BS` says where each of them stood in the batch, `mask_BS` is False on padding.
    `scores` and `kept` are the image router's, [N, P]; None where no image token was dropped.
    """

    logits_BSV: Tensor
    original_BS: Tensor
    mask_BS: Tensor
    routes: list[Route]
    scores: Tensor | None
    kept: Tensor | None


class ElasticVlm(ElasticModel):
    """A vision-language model and, perhaps, an adapter. Not thread-safe: one thread owns it."""

    task = IMAGE_TEXT_TO_TEXT

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        images: Any = None,
        identity: BaseIdentity | None = None,
    ) -> None:
        """
        Args:
            images: the image processor.
        """
        self.vlm = describe_vlm(base.eval().requires_grad_(False))
        self.images = images
        identity = identity or BaseIdentity(
            base.config.name_or_path or type(base).__name__, "unknown", config_hash(base.config)
        )
        super().__init__(self.vlm.language, adapter, tokenizer=tokenizer, identity=identity)

    @classmethod
    def load(
        cls,
        base: str,
        adapter: Any = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> Self:
        """Load a base (a folder, a Hub id, or an embedded name) and its adapter.

        Raises:
            BaseModelError, UnsupportedModel, AdapterError: each saying what is wrong.
        """
        loaded = load_vlm(base, dtype, device)
        model = cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            images=loaded.images,
            identity=loaded.identity,
        )
        model.attach_saved(adapter)
        return model

    @cached_property
    def _sparse(self) -> SparseForm:
        return ImagingForm(self.layout, self.adapter, self.shape)

    @cached_property
    def sight(self) -> Sight:
        return Sight(self.vlm)

    @cached_property
    def pictures(self) -> PictureInputs:
        """What makes pictures, and prompts that hold them, of that which callers send."""
        assert self.images is not None, "a model that reads images without their processor"
        channels = self.vlm.image_shape[0]
        return PictureInputs(self.images, channels, self.sight.tokens, self.vlm.image_token)

    # Prompts.

    def prompt(
        self, capacity: Capacity, ids: Many[int], pictures: Many[Picture] = ()
    ) -> ImagedPrompt:
        """A prompt as it runs at a capacity; each picture has its image tokens among the ids.

        Under one number for all, image tokens are left out first, down to the share that was
        calibrated for that number, and the language model's own units give what is still asked for.
        What image tokens can pay for beforehand, an answer begins with: some tokens that run whole.

        Raises:
            CapacityError: below the calibrated range; image tokens are to be left out, and the
                adapter has no router for them; or less of what is generated, and nothing of it
                can be left out.
        """
        for asked in (capacity.prompt, capacity.output):
            if self.calibration is not None and isinstance(asked, float):
                self.calibration.refuse_below(asked)
        tokens = [picture.tokens for picture in pictures]
        share = capacity.prompt
        kept, rest, opening = tokens, capacity, NOTHING_WHOLE
        if isinstance(share, UnitShares):
            if share.image_tokens < 1:
                self._check_router()
                kept = [kept_count(share.image_tokens, count) for count in tokens]
            rest = replace(rest, prompt=_without_images(share))
        elif share < 1 and tokens and (lowest := self._image_floor(share)) is not None:
            if capacity.output == share and self.outputs_give and self.shape.kv == "complete":
                opening = answer_opening(share, len(ids))
            kept, left, opening = self._kept(share, len(ids), tokens, lowest, opening)
            rest = replace(rest, prompt=left)
        output = rest.output
        if isinstance(output, UnitShares):
            rest = replace(rest, output=_without_images(output))
        elif output < 1:
            running = len(ids) - sum(tokens) + sum(kept)
            rest = replace(rest, output=self._of_output(capacity, len(ids), running))
        return ImagedPrompt.of(ids, self.vlm.image_token, pictures, kept, rest, opening.tokens)

    @property
    def outputs_give(self) -> bool:
        """Whether anything of what is generated can be left out under a number."""
        return self.calibration is not None and bool(self.calibration.paths[Phase.OUTPUT])

    def _of_output(self, capacity: Capacity, sent: int, running: int) -> float:
        """What is asked of the tokens that are generated, each of which attends to fewer keys."""
        share = capacity.output
        assert not isinstance(share, UnitShares), "keep shares are not of the FLOPs"
        calibration = self.calibration
        gives_images = calibration is not None and calibration.image_tokens is not None
        if gives_images and not self.outputs_give:
            if share != capacity.prompt:
                raise CapacityError(
                    f"capacity.output: this model's adapter leaves out image tokens alone, and "
                    f"nothing of what is generated: 1.0 is all that can be asked; got {share:g}"
                )
            return 1.0
        if running == sent:
            return share
        fewer_keys = self.shape.dense_token_flops(sent) / self.shape.dense_token_flops(running)
        return min(1.0, share * fewer_keys)

    def _image_floor(self, capacity: float) -> float | None:
        return self.calibration.image_floor(capacity) if self.calibration is not None else None

    def _check_router(self) -> None:
        if self.adapter is None or self.adapter.routers.image is None:
            units = self.adapter.units if self.adapter is not None else ()
            raise CapacityError(
                f"capacity: this model's adapter has no router for {Unit.IMAGE_TOKENS}; it has "
                f"{', '.join(units) or 'none'}"
            )

    def _kept(
        self, share: float, sent: int, tokens: Many[int], lowest: float, opening: Opening
    ) -> tuple[list[int], float, Opening]:
        """How many of each picture's tokens stay, and what the language model is asked for.

        And how an answer begins: as wished, if image tokens alone can pay for it.
        """
        self._check_router()
        shape = self.shape.of_phase(Phase.PROMPT)
        plan = dense_plan(len(shape.layers))
        due = share * sent * self.shape.dense_token_flops(sent)
        router = self.adapter.routers.image if self.adapter is not None else None
        assert router is not None, "checked above"
        total, text = sum(tokens), sent - sum(tokens)
        least = sum(kept_count(lowest, count) for count in tokens)

        def cost(kept: int) -> float:
            running = text + kept
            routing = router.flops_per_token * total if kept < total else 0
            return running * shape.planned_token_flops(plan, running) + routing

        paid = opening.paid * self.shape.dense_token_flops(sent)
        if fitting := bisect_right(range(least, total + 1), due - paid, key=cost):
            return _spread(least + fitting - 1, tokens), 1.0, opening
        if opening.tokens:
            return self._kept(share, sent, tokens, lowest, NOTHING_WHOLE)
        running = text + least
        left = due - (router.flops_per_token * total if least < total else 0)
        asked = left / (running * self.shape.dense_token_flops(running))
        return _spread(least, tokens), asked, NOTHING_WHOLE

    # The sparse form.

    def imaged_sequence(
        self, prompt: ImagedPrompt, most_new: int, shared: bool = False
    ) -> ImagedSequence:
        """A new request whose prompt holds images; its `length` says what must not be fed again.

        Args:
            shared: whether others will come with the very same prompt.

        Raises:
            CapacityError: below the calibrated range, or a unit that the adapter lacks.
            InputError: more tokens, dropped ones included, than the context holds.
            CacheFull: an opened cache has no room for it now.
        """
        if not prompt.ids:
            raise InputError("a prompt has at least one token; got none")
        self._check_context(prompt.tokens + most_new)
        tokens = len(prompt.ids)
        cache = self._room_for(prompt.capacity, tokens, tokens + most_new, scored=False)
        plan_at = self._planner.plan_at(prompt.capacity, tokens)
        if prompt.opening:
            whole = self._planner.pricing[Phase.OUTPUT].dense
            plan_at = opened(plan_at, whole, tokens - 1 + prompt.opening)
        sequence = ImagedSequence(plan_at, tokens + most_new, cache, prompt)
        self._adopt(sequence, prompt.keys, shared, most=tokens - 1)
        return sequence

    def step(self, chunks: Many[Chunk]) -> list[Tensor]:
        """As `ElasticModel.step`; pictures that now begin to run are looked at first."""
        imaged = [c.sequence for c in chunks if isinstance(c.sequence, ImagedSequence)]
        self.sight.see(imaged, self.adapter)
        logits = super().step(chunks)
        for sequence in imaged:
            sequence.forget()
        return logits

    def measure_costs(self, seconds: float = 1.0) -> CostTable:
        """As `ElasticModel.measure_costs`; the tower is measured and a picture is run as well."""
        costs = super().measure_costs(seconds)
        tokens = self.sight.tokens
        empty = Picture(torch.zeros(self.vlm.image_shape), tokens, digest=0)
        ids = [self.vlm.image_token] * tokens + [0]
        request = self.imaged_sequence(self.prompt(DENSE, ids, [empty]), 1)
        self.step([Chunk(request, list(request.imaged.ids))])
        request.release()
        return costs

    # The masked form, and the base itself: whole batches.

    def masked_images(
        self,
        batch: ImagedBatch,
        plans: PlanGrid | Many[tuple[Plan, Plan]],
        shares: float | Many[float] = 1.0,
        selection: Selection = Selection.THRESHOLD,
        chosen_NP: Tensor | None = None,
    ) -> ImagedResult:
        """One differentiable forward over whole rows, dropped image tokens taken out of them.

        Args:
            plans: a plan for each token as sent, or one (prompt plan, output plan) for each row.
            shares: of each image's tokens, that stay; one for all, or one for each image.
            chosen_NP: which image tokens stay, where somebody else than the router chooses.
        """
        features_NPD = self.vlm.features(batch.pixels_NCHW)
        images, tokens, _ = features_NPD.shape
        each = [shares] * images if isinstance(shares, int | float) else list(shares)
        image_BT = batch.ids_BT == self.vlm.image_token
        keep_BT, scores_NP, kept_NP = batch.mask_BT.bool(), None, chosen_NP
        if chosen_NP is None and any(share < 1 for share in each):
            self._check_router()
            assert self.adapter is not None and self.adapter.routers.image is not None
            router = self.adapter.routers.image
            scores_NP = router(features_NPD)
            counts = torch.tensor([kept_count(share, tokens) for share in each])
            kept_NP = keep(router.spaced(scores_NP), counts.to(scores_NP.device))
            features_NPD = gated(features_NPD, scores_NP, kept_NP, self.adapter.spec.token_gate)
        if kept_NP is not None:
            keep_BT = keep_BT.masked_scatter(image_BT, kept_NP)
        embedded_BTD = self.embedded(batch, features_NPD)
        stay = _staying(keep_BT)
        at_BSD = stay.original_BS[..., None].expand(-1, -1, embedded_BTD.shape[2])
        output_BS = batch.output_BT.gather(1, stay.original_BS)
        if isinstance(plans, PlanGrid):
            plans = PlanGrid(plans.plans, plans.plan_BT.gather(1, stay.original_BS))
        result = self._masked(
            # A mask is always given: without one, gaps in the positions would part sequences.
            {"inputs_embeds": embedded_BTD.gather(1, at_BSD), "position_ids": stay.original_BS},
            plans,
            output_BS,
            selection,
            stay.mask_BS,
        )
        return ImagedResult(
            result.logits_BTV, stay.original_BS, stay.mask_BS, result.routes, scores_NP, kept_NP
        )

    def embedded(self, batch: ImagedBatch, features_NPD: Tensor) -> Tensor:
        """What the language model reads: [B, T, D], with these features in the images' places."""
        embedded_BTD: Tensor = self.layout.embedding(batch.ids_BT)
        image_BT1 = (batch.ids_BT == self.vlm.image_token)[..., None]
        return embedded_BTD.masked_scatter(image_BT1, features_NPD.to(embedded_BTD.dtype))

    def teacher(self, ids_BT: Tensor | ImagedBatch, mask_BT: Tensor | None = None) -> Tensor:
        """The untouched base's logits [B, T, V] on text, or on a batch with images."""
        if isinstance(ids_BT, ImagedBatch):
            return self.teacher_images(ids_BT)
        return super().teacher(ids_BT, mask_BT)

    def teacher_images(self, batch: ImagedBatch) -> Tensor:
        """The untouched base's logits [B, T, V]."""
        whole: Any = self.vlm.whole
        logits: Tensor = whole(
            input_ids=batch.ids_BT,
            pixel_values=batch.pixels_NCHW,
            attention_mask=batch.mask_BT,
            use_cache=False,
        ).logits
        return logits


@dataclass(frozen=True, slots=True, eq=False)
class _Stay:
    original_BS: Tensor
    mask_BS: Tensor


def _staying(keep_BT: Tensor) -> _Stay:
    """The kept tokens of each row, in order and moved to its front; where they stood."""
    count_B = keep_BT.sum(1)
    order_BT = (~keep_BT).long().argsort(dim=1, stable=True)
    longest = int(count_B.max())
    at_S = torch.arange(longest, device=keep_BT.device)
    return _Stay(order_BT[:, :longest], at_S < count_B[:, None])


def _without_images(share: UnitShares) -> Share:
    rest = replace(share, image_tokens=1.0)
    return 1.0 if rest.is_dense else rest


def _spread(kept: int, tokens: Many[int]) -> list[int]:
    """So many tokens over the pictures, by their sizes; of each at least one."""
    counts: list[int] = []
    left, among = kept, sum(tokens)
    for place, size in enumerate(tokens):
        behind = len(tokens) - place - 1
        count = min(max(1, round(left * size / among)), size, left - behind)
        counts.append(count)
        left, among = left - count, among - size
    return counts
