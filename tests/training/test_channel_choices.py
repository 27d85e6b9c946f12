"""Channels chosen otherwise: as many as the plan says, at its FLOPs, by what was named alone."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest
import torch

from elastiformer import ElasticModel
from elastiformer.accounting import layer_cost
from elastiformer.capacity import LayerPlan, Site
from tests.tiny import MLP_WIDTH, WIDTH, tiny
from tests.training.test_picking import picking_channels, texts
from training.ablation_rows import OUTPUTS
from training.channel_choices import (
    EVERYWHERE,
    Choice,
    ChoicePicking,
    Learnt,
    block_mean,
    chosen,
    fewer_neurons,
    held,
    mean_before,
    own,
    running_mean,
    sequence_mean,
    token_before,
)
from training.learnt import gradients, up_sizes
from training.picking import AsPlanned, Under, laid_out, measure_picked, run_picked
from training.quality import Setting, Window, measure, windows_of

SEEN = (
    *(own, token_before, mean_before, sequence_mean),
    *(block_mean(4), held(2), running_mean(0.25)),
)
PROMPT = 40


def sizes(seed: int = 0, tokens: int = 11, inputs: int = 7) -> torch.Tensor:
    return torch.rand(2, tokens, inputs, generator=torch.Generator().manual_seed(seed))


def scored(model: ElasticModel, window: Window, capacity: float = 0.6) -> Under:
    return laid_out(model, window, capacity, Setting.SCORED, AsPlanned())[0]


@pytest.mark.parametrize("seen", SEEN)
def test_every_token_keeps_as_many_as_its_plan_says(seen):
    count_T = torch.tensor([3, 5, 2, 7, 1, 4, 4, 6, 2, 3, 5])
    kept_BTI = chosen(sizes(), count_T, Choice(seen=seen), Site.MLP_IN)
    assert torch.equal(kept_BTI.sum(-1), count_T.expand(2, -1))


def test_under_one_threshold_tokens_keep_as_many_together():
    sizes_BTI, count_T = sizes(), torch.full((11,), 3)
    kept_BTI = chosen(sizes_BTI, count_T, Choice(threshold_at=EVERYWHERE), Site.MLP_IN)
    assert (kept_BTI[:, 0].sum(-1) == 3).all() and (kept_BTI[:, 1:].sum((1, 2)) == 30).all()
    for kept_TI, sizes_TI in zip(kept_BTI[:, 1:], sizes_BTI[:, 1:], strict=True):
        assert sizes_TI[kept_TI].min() > sizes_TI[~kept_TI].max()
    elsewhere = chosen(sizes_BTI, count_T, Choice(threshold_at={Site.MLP_OUT}), Site.MLP_IN)
    assert (elsewhere.sum(-1) == 3).all()


@pytest.mark.parametrize("seen", SEEN)
def test_position_0_chooses_for_itself_and_tells_no_other_token(seen):
    count_T, changed_BTI = torch.full((11,), 3), sizes()
    changed_BTI[:, 0] = sizes(seed=1)[:, 0] * 100
    before, after = (
        chosen(each, count_T, Choice(seen=seen), Site.MLP_IN) for each in (sizes(), changed_BTI)
    )
    assert torch.equal(before[:, 1:], after[:, 1:])
    alone = chosen(changed_BTI, count_T, Choice(), Site.MLP_IN)
    assert torch.equal(after[:, 0], alone[:, 0])


@pytest.mark.parametrize("seen", [own, token_before, mean_before, held(4), running_mean(0.25)])
def test_what_a_decode_could_do_sees_no_later_token(seen):
    whole_BRI = seen(sizes())
    torch.testing.assert_close(seen(sizes()[:, :6]), whole_BRI[:, :6])


def test_sizes_of_others_are_those_that_the_name_says():
    sizes_B4I = torch.tensor([[[1.0], [3.0], [8.0], [2.0]]])

    def of(seen) -> list[float]:
        return seen(sizes_B4I).flatten().tolist()

    assert of(block_mean(3)) == [4, 4, 4, 2] and of(sequence_mean) == [3.5] * 4
    assert of(token_before) == [1, 1, 3, 8] and of(held(2)) == [1, 1, 8, 8]
    assert of(mean_before) == [1, 1, 2, 4] and of(running_mean(0.5)) == [1, 1, 2, 5]


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.7, 0.95, 1.0])
def test_fewer_neurons_of_up_cost_what_the_plan_costs(share, kept):
    shape = replace(ElasticModel(tiny()).shape.layers[0], width=576, mlp_width=1536)
    plan = LayerPlan(mlp_in=kept, mlp_out=0.5)
    inputs, neurons = fewer_neurons(shape, plan, share)
    planned = layer_cost(shape, plan, "complete", True).mlp_kept
    spent = 2 * inputs * (1536 + neurons) + 2 * 768 * 576
    assert spent == pytest.approx(planned, rel=1e-3)
    assert inputs >= plan.kept("mlp_in", 576) and neurons >= 768
    assert (neurons < 1536) == (kept < 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_as_many_for_each_lose_and_spend_what_is_served_without_thresholds(family):
    model = picking_channels(family)
    windows = windows_of(model, texts(1), PROMPT)
    served = measure(model, windows, 0.6, Setting.SCORED)
    found = measure_picked(model, windows, 0.6, Setting.SCORED, ChoicePicking(model, Choice()))
    assert found.kl == pytest.approx(served.kl, rel=1e-3) and found.kl > 0.001
    assert found.spent == pytest.approx(served.spent, abs=1e-3)


@pytest.mark.parametrize("row", [row for row in OUTPUTS if row.choice], ids=lambda row: row.name)
def test_every_choice_changes_what_is_lost_not_what_is_spent_and_leaves_no_trace(row):
    model = picking_channels()
    (window,) = windows_of(model, texts(1, 1), PROMPT)
    learnt = Learnt(gradients(model, texts(2), seed=0), up_sizes(model, texts(2)))
    means = {
        (layer.index, site): 0.1 * torch.ones_like(model.layout.column_norms(layer, site))
        for layer in model.layout.layers
        for site in row.choice.constant_at
    }
    under = scored(model, window)
    with torch.inference_mode():
        picking = ChoicePicking(model, row.choice, learnt, means)
        logits_TV = run_picked(model, window.ids_T[None], under, picking)[0]
        plain_TV = run_picked(model, window.ids_T[None], under, AsPlanned())[0]
    planned = sum(
        model.shape.planned_token_flops(under.kinds[kind][0], 64) for kind in under.kind_T.tolist()
    )
    assert abs(picking.more_flops(under)) < 0.002 * planned
    same = torch.allclose(logits_TV, plain_TV, atol=1e-5)
    assert same == (row.name in ("as-many-for-each", "uniform-shares"))
    assert torch.equal(model.teacher(window.ids_T[None])[0], window.teacher_TV)


def test_what_is_left_out_counts_as_its_constant_and_its_mean_is_what_it_was():
    model = picking_channels()
    (window,) = windows_of(model, texts(1, 1), PROMPT)
    under = scored(model, window)
    down, width = model.layout.layers[0].down.module, MLP_WIDTH
    constant_I = torch.full((width,), nan)
    choice = Choice(constant_at=frozenset({Site.MLP_OUT}))
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    first = down.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    picking = ChoicePicking(model, choice, constants={(0, Site.MLP_OUT): constant_I})
    with torch.inference_mode(), picking.applied(under):
        last = down.register_forward_pre_hook(lambda _, args: after.append(args[0]))
        model.teacher(window.ids_T[None])
        first.remove(), last.remove()
    out_TI = after[0][0].isnan()
    count_T = under.each(lambda plan, _: plan[0].kept("mlp_out", width))
    assert torch.equal((~out_TI).sum(-1), count_T)
    assert torch.equal(after[0][0][~out_TI], before[0][0][~out_TI])

    later_TI, left_TI = before[0][0][1:], out_TI[1:]
    mean_I = (later_TI * left_TI).sum(0) / left_TI.sum(0).clamp(min=1)
    torch.testing.assert_close(picking.left_out_means()[0, Site.MLP_OUT], mean_I)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_up_gives_nothing_for_neurons_that_the_gate_says_least_of(family):
    model = picking_channels(family)
    (window,) = windows_of(model, texts(1, 1), PROMPT)
    under = scored(model, window)
    layer = model.layout.layers[1]
    outputs: list[torch.Tensor] = []
    learnt = Learnt(up_sizes={each.index: torch.ones(MLP_WIDTH) for each in model.layout.layers})
    picking = ChoicePicking(model, Choice(up_share=0.8), learnt)
    with torch.inference_mode(), picking.applied(under):
        handles = {
            module.register_forward_hook(lambda _, args, out: outputs.append(out))
            for module in {layer.gate.module: None, layer.up.module: None}
        }
        model.teacher(window.ids_T[None])
        for handle in handles:
            handle.remove()
    gate_TI = outputs[0][0, :, layer.gate.start : layer.gate.stop]
    up_TI = outputs[-1][0, :, layer.up.start : layer.up.stop]
    assert (gate_TI != 0).all()
    kept_T = under.each(lambda plan, _: fewer_neurons(layer.shape, plan[1], 0.8)[1])
    assert torch.equal((up_TI != 0).sum(-1), kept_T) and int(kept_T.max()) < MLP_WIDTH
    told_TI = layer.activation(gate_TI).abs() * model.layout.column_norms(layer, Site.MLP_OUT)
    for told_I, kept_I in zip(told_TI, up_TI != 0, strict=True):
        assert told_I[kept_I].min() >= told_I[~kept_I].max()


def test_gradients_are_those_of_what_the_model_draws():
    model, ids_WT = ElasticModel(tiny()), texts(3, 1)[:, :12]
    found = gradients(model, ids_WT, seed=5)[1, Site.MLP_OUT][4]
    log_p_TV = model.teacher(ids_WT)[0].log_softmax(-1)
    drawn = torch.Generator().manual_seed(5)
    drawn_T1 = torch.multinomial(log_p_TV.exp(), 1, generator=drawn)

    def nudged(token: int, by: float) -> float:
        def hook(_, args):
            x_BTI = args[0].clone()
            x_BTI[0, token, 4] += by
            return (x_BTI,)

        handle = model.layout.layers[1].down.module.register_forward_pre_hook(hook)
        with torch.inference_mode():
            log_p_TV = model.teacher(ids_WT)[0].double().log_softmax(-1)
        handle.remove()
        return float(log_p_TV.gather(-1, drawn_T1).sum())

    slopes = [(nudged(at, 0.02) - nudged(at, -0.02)) / 0.04 for at in range(1, 12)]
    squares = torch.tensor(slopes).square()
    assert float(found) == pytest.approx(float(squares.mean().sqrt()), rel=0.01)


def test_sizes_of_up_are_root_mean_squares_after_position_0():
    model, ids_WT = ElasticModel(tiny()), texts(3, 2)
    up = model.layout.layers[2].up
    read: list[torch.Tensor] = []
    handle = up.module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.inference_mode():
        model.teacher(ids_WT)
    handle.remove()
    y_NI = (read[0][:, 1:] @ up.weight_OI.T).flatten(0, 1)
    torch.testing.assert_close(up_sizes(model, ids_WT)[2], y_NI.square().mean(0).sqrt())
    assert read[0].shape[-1] == WIDTH
