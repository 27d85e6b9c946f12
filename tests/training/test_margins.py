"""Channels at the margin: what they are worth is true, and FLOPs go where they are worth more."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from elastiformer import ElasticModel, Phase, Unit
from elastiformer.calibration import walk
from elastiformer.capacity import Site
from training.margins import Margins, anchors, balanced, channel_flops, margin_path, plan_of
from training.sensitivity import Meter

LAYERS = 3
PLACES = [(layer, site.value) for layer in range(LAYERS) for site in Site]


@pytest.fixture
def model(tiny_llama) -> ElasticModel:
    model = ElasticModel(tiny_llama)
    model.attach(model.blank_adapter([Unit.CHANNELS], lora_rank=0))
    return model


@pytest.fixture
def ids_WT():
    return torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))


def test_what_channels_are_worth_is_what_the_loss_falls_by_when_they_are_kept(
    model, ids_WT, tmp_path
):
    shares = dict.fromkeys(PLACES, 0.8)
    worth = Margins(model, ids_WT, tmp_path / "notes").worth(shares)
    meter = Meter(model, ids_WT, prompt_tokens=20)

    def kl(place: tuple[int, str], by: float) -> float:
        return meter.kl(Phase.OUTPUT, plan_of({**shares, place: shares[place] + by}, LAYERS))

    saved = {place: kl(place, -0.04) - kl(place, 0.04) for place in PLACES}
    inputs = {"attention_in": 24, "attention_out": 40, "mlp_in": 24, "mlp_out": 56}
    told = {place: worth[place] * round(0.08 * inputs[place[1]]) for place in PLACES}
    both = torch.tensor([[saved[place], told[place]] for place in PLACES]).T
    assert torch.corrcoef(both)[0, 1] > 0.8


def test_an_answer_is_remembered_and_only_of_the_same_question(
    model, ids_WT, tmp_path, monkeypatch
):
    notes = tmp_path / "notes"
    first = Margins(model, ids_WT, notes).worth(dict.fromkeys(PLACES, 0.6))
    again = Margins(model, ids_WT, notes)
    monkeypatch.setattr(again, "_measure", lambda shares: dict.fromkeys(shares, 0.0))

    assert again.worth(dict.fromkeys(PLACES, 0.6)) == first
    assert set(again.worth(dict.fromkeys(PLACES, 0.5)).values()) == {0.0}


def test_a_round_spends_the_capacity_and_gives_to_where_a_flop_is_worth_more(model):
    shape = model.shape.of_phase(Phase.OUTPUT)
    even = dict.fromkeys(PLACES, 0.7)
    worth = {place: float(channel_flops(shape, *place)) for place in PLACES}
    worth[1, "mlp_in"] *= 3
    worth[2, "mlp_out"] = -1.0  # noise: it loses, but not all at once

    after = balanced(shape, 40, even, worth, 0.8, 0.7)

    spent = shape.planned_share(plan_of(after, LAYERS), 40)
    assert spent == pytest.approx(0.7, abs=0.01)
    assert after[1, "mlp_in"] > after[0, "mlp_in"] > after[2, "mlp_out"]
    assert after[0, "mlp_in"] - after[2, "mlp_out"] <= 0.16


def test_a_path_goes_down_and_meets_every_capacity(model, ids_WT, tmp_path):
    margins = Margins(model, ids_WT, tmp_path / "notes")
    path = margin_path(model, margins, 40, [1.0, 0.9, 0.8, 0.6])
    shape = model.shape.of_phase(Phase.OUTPUT)
    spent = [shape.planned_share(plan, 40) for plan in walk(path, LAYERS)]

    assert spent[0] == 1.0
    assert all(less <= more for more, less in pairwise(spent))
    for capacity in (0.8, 0.6):
        assert min(abs(each - capacity) for each in spent) < 0.02


def test_without_time_there_is_no_path(model, ids_WT, tmp_path):
    margins = Margins(model, ids_WT, tmp_path / "notes")
    assert margin_path(model, margins, 40, [0.8], until=0.0) == ()


def test_capacities_that_lie_near_share_an_anchor_and_the_lowest_has_its_own():
    assert anchors([1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.5]) == [0.8, 0.65, 0.5]
    assert anchors([0.8, 0.75]) == [0.8, 0.75]
    assert anchors([1.0, 0.9]) == []
