"""What plans of a vision-language model's layers lose, on images and what is asked about them.

All image tokens stay here: what leaving them out loses beside a path is measured as it is served
(picture_calibrate.py). A plan is judged by the answers. Exchanges run a few at a time, and of the
pretrained model only what it says of the answers is kept.

Shape letters: B exchanges   T tokens, padded   N answer tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from elastiformer import Phase, Unit
from elastiformer.calibration import Schedule
from elastiformer.capacity import WHOLE_LAYER, Plan
from elastiformer.plan_grid import PlanGrid, Selection
from elastiformer.vlm import ElasticVlm
from training.allotment import TOKEN_FIELDS
from training.exchanges import Exchange, collated, judged
from training.sensitivity import AnyMeter, kl_sum

AT_ONCE = 8


class PictureMeter:
    """Runs plans through the masked form on a fixed set of exchanges, and says what they lose."""

    def __init__(self, model: ElasticVlm, exchanges: Sequence[Exchange]) -> None:
        starts = range(0, len(exchanges), AT_ONCE)
        self._parts = [_Part(model, exchanges[at : at + AT_ONCE]) for at in starts]
        self._tokens = sum(part.answers for part in self._parts)

    def kl(self, phase: Phase, plan: Plan, first_layer: int = 0) -> float:
        """KL in nats per answer token when the tokens of `phase` run under `plan`.

        Args:
            first_layer: below it `plan` keeps everything.
        """
        return sum(part.kl(phase, plan, first_layer) for part in self._parts) / self._tokens

    def scheduled_kl(self, phase: Phase, schedule: Schedule) -> float:
        """KL when the tokens of `phase` take turns between a schedule's two plans."""
        return sum(part.scheduled_kl(phase, schedule) for part in self._parts) / self._tokens

    def scores(
        self, units: Sequence[Unit], image_share: float
    ) -> Iterator[tuple[Phase, Unit, int, Tensor]]:
        """Every token router's scores of every token that stays, none leaving out a sub-layer."""
        found: dict[tuple[Phase, Unit, int], list[Tensor]] = {}
        for part in self._parts:
            for phase, unit, layer, scores_N in part.scores(units, image_share):
                found.setdefault((phase, unit, layer), []).append(scores_N)
        for place, scores in found.items():
            yield *place, torch.cat(scores)


class _Part(AnyMeter):
    """A few exchanges that run together; losses are sums over their answers' tokens."""

    def __init__(self, model: ElasticVlm, exchanges: Sequence[Exchange]) -> None:
        batch = collated(exchanges, model)
        super().__init__(model, batch.ids_BT)
        self._vlm, self._batch, self._judged_BT = model, batch, judged(batch)
        self.answers = int(self._judged_BT.sum())
        with torch.inference_mode():
            said_NV = model.teacher_images(batch)[self._judged_BT]
            self._said_NV = said_NV.float().log_softmax(-1)

    @torch.inference_mode()
    def scores(
        self, units: Sequence[Unit], image_share: float = 1.0
    ) -> Iterator[tuple[Phase, Unit, int, Tensor]]:
        asked = {unit.value: 1 - 1e-9 for unit in units if unit.value in TOKEN_FIELDS}
        if not asked:
            return
        plan = (replace(WHOLE_LAYER, **asked),) * self._layers
        pairs = [(plan, plan)] * len(self._ids_WT)
        result = self._vlm.masked_images(self._batch, pairs, image_share, Selection.RANK)
        output_BS = self._batch.output_BT.gather(1, result.original_BS)
        for route in result.routes:
            if route.unit.value in asked:
                for phase in Phase:
                    active_BS = route.active_BT & (output_BS == (phase is Phase.OUTPUT))
                    scores_N = route.scores[active_BS & result.mask_BS]
                    yield phase, route.unit, route.layer, scores_N.float().cpu()

    def _output(self, phase: Phase) -> Tensor:
        return self._batch.output_BT

    def _run(self, phase: Phase, plans: Plan | PlanGrid) -> float:
        result = self._vlm.masked_images(
            self._batch, self._grid(phase, plans), selection=Selection.RANK
        )
        return kl_sum(self._said_NV, result.logits_BSV[self._judged_BT].float())
