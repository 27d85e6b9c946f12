"""What leaving out image tokens loses, spends and saves, and what else could choose them.

Answers are read off one pass over prompt and answer through the form that is served: where every
token of the answer is the likeliest one, greedy decoding writes it and stops. Others that choose
which image tokens stay (choosers.py) are run through the masked form, at equal counts.

Shape letters: B exchanges   P image tokens   T tokens   R answer tokens   V vocabulary
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

from elastiformer import AdapterError, Capacity, CapacityError, Chunk, Unit
from elastiformer.calibration import Measured
from elastiformer.capacity import dense_plan
from elastiformer.imaged import ImagedPrompt
from elastiformer.sight import keep
from elastiformer.vlm import ElasticVlm
from training.choosers import CHOOSERS
from training.exchanges import Exchange, Exchanges, collated, judged, picture_in
from training.losses import Divergence, kl_per_token

AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class PictureQuality:
    """One capacity, or one chooser at equal counts, over some exchanges."""

    capacity: float
    kept: float  # share of the image tokens that stay
    kl: float  # to the pretrained model, in nats per answer token
    right: float  # share of the answers written word for word
    same: float  # share of the answers that are the pretrained model's
    spent: float | None = None  # the mean over exchanges of their spent share
    missed: float | None = None  # by how much the worst one missed its capacity

    def measured(self, time_ratio: float | None = None) -> Measured:
        """The row of a calibration's table."""
        assert self.spent is not None, "only what is served has a row"
        return Measured(
            capacity=self.capacity,
            spent=self.spent,
            kl=self.kl,
            greedy_agreement=self.same,
            accuracy=self.right,
            prefill_time_ratio=time_ratio,
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """Of each exchange the logits before each token of its answer, [R, V], and what it spent."""

    logits: list[Tensor]
    spent: list[float]
    kept: list[int]


def loaded(args: argparse.Namespace) -> ElasticVlm:
    """The model and the adapter that the options name.

    Raises:
        AdapterError: the adapter routes no image tokens.
    """
    model = ElasticVlm.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    if model.adapter is None or Unit.IMAGE_TOKENS not in model.adapter.units:
        raise AdapterError(f"{args.adapter}: has no router for {Unit.IMAGE_TOKENS}")
    return model


def some_of(exchanges: Exchanges, wanted: int) -> tuple[Exchange, ...]:
    """So many exchanges, by their content: in no order that matters."""
    return tuple(sorted(exchanges.each, key=lambda each: each.digest)[:wanted])


def reached(model: ElasticVlm, exchanges: Sequence[Exchange], capacity: float) -> bool:
    """Whether every one of these prompts can be run at a capacity."""
    try:
        for each in exchanges:
            prompt_at(model, each, capacity)
    except CapacityError:
        return False
    return True


def prompt_at(model: ElasticVlm, exchange: Exchange, capacity: float) -> ImagedPrompt:
    """An exchange's prompt as it runs at a capacity.

    Raises:
        CapacityError: no plan gives it.
    """
    both = Capacity(capacity, capacity)
    prompt = model.prompt(both, exchange.prompt, [picture_in(exchange, model)])
    model.blocks_for(prompt.capacity, len(prompt.ids), len(prompt.ids) + len(exchange.answer))
    return prompt


@torch.inference_mode()
def answers_at(model: ElasticVlm, exchanges: Sequence[Exchange], capacity: float) -> Answers:
    """Run prompts with their answers at a capacity.

    Raises:
        CapacityError: no plan gives it.
    """
    found = Answers([], [], [])
    for start in range(0, len(exchanges), AT_ONCE):
        some = exchanges[start : start + AT_ONCE]
        prompts = [prompt_at(model, each, capacity) for each in some]
        sequences = [
            model.imaged_sequence(prompt, len(each.answer))
            for prompt, each in zip(prompts, some, strict=True)
        ]
        chunks = [
            Chunk(sequence, [*prompt.ids, *each.answer[:-1]])
            for sequence, prompt, each in zip(sequences, prompts, some, strict=True)
        ]
        found.logits.extend(model.step(chunks))
        found.spent.extend(sequence.usage.capacity_spent for sequence in sequences)
        found.kept.extend(sum(placed.kept for placed in prompt.pictures) for prompt in prompts)
        for sequence in sequences:
            sequence.release()
    return found


def quality(
    model: ElasticVlm, exchanges: Sequence[Exchange], capacity: float, dense: Answers
) -> PictureQuality:
    """What one capacity loses and spends, beside the answers at capacity 1.0.

    Raises:
        CapacityError: no plan gives it.
    """
    ours = dense if capacity == 1 else answers_at(model, exchanges, capacity)
    missed = [
        max(spent - capacity, min(capacity, most) - spent)
        for spent, most in zip(ours.spent, dense.spent, strict=True)
    ]
    row = _judged(exchanges, ours.logits, dense.logits, capacity, ours.kept, model)
    return PictureQuality(*row, spent=fmean(ours.spent), missed=max(missed))


@torch.inference_mode()
def scores_by(model: ElasticVlm, chooser: str, exchanges: Sequence[Exchange], seed: int) -> Tensor:
    """What somebody else says of every image token: [B, P]."""
    starts = range(0, len(exchanges), AT_ONCE)
    rows = [CHOOSERS[chooser](model, exchanges[at : at + AT_ONCE], seed) for at in starts]
    return torch.cat(rows)


def chosen_by(
    model: ElasticVlm,
    scores_BP: Tensor,
    exchanges: Sequence[Exchange],
    capacity: float,
    dense: Answers,
) -> PictureQuality:
    """The same with as many image tokens as ours keep at this capacity, those scored best here.

    Raises:
        CapacityError: no plan gives it.
    """
    logits: list[Tensor] = []
    kept: list[int] = []
    whole = dense_plan(len(model.shape.layers))
    for start in range(0, len(exchanges), AT_ONCE):
        some = exchanges[start : start + AT_ONCE]
        counts = [
            sum(placed.kept for placed in prompt_at(model, each, capacity).pictures)
            for each in some
        ]
        with torch.inference_mode():
            count_B = torch.tensor(counts, device=scores_BP.device)
            chosen_BP = keep(scores_BP[start : start + AT_ONCE], count_B)
            batch = collated(some, model)
            result = model.masked_images(batch, [(whole, whole)] * len(some), chosen_NP=chosen_BP)
        judged_BS = judged(batch).gather(1, result.original_BS) & result.mask_BS
        logits += [row[mask] for row, mask in zip(result.logits_BSV, judged_BS, strict=True)]
        kept += counts
    row = _judged(exchanges, logits, dense.logits, capacity, kept, model)
    return PictureQuality(*row)


def _judged(
    exchanges: Sequence[Exchange],
    logits: Sequence[Tensor],
    dense: Sequence[Tensor],
    capacity: float,
    kept: Sequence[int],
    model: ElasticVlm,
) -> tuple[float, float, float, float, float]:
    """The fields of a quality, up to `same`."""
    right, same, apart = [], [], []
    for exchange, said_RV, whole_RV in zip(exchanges, logits, dense, strict=True):
        said_R = said_RV.argmax(-1).tolist()
        right.append(said_R == list(exchange.answer))
        same.append(said_R == whole_RV.argmax(-1).tolist())
        apart.append(float(kl_per_token(whole_RV, said_RV, Divergence()).mean()))
    share = fmean(kept) / model.sight.tokens
    return capacity, share, fmean(apart), fmean(right), fmean(same)


# Time.


def prefill_times(
    model: ElasticVlm, exchanges: Sequence[Exchange], capacities: Sequence[float], repeats: int
) -> dict[float, float]:
    """Each capacity's time to run the prompts one by one, over that at 1.0, and its FLOPs.

    Capacities take turns, so whatever else runs here falls on all of them.
    """
    taken: dict[float, list[float]] = {capacity: [] for capacity in capacities}
    prompts = {
        capacity: [prompt_at(model, each, capacity) for each in exchanges]
        for capacity in capacities
    }
    for _ in range(repeats):
        for place in range(len(exchanges)):
            for capacity in capacities:
                taken[capacity].append(_prefill(model, prompts[capacity][place]))
    pairs = {
        capacity: [ours / whole for ours, whole in zip(each, taken[1.0], strict=True)]
        for capacity, each in taken.items()
    }
    return {capacity: median(each) for capacity, each in pairs.items() if each}


def _prefill(model: ElasticVlm, prompt: ImagedPrompt) -> float:
    begun = time.perf_counter()
    sequence = model.imaged_sequence(prompt, 1)
    model.step([Chunk(sequence, list(prompt.ids))])
    taken = time.perf_counter() - begun
    sequence.release()
    return taken


def prefill_flops(model: ElasticVlm, exchanges: Sequence[Exchange], capacity: float) -> int:
    """What the prompts cost, tower and head among it."""
    total = 0
    for exchange in exchanges:
        prompt = prompt_at(model, exchange, capacity)
        sequence = model.imaged_sequence(prompt, 1)
        model.step([Chunk(sequence, list(prompt.ids))])
        total += sequence.usage.flops
        sequence.release()
    return total
