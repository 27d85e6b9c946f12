"""What one number leaves out: image tokens first, then what the layers give, and it is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elastiformer import (
    DENSE,
    Calibration,
    Capacity,
    CapacityError,
    Chunk,
    Phase,
    Step,
    dense_plan,
)
from elastiformer.calibration import ImageFloor
from elastiformer.imaged import ImagedPrompt
from elastiformer.plan_grid import PlanGrid
from elastiformer.vlm import ElasticVlm
from tests.elastiformer.sighted import (
    CLOSE,
    asked,
    batch_of,
    elastic,
    run,
)
from tests.tiny import LAYERS
from tests.tiny_vlms import (
    PATCHES,
)


def calibrated(paths: dict[Phase, tuple[Step, ...]], lowest: float) -> ElasticVlm:
    model = elastic()
    assert model.adapter is not None
    model.adapter.calibration = Calibration(
        lowest=lowest, context=64, paths=paths, thresholds={}, measured=(), image_tokens=0.4
    )
    model.attach(model.adapter)
    return model


def long_prompt(model: ElasticVlm, prompt: float, output: float | None = None) -> ImagedPrompt:
    return asked(model, Capacity(prompt, output or prompt), images=5)


@pytest.mark.parametrize("capacity", [0.65, 0.5, 0.4])
def test_a_number_leaves_out_image_tokens_first_and_is_kept(capacity):
    model = calibrated(dict.fromkeys(Phase, ()), 0.4)
    prompt = long_prompt(model, capacity)
    assert prompt.capacity == DENSE and prompt.dropped > 0
    sequence = model.imaged_sequence(prompt, 1)
    model.step([Chunk(sequence, list(prompt.ids))])
    assert sequence.usage.capacity_spent == pytest.approx(capacity, abs=0.02)
    counts = [placed.kept for placed in prompt.pictures]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 10


def test_below_the_lowest_share_the_language_model_gives_the_rest():
    fields = {"heads": 0.5, "mlp_out": 0.3, "mlp_in": 0.3, "attention_in": 0.5}
    path = tuple(
        Step(layer, field, share) for field, share in fields.items() for layer in range(LAYERS)
    )
    model = calibrated(dict.fromkeys(Phase, path), 0.15)
    prompt = long_prompt(model, 0.2, 0.6)
    assert [placed.kept for placed in prompt.pictures] == [10] * 5
    assert prompt.capacity.output > 0.6  # each of few keys
    assert 0.2 < prompt.capacity.prompt < 1
    sequence = model.imaged_sequence(prompt, 1)
    model.step([Chunk(sequence, list(prompt.ids))])
    assert sequence.usage.capacity_spent == pytest.approx(0.2, abs=0.02)

    only_images = calibrated(dict.fromkeys(Phase, ()), 0.15)
    with pytest.raises(CapacityError, match="below the calibrated range"):
        only_images.imaged_sequence(long_prompt(only_images, 0.2), 1)


FLOORS = (ImageFloor(0.2, 0.4), ImageFloor(0.4, 0.7))
LEANER = tuple(
    Step(layer, field, share)
    for field, share in {"mlp_out": 0.4, "attention_in": 0.6, "heads": 0.5, "mlp_in": 0.4}.items()
    for layer in range(LAYERS)
)


def floored(floors: tuple[ImageFloor, ...]) -> ElasticVlm:
    model = calibrated(dict.fromkeys(Phase, LEANER), 0.15)
    assert model.adapter is not None and model.adapter.calibration is not None
    model.adapter.calibration = replace(model.adapter.calibration, image_floors=floors)
    model.attach(model.adapter)
    return model


@pytest.mark.parametrize("capacity", [0.35, 0.25])
def test_where_image_tokens_have_a_floor_the_layers_give_the_rest_and_it_is_kept(capacity):
    few, many = (long_prompt(floored(floors), capacity, 1.0) for floors in ((), FLOORS))
    share = 0.4 + 0.3 * (capacity - 0.2) / 0.2
    assert len(many.ids) > len(few.ids)
    assert many.capacity.prompt < few.capacity.prompt
    kept = sum(placed.kept for placed in many.pictures) / (5 * PATCHES)
    assert kept >= share - 0.5 / PATCHES
    model = floored(FLOORS)
    sequence = model.imaged_sequence(long_prompt(model, capacity, 1.0), 1)
    model.step([Chunk(sequence, list(sequence.imaged.ids))])
    assert sequence.usage.capacity_spent == pytest.approx(capacity, abs=0.02)


def test_generated_tokens_spend_what_they_were_asked_though_their_keys_are_fewer():
    model = floored(FLOORS)
    prompt = long_prompt(model, 0.4, 0.7)
    assert prompt.dropped > 0
    sequence = model.imaged_sequence(prompt, 70)
    model.step([Chunk(sequence, list(prompt.ids))])
    spent, dense = sequence.usage.block_flops, sequence.usage.dense_block_flops
    for token in range(64):
        model.step([Chunk(sequence, [token])])
    spent = sequence.usage.block_flops - spent
    dense = sequence.usage.dense_block_flops - dense
    assert spent / dense == pytest.approx(0.7, abs=0.02)


def test_an_answer_begins_with_whole_tokens_that_image_tokens_pay_for():
    model = calibrated({Phase.PROMPT: (), Phase.OUTPUT: LEANER}, 0.3)
    prompt, apart = long_prompt(model, 0.6), long_prompt(model, 0.6, 0.61)
    assert prompt.opening > 1 and apart.opening == 0
    assert len(prompt.ids) < len(apart.ids)
    sequence = model.imaged_sequence(prompt, 3 * prompt.opening)
    last = len(prompt.ids) - 1
    dense = [sequence.plan_at(last + at).is_dense for at in range(2 * prompt.opening)]
    assert dense == [True] * prompt.opening + [False] * prompt.opening
    model.step([Chunk(sequence, list(prompt.ids))])
    for token in range(3 * prompt.opening - 1):
        assert sequence.usage.capacity_spent == pytest.approx(0.6, abs=0.02)
        model.step([Chunk(sequence, [token])])
    assert sequence.usage.capacity_spent == pytest.approx(0.6, abs=0.02)


def test_a_share_of_what_is_generated_is_refused_where_none_can_be_given():
    model = calibrated(dict.fromkeys(Phase, ()), 0.5)
    with pytest.raises(CapacityError, match=r"capacity.output: .* got 0.7"):
        long_prompt(model, 0.6, 0.7)
    assert long_prompt(model, 0.6).capacity.output == 1.0


def test_a_numbers_image_tokens_and_layers_in_both_forms_agree():
    """What a number asks of both at once, token by token as it is served."""
    model = floored(FLOORS)
    prompt = asked(model, Capacity(0.4, 0.5))
    _, actual = run(model, prompt)
    batch = batch_of()
    kept = prompt.pictures[0].kept
    assert kept < PATCHES and prompt.capacity.prompt < 1
    with torch.inference_mode():
        dense = (dense_plan(LAYERS),) * 2
        stay = model.masked_images(batch, [dense], kept / PATCHES)
        at = model._planner.plan_at(prompt.capacity, len(prompt.ids))
        plans, plan_BT = [dense[0]], torch.zeros_like(batch.ids_BT)
        for place, origin in enumerate(stay.original_BS[0].tolist()):
            phase = Phase.OUTPUT if batch.output_BT[0, origin] else Phase.PROMPT
            plan_BT[0, origin] = len(plans)
            plans.append(at(phase, place).plan)
        found = model.masked_images(batch, PlanGrid(plans, plan_BT), kept / PATCHES)
    output_BS = batch.output_BT.gather(1, found.original_BS)
    torch.testing.assert_close(actual, found.logits_BSV[output_BS], **CLOSE)
    assert not torch.allclose(found.logits_BSV, stay.logits_BSV, atol=1e-3)
