"""From pixels to the image tokens that run: tower, projector, router, and what they spent.

Tower and projector are the base's own code and are never left out. Of an image's tokens exactly
as many stay as was asked for, those that the router ranks highest, in their order.

Shape letters: B pictures   P image tokens   K kept ones   D width
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import elastiformer.flop_formulas  # noqa: F401  (registers them)
from elastiformer.adapter import Adapter
from elastiformer.capacity import Phase, Unit
from elastiformer.imaged import ImagedSequence, PlacedPicture, Shown
from elastiformer.routers import TokenGate, token_gate
from elastiformer.vlms import VlmLayout

_AT_ONCE = 8  # pictures that go through the tower together


class Sight:
    """The tower and the projector of one model. One thread owns it."""

    def __init__(self, vlm: VlmLayout) -> None:
        self._vlm = vlm
        self.tokens, self.flops = self._measured()

    @torch.inference_mode()
    def _measured(self) -> tuple[int, int]:
        """The tokens of an image, and the FLOPs of tower and projector: of every one the same."""
        empty = torch.zeros(1, *self._vlm.image_shape, device=self._device, dtype=self._dtype)
        with FlopCounterMode(display=False) as counter:
            tokens = self._vlm.features(empty).shape[1]
        return tokens, int(counter.get_total_flops())

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._vlm.whole.device
        return device

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._vlm.whole.dtype
        return dtype

    @torch.inference_mode()
    def see(self, sequences: Sequence[ImagedSequence], adapter: Adapter | None) -> None:
        """Look at every picture that is still to run, and count it where it is needed."""
        needing: dict[int, list[tuple[ImagedSequence, PlacedPicture]]] = defaultdict(list)
        for sequence in sequences:
            for placed in sequence.unseen:
                needing[placed.picture.digest].append((sequence, placed))
        each = list(needing.values())
        for start in range(0, len(each), _AT_ONCE):
            alike = each[start : start + _AT_ONCE]
            pixels = [pairs[0][1].picture.pixels_CHW for pairs in alike]
            features_BPD = self._vlm.features(torch.stack(pixels).to(self._device, self._dtype))
            for pairs, features_PD in zip(alike, features_BPD, strict=True):
                for sequence, placed in pairs:
                    sequence.shown[placed] = self._shown(features_PD, placed, adapter)
                    self._charge_routing(sequence, placed, adapter)
                for sequence in dict.fromkeys(sequence for sequence, _ in pairs):
                    self._charge_tower(sequence)

    def _shown(self, features_PD: Tensor, placed: PlacedPicture, adapter: Adapter | None) -> Shown:
        tokens = len(features_PD)
        if placed.kept == tokens:
            return Shown(features_PD, torch.arange(tokens).numpy())
        router = adapter.routers.image if adapter is not None else None
        assert adapter is not None and router is not None, "dropped tokens without a router"
        scores_P = router(features_PD)
        kept_P = keep(router.spaced(scores_P), placed.kept)
        number_K = kept_P.nonzero().squeeze(1)
        features_KD = gated(features_PD, scores_P, kept_P, adapter.spec.token_gate)[number_K]
        return Shown(features_KD, number_K.cpu().numpy())

    def _charge_tower(self, sequence: ImagedSequence) -> None:
        usage = sequence.usage
        usage.flops += self.flops
        usage.dense_flops += self.flops
        usage.parameters_used += self.flops // 2
        usage.dense_parameters += self.flops // 2

    def _charge_routing(
        self, sequence: ImagedSequence, placed: PlacedPicture, adapter: Adapter | None
    ) -> None:
        if placed.dropped:
            assert adapter is not None and adapter.routers.image is not None
            tokens, usage = placed.picture.tokens, sequence.usage
            routing = tokens * adapter.routers.image.flops_per_token
            usage.flops += routing
            usage.block_flops += routing
            usage.parameters_used += routing // 2
            usage.decide(Unit.IMAGE_TOKENS, Phase.PROMPT, tokens, placed.dropped)


def keep(scores: Tensor, count: int | Tensor) -> Tensor:
    """True for the `count` best-scoring tokens of each image, exactly so many: [..., P].

    Args:
        count: one for all, or one for each image, [...].
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    many = count if isinstance(count, int) else count[..., None]
    return order.argsort(dim=-1) < many


def kept_count(share: float, tokens: int) -> int:
    """How many of an image's tokens a share keeps: rounded, and at least one."""
    return max(1, round(share * tokens))


def gated(features: Tensor, scores: Tensor, kept: Tensor, form: TokenGate) -> Tensor:
    """Features [..., P, D] times their gates; a hard one leaves kept ones as they are."""
    gate = token_gate(scores, kept, form)
    return features * gate[..., None].to(features.dtype)
