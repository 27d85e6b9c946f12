"""Plans run another way: at the same cost, the better for a repair, and without a trace."""

from __future__ import annotations

import pytest
import torch

from elastiformer import ElasticModel, Unit
from elastiformer.calibration import Calibration, Step
from elastiformer.capacity import Phase
from tests.tiny import LAYERS, tiny
from training.baselines import under_paths
from training.picking import ChannelPicking, SkipPicking, laid_out, measure_picked
from training.quality import Setting, measure, recalibrate, windows_of
from training.regression import second_moments

SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
DROPPED = tuple(Step(layer, name, 0.0) for layer in (1, 2) for name in ("mlp_tokens",))
ALSO = (Step(1, "attention_tokens", 0.0), Step(0, "mlp_tokens", 0.0))


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request) -> ElasticModel:
    return picking_channels(request.param)


def picking_channels(family: str = "llama", dtype: torch.dtype = torch.float32) -> ElasticModel:
    """A model whose outputs pick channels, and whose prompts leave out whole sub-layers."""
    model = ElasticModel(tiny(family).to(dtype))
    model.attach(model.blank_adapter([Unit.CHANNELS], lora_rank=0))
    lower = tuple(
        Step(layer, site, share)
        for share in (0.8, 0.6, 0.4)
        for site in SITES
        for layer in range(LAYERS)
    )
    paths = {Phase.PROMPT: (*DROPPED, *ALSO), Phase.OUTPUT: lower}
    recalibrate(model, Calibration(0.4, 64, paths, thresholds={}, measured=()))
    return model


def texts(seed: int, windows: int = 4) -> torch.Tensor:
    return torch.randint(40, (windows, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("static", [True, False])
def test_channels_lose_less_when_what_is_left_out_is_guessed(model, static):
    windows = windows_of(model, texts(1), prompt_tokens=40)
    moments = second_moments(model, texts(2, 24))
    sizes = moments.sizes() if static else None

    def lost(moments) -> float:
        generator = torch.Generator().manual_seed(0)
        picking = ChannelPicking(model, generator, sizes, moments)
        return measure_picked(model, windows, 0.7, Setting.SCORED, picking).kl

    before = model.teacher(texts(3))
    assert 0 < lost(moments) < lost(None)
    assert torch.equal(model.teacher(texts(3)), before)


def test_what_is_left_out_is_guessed_in_bfloat16_too():
    model = picking_channels(dtype=torch.bfloat16)
    windows = windows_of(model, texts(1), prompt_tokens=40)
    moments = second_moments(model, texts(2, 24))

    def lost(moments) -> float:
        picking = ChannelPicking(model, torch.Generator(), None, moments)
        return measure_picked(model, windows, 0.7, Setting.SCORED, picking).kl

    assert 0 < lost(moments) < lost(None)


def test_dropped_sub_layers_lose_less_with_a_map_in_their_place_and_pay_for_it(model):
    windows = windows_of(model, texts(1), prompt_tokens=40)
    moments = second_moments(model, texts(2, 24))
    paths = {phase: (*DROPPED, *ALSO) for phase in Phase}
    before = model.teacher(texts(3))
    with under_paths(model, paths):
        plain = measure(model, windows, 0.7, Setting.SCORED)
        mended = {
            rank: measure_picked(
                model, windows, 0.7, Setting.SCORED, SkipPicking(model, moments, rank)
            )
            for rank in (1, 8)
        }

    assert all(row.kl < plain.kl for row in mended.values())
    assert all(row.spent == pytest.approx(plain.spent, abs=0.02) for row in mended.values())
    assert torch.equal(model.teacher(texts(3)), before)


def test_a_map_of_high_rank_leaves_less_of_a_capacity_to_its_plans(model):
    (window,) = windows_of(model, texts(1, 1), prompt_tokens=40)
    moments = second_moments(model, texts(2, 8))
    kept = []
    with under_paths(model, {phase: (*DROPPED, *ALSO) for phase in Phase}):
        for rank in (1, 4):
            picking = SkipPicking(model, moments, rank)
            under, _ = laid_out(model, window, 0.7, Setting.SCORED, picking)
            whole = under.each(
                lambda plan, _: sum(layer.mlp_tokens + layer.attention_tokens for layer in plan)
            )
            kept.append(float(whole.float().mean()))

    assert kept[1] < kept[0]


def test_prompts_run_as_the_model_itself_runs_them(model):
    windows = windows_of(model, texts(1), prompt_tokens=40)
    moments = second_moments(model, texts(2, 8))
    ours = measure(model, windows, 0.7, Setting.PROMPT)
    for picking in (
        ChannelPicking(model, torch.Generator(), moments.sizes(), moments),
        SkipPicking(model, moments, 2),
    ):
        row = measure_picked(model, windows, 0.7, Setting.PROMPT, picking)
        assert row.kl == pytest.approx(ours.kl, rel=1e-3, abs=1e-6)
