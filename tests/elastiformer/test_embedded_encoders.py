"""The promises on the embedded encoders and the adapters that ship with them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import elastiformer
from elastiformer import DENSE, Capacity, Chunk
from elastiformer.encoder import ElasticEncoder
from tests.training.fashion import sample

ADAPTERS = Path(elastiformer.__file__).parent / "adapters"
TEXTS = (
    "A wonderful film, and I loved every minute of it, from the first scene to the very last one.",
    "The battery died after two days, the screen flickers, and nobody answers my letters. Awful.",
    "It does what it says, no more and no less, and at that price one can hardly complain.",
)


@pytest.fixture(scope="module", params=["sentiment", "fashion-mnist"])
def model(request):
    return ElasticEncoder.load(request.param, ADAPTERS / request.param, dtype="float32")


@pytest.fixture(scope="module")
def items(model):
    if model.encoder.reads_images:
        images_NHWC = sample().pixels_NHW[:6, :, :, None].expand(-1, -1, -1, 3)
        return [model.inputs.item(image_HWC.numpy()) for image_HWC in images_NHWC]
    return [model.inputs.prepare(text).item for text in TEXTS]


def run(model, items, capacity):
    sequences = [model.sequence(capacity, item) for item in items]
    outputs = model.step([Chunk(each, list(each.item.ids)) for each in sequences])
    return torch.stack(outputs), [each.usage for each in sequences]


def test_capacity_one_says_what_transformers_says(model, items):
    outputs, usages = run(model, items, DENSE)
    with torch.inference_mode():
        expected = torch.cat([model.teacher(model.collate([item])) for item in items])
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    # Of the last layer, tokens that no head reads owe keys and values only.
    assert all(usage.capacity_spent < 1 for usage in usages)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_capacity_is_kept_within_a_token_and_counted_as_pytorch_counts_it(model, items, share):
    for item in items:
        with FlopCounterMode(display=False) as counter:
            _, (usage,) = run(model, [item], Capacity(share, share))
        assert usage.capacity_spent == pytest.approx(share, abs=0.02 + 1 / len(item.ids))
        assert usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_half_the_compute_rarely_changes_the_answer(model, items):
    whole, _ = run(model, items, DENSE)
    half, _ = run(model, items, Capacity(0.5, 0.5))
    assert (whole.argmax(-1) == half.argmax(-1)).sum() >= len(items) - 1
    assert not torch.equal(whole, half)


def test_every_capacity_was_measured_on_labels_with_its_time(model):
    rows = sorted(model.calibration.measured, key=lambda row: row.capacity)
    assert rows[0].capacity <= 0.5 and rows[-1].capacity == 1.0
    assert all(row.accuracy is not None and row.time_ratio is not None for row in rows)
    assert all(less.kl >= more.kl - 0.01 for less, more in pairwise(rows))
