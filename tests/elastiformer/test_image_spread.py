"""Image tokens that are kept by their places as well as by their scores."""

from __future__ import annotations

import json
import math

import pytest
import torch

from elastiformer import AdapterError, SavedAdapter, Unit, dense_plan
from elastiformer.routers import even_places
from elastiformer.sight import keep
from elastiformer.vlm import ElasticVlm
from tests.elastiformer.test_vlm import CLOSE, HALF, asked, batch_of, elastic, run
from tests.tiny import LAYERS
from tests.tiny_vlms import PATCHES, save_tiny_vlm, tiny_vlm

PLANS = [(dense_plan(LAYERS), dense_plan(LAYERS))]
EVENLY = 1e6  # so much that scores say nothing


def spread(model: ElasticVlm, weight: float) -> ElasticVlm:
    model.adapter.spread_images(weight)
    return model


@pytest.mark.parametrize("weight", [10.0, EVENLY])
@pytest.mark.parametrize("gate", ["hard", "sigmoid"])
def test_masked_and_sparse_agree_on_places(weight, gate):
    model, batch = spread(elastic(token_gate=gate), weight), batch_of()
    _, actual = run(model, asked(model, HALF), cuts=(9,))
    with torch.inference_mode():
        found = model.masked_images(batch, PLANS, shares=0.4)
        scored = elastic(token_gate=gate).masked_images(batch, PLANS, shares=0.4)
    output_BS = batch.output_BT.gather(1, found.original_BS)
    torch.testing.assert_close(actual, found.logits_BSV[output_BS], **CLOSE)
    assert int(found.kept.sum()) == int(scored.kept.sum()) == 10
    assert not torch.equal(found.kept, scored.kept)
    assert torch.equal(found.scores, scored.scores)  # places rank tokens, and scale nothing
    if weight == EVENLY:
        assert torch.equal(found.kept, keep(even_places(PATCHES), 10)[None])


@pytest.mark.parametrize("weight", [0.0, 0.3, EVENLY])
def test_what_a_small_share_keeps_a_larger_one_keeps_too(weight):
    model, batch = spread(elastic(), weight), batch_of()
    before = torch.zeros(1, PATCHES, dtype=torch.bool)
    for count in range(1, PATCHES + 1):
        with torch.inference_mode():
            kept = model.masked_images(batch, PLANS, shares=count / PATCHES).kept
        if count == PATCHES:
            assert kept is None  # all of them
            break
        assert int(kept.sum()) == count and bool((kept | ~before).all())
        before = kept


@pytest.mark.parametrize("side", [12, 13, 14, 16, 21, 24, 27])
def test_places_of_any_number_lie_evenly_over_the_image(side):
    places = even_places(side * side)
    assert len(places.unique()) == side * side and places.min() >= 0 and places.max() < 1
    halves = (slice(0, side // 2), slice(side // 2, None))
    for count in range(1, side * side):
        kept = keep(places, count).view(side, side)
        for quarter in (kept[rows, columns] for rows in halves for columns in halves):
            assert abs(int(quarter.sum()) - count * quarter.numel() / side**2) < 3.5


def test_places_of_what_is_no_square_lie_evenly_over_their_order():
    tokens = 90
    for count in (9, 30, 60):
        at = keep(even_places(tokens), count).nonzero().squeeze(1)
        assert int(at.diff().max()) <= math.ceil(2 * tokens / count)


def test_the_spread_travels_with_the_adapter_and_none_leaves_no_trace(tmp_path):
    save_tiny_vlm(tmp_path / "base", tiny_vlm())
    model = ElasticVlm.load(str(tmp_path / "base"), dtype="float32")
    adapter = model.blank_adapter((Unit.IMAGE_TOKENS,), image_spread=2.5, lora_rank=0)
    plain = model.blank_adapter((Unit.IMAGE_TOKENS,), lora_rank=0)
    plain.routers.load_state_dict(adapter.routers.state_dict())
    plain.save(tmp_path / "plain")
    assert "image_spread" not in json.loads((tmp_path / "plain" / "adapter.json").read_text())
    model.attach(adapter)
    _, expected = run(model, asked(model, HALF))
    adapter.save(tmp_path / "spread")
    again = ElasticVlm.load(str(tmp_path / "base"), tmp_path / "spread", dtype="float32")
    assert again.adapter.spec.image_spread == again.adapter.routers.image.spread == 2.5
    assert torch.equal(run(again, asked(again, HALF))[1], expected)
    assert "spread 2.5" in (tmp_path / "spread" / "README.md").read_text()
    assert adapter.identity != plain.identity
    plain.spread_images(2.5)
    assert adapter.identity == plain.identity


@pytest.mark.parametrize("weight", [-1, "wide", True, None, math.inf, math.nan])
def test_a_malformed_spread_is_refused(tmp_path, weight):
    model = elastic()
    model.adapter.save(tmp_path)
    header = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(header | {"image_spread": weight}))
    told = "image spread: a finite number, at least 0; got"
    with pytest.raises(AdapterError, match=told):
        SavedAdapter.load(tmp_path)
    with pytest.raises(AdapterError, match=told):
        model.adapter.spread_images(weight)
    assert model.adapter.spec.image_spread == model.adapter.routers.image.spread == 0


def test_an_adapter_that_drops_no_image_tokens_has_none_to_spread():
    model = elastic()
    adapter = model.blank_adapter((Unit.CHANNELS,), lora_rank=0)
    with pytest.raises(AdapterError, match="no router for image_tokens"):
        adapter.spread_images(1.0)
