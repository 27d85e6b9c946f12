"""Lessons: every capacity and division is met, and what ruins the model is spared."""

import random
from dataclasses import replace

import pytest

from elastiformer import (
    Calibration,
    LayerShape,
    ModelShape,
    Phase,
    Step,
    Unit,
    dense_plan,
    is_dense,
)
from elastiformer.capacity import WHOLE_LAYER
from training.lessons import Teacher, tolerances
from training.options import LAYER_UNITS

LAYERS, WINDOW, LEAST = 6, 64, 0.5
UNITS = LAYER_UNITS


@pytest.fixture
def shape():
    layer = LayerShape(
        width=48, heads=6, kv_heads=2, head_dim=8, mlp_width=128, gated=True, experts=8
    )
    return ModelShape((layer,) * LAYERS, width=48, vocabulary=97)


def lessons(shape, count=200, **changes):
    settings = {"prompt_units": UNITS, "output_units": UNITS, "least": LEAST}
    settings |= {"window": WINDOW, "seed": 0, **changes}
    teacher = Teacher(shape, **settings)
    return [teacher.lesson(step, row, 4) for step in range(count // 4) for row in range(4)]


def test_a_lesson_is_a_function_of_seed_step_and_row(shape):
    assert lessons(shape, 16) == lessons(shape, 16)
    assert lessons(shape, 16) != lessons(shape, 16, seed=1)


def test_no_lesson_is_dense_in_both_phases(shape):
    for lesson in lessons(shape):
        assert not (is_dense(lesson.output) and is_dense(lesson.prompt))
        assert not is_dense(lesson.output) or lesson.first_output > 0


def test_every_part_of_the_range_of_capacities_is_met_and_the_lowest_again_and_again(shape):
    drawn = lessons(shape)
    for plans in ([each.prompt for each in drawn], [each.output for each in drawn]):
        spent = [shape.planned_share(plan, WINDOW) for plan in plans]
        tenths = {round(share, 1) for share in spent}
        assert {0.5, 0.6, 0.7, 0.8, 0.9, 1.0} <= tenths
        lowest = [share for share in spent[::4] if share < 1]
        assert len(lowest) > len(spent[::4]) / 2
        # Attentions alone, or MLPs alone, of whole late layers do not save so much.
        assert sum(share < LEAST + 0.05 for share in lowest) > 0.7 * len(lowest)


def test_prompts_leave_out_whole_late_layers(shape):
    def late(plan):
        left_out = [layer.attention_tokens == 0 and layer.mlp_tokens == 0 for layer in plan]
        return any(left_out) and left_out == sorted(left_out)

    drawn = lessons(shape)
    prompts = [each.prompt for each in drawn if late(each.prompt)]

    assert len(prompts) > len(drawn) / 4
    assert len({sum(layer.mlp_tokens == 0 for layer in plan) for plan in prompts}) >= 3


def test_each_unit_is_routed_by_itself_and_with_others(shape):
    def lowered(plan):
        names = [name for name in UNITS if name is not Unit.CHANNELS]
        return {name for name in names for layer in plan if getattr(layer, name) < 1}

    met = [lowered(each.output) for each in lessons(shape)]

    for unit in (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.HEADS, Unit.EXPERTS):
        assert {unit} in met
        assert any(unit in units and len(units) > 1 for units in met)


def test_each_phase_lowers_its_own_units_only(shape):
    drawn = lessons(shape, prompt_units=(Unit.HEADS,), output_units=(Unit.EXPERTS,))
    for lesson in drawn:
        for layer in (*lesson.prompt, *lesson.output):
            assert layer.attention_tokens == layer.mlp_tokens == layer.mlp_in == 1
        assert all(layer.experts == 1 for layer in lesson.prompt)
        assert all(layer.heads == 1 for layer in lesson.output)


def test_without_units_prompts_leave_out_whole_late_layers_only(shape):
    drawn = lessons(shape, prompt_units=(), output_units=(Unit.CHANNELS,))
    lowered = [lesson.prompt for lesson in drawn if lesson.prompt != dense_plan(LAYERS)]

    assert lowered
    for plan in lowered:
        for layer in plan:
            assert {layer.attention_tokens, layer.mlp_tokens} <= {0.0, 1.0}
            assert layer.heads == layer.experts == layer.mlp_in == layer.mlp_out == 1


def test_windows_are_cut_everywhere(shape):
    cuts = [each.prompt_tokens for each in lessons(shape)]

    assert min(cuts) <= 3
    assert max(cuts) >= WINDOW * 3 // 4
    assert all(0 < each.output_tokens(WINDOW) <= WINDOW for each in lessons(shape))


def test_what_ruins_the_model_is_spared(shape):
    losses = {(layer, Unit.MLP_TOKENS.value): 0.1 for layer in range(LAYERS)}
    losses[0, "mlp_tokens"] = 10.0

    teacher = Teacher(shape, UNITS, UNITS, LEAST, WINDOW, 0, tolerances(losses))
    plan = teacher.plan(random.Random(0), 0.7, (Unit.MLP_TOKENS,))

    assert plan[0] == dense_plan(1)[0]
    assert all(layer.mlp_tokens < 1 for layer in plan[1:])
    assert tolerances(losses)[1, "mlp_tokens"] == pytest.approx(0.5)


def test_uniform_lessons_keep_one_share_in_every_layer_and_score_every_token(shape):
    drawn = lessons(shape, uniform=True, output_units=(Unit.HEADS,), least=0.3)
    for lesson in drawn:
        assert lesson.output_tokens(WINDOW) == WINDOW
        (layer,) = set(lesson.output)
        assert 0.3 <= layer.heads <= 1 and replace(layer, heads=1.0) == WHOLE_LAYER
    assert all(lesson.output[0].heads == 0.3 for lesson in drawn[::4])
    assert max(lesson.output[0].heads for lesson in drawn) > 0.95


def test_no_lesson_keeps_more_than_the_highest_share_that_is_trained(shape):
    drawn = lessons(shape, uniform=True, output_units=(Unit.HEADS,), least=0.6, most=0.7)
    shares = [lesson.output[0].heads for lesson in drawn]

    assert min(shares) == 0.6 and 0.69 < max(shares) <= 0.7


def test_calibrated_lessons_are_levels_of_the_path_and_spend_what_was_drawn(shape):
    fields = ("mlp_tokens", "attention_tokens")
    path = tuple(Step(layer, name, 0.0) for layer in range(LAYERS - 1, 1, -1) for name in fields)
    paths = {Phase.PROMPT: path, Phase.OUTPUT: ()}
    calibration = Calibration(LEAST, WINDOW, paths, thresholds={}, measured=())

    drawn = lessons(shape, 400, calibration=calibration)

    levels = calibration.levels(Phase.PROMPT, LAYERS)
    assert all(each.prompt in levels for each in drawn)
    assert all(is_dense(each.output) for each in drawn)  # of outputs nothing was calibrated
    assert len({each.prompt for each in drawn}) > 6
    prompts = shape.of_phase(Phase.PROMPT)
    lowest = [
        prompts.planned_share(each.prompt, WINDOW)
        for each in drawn[::4]
        if not is_dense(each.prompt)
    ]
    assert sum(lowest) / len(lowest) == pytest.approx(LEAST, abs=0.01)


def test_outputs_without_units_run_whole_and_only_prompts_are_routed(shape):
    drawn = lessons(shape, prompt_units=(), output_units=())

    assert all(is_dense(each.output) for each in drawn)
    assert not any(is_dense(each.prompt) for each in drawn if each.prompt_tokens > 1)


def test_as_many_rows_repeat_their_prompt_as_are_asked_for_and_nothing_else_changes(shape):
    plain, some = lessons(shape, 400), lessons(shape, 400, copied=0.25)

    assert not any(each.copied for each in plain)
    assert 0.18 < sum(each.copied for each in some) / len(some) < 0.32
    assert [replace(each, copied=False) for each in some] == plain
    assert all(each.prompt_tokens > 0 for each in lessons(shape, copied=1.0) if each.copied)
