"""Promises of the table capacity -> plan: exact on average, monotone, clear about its bounds."""

import json
from dataclasses import replace

import pytest

from elastiformer.accounting import LayerShape, LoraShape, ModelShape
from elastiformer.calibration import (
    Calibration,
    DataRecord,
    ImageFloor,
    Measured,
    Schedule,
    SearchRecord,
    Step,
    output_context,
    unit_of,
)
from elastiformer.calibration_reading import read_calibration
from elastiformer.capacity import LayerPlan, Phase, Unit, dense_plan
from elastiformer.errors import AdapterError, CapacityError

LAYERS = 5
LORA = LoraShape(("gate", "up"), rank=2)
SHAPE = ModelShape(
    layers=(LayerShape(64, 4, 2, 16, 176, gated=True, experts=11, lora=(LORA,)),) * LAYERS,
    width=64,
    vocabulary=97,
)
PATH = (
    *(Step(layer, "mlp_out", share) for share in (0.75, 0.5) for layer in (4, 3, 2, 1)),
    *(Step(layer, "attention_tokens", 0.5) for layer in (2, 3)),
    *(Step(layer, "experts", 5 / 11) for layer in (1, 2)),
    *(Step(layer, "mlp_tokens", 0.0) for layer in (4, 3, 2, 1)),
    *(Step(layer, "attention_tokens", 0.0) for layer in (4, 3, 2)),
)
QUANTILES = tuple(index / 4 for index in range(33))


def calibration(lowest: float = 0.4) -> Calibration:
    return Calibration(
        lowest=lowest,
        context=192,
        paths={Phase.PROMPT: PATH, Phase.OUTPUT: PATH},
        thresholds={
            phase: {Unit.ATTENTION_TOKENS: {2: QUANTILES, 3: QUANTILES}} for phase in Phase
        },
        measured=(Measured(1.0, 1.0, kl=0.0), Measured(0.5, 0.501, kl=0.25, perplexity=7.5)),
        data=DataRecord("held-out.txt", "ab" * 32, windows=6, window_tokens=192, seed=0),
    )


@pytest.mark.parametrize("context", [1, 130, 700])
@pytest.mark.parametrize("share", [0.98, 0.9, 0.77, 0.6, 0.51])
def test_a_request_spends_what_it_asked_for_averaged_over_its_positions(share, context):
    schedule = calibration().schedule(share, Phase.PROMPT, SHAPE, context)
    shape = SHAPE.of_phase(Phase.PROMPT)

    spent = [shape.planned_share(schedule.plan_at(position), context) for position in range(128)]

    # A prompt leaves the last layer with nothing that is read: its dense plan costs less than 1.
    most = shape.planned_share(dense_plan(len(SHAPE.layers)), context)
    assert sum(spent) / len(spent) == pytest.approx(min(share, most), abs=0.002)
    assert schedule.spent == pytest.approx(min(share, most), abs=1e-9)


def test_every_run_of_positions_holds_its_part_of_the_fuller_plan():
    schedule = Schedule(dense_plan(2), dense_plan(2), 0.7, 0.6, fraction=0.37)
    fuller = [schedule.is_fuller(position) for position in range(500)]

    for start in range(0, 400, 7):
        for length in (1, 10, 64):
            assert abs(sum(fuller[start : start + length]) - 0.37 * length) < 1


def test_more_capacity_never_keeps_less():
    ordered = [0.42, 0.5, 0.61, 0.7, 0.83, 0.95, 1.0]
    levels = calibration().levels(Phase.OUTPUT, LAYERS)
    reached = [
        levels.index(calibration().schedule(share, Phase.OUTPUT, SHAPE, 64).fuller)
        for share in ordered
    ]

    assert reached == sorted(reached, reverse=True)
    assert reached[-1] == 0


def test_capacity_one_is_dense_at_every_position():
    schedule = calibration().schedule(1.0, Phase.PROMPT, SHAPE, 100)

    assert all(schedule.plan_at(position) == dense_plan(LAYERS) for position in range(9))
    assert schedule.spent == SHAPE.of_phase(Phase.PROMPT).planned_share(dense_plan(LAYERS), 100) < 1


def test_below_the_calibrated_range_the_refusal_names_it():
    with pytest.raises(CapacityError, match=r"0\.3 is below the calibrated range 0\.40 to 1\.0"):
        calibration().schedule(0.3, Phase.PROMPT, SHAPE, 100)


def test_out_of_the_paths_reach_the_refusal_names_the_reach():
    reach = SHAPE.planned_share(calibration().levels(Phase.PROMPT, LAYERS)[-1], 100)

    with pytest.raises(CapacityError, match=r"calibrated range 0\.\d\d to 1\.0 of prompt tokens"):
        calibration(lowest=0.05).schedule(reach - 0.02, Phase.PROMPT, SHAPE, 100)
    calibration(lowest=0.05).schedule(reach + 1e-6, Phase.PROMPT, SHAPE, 100)


def test_a_block_of_generated_tokens_shares_a_schedule_that_is_right_on_average():
    contexts = [output_context(position) for position in range(128, 192)]

    assert len(set(contexts)) == 1
    true_mean = sum(position + 1 for position in range(128, 192)) / 64
    assert contexts[0] == pytest.approx(true_mean, abs=1)


def test_thresholds_lie_between_the_quantiles_of_the_scores():
    table = calibration()

    assert table.threshold(Unit.ATTENTION_TOKENS, 2, Phase.OUTPUT, 0.5) == QUANTILES[16]
    between = table.threshold(Unit.ATTENTION_TOKENS, 2, Phase.OUTPUT, 0.99)
    assert QUANTILES[0] < between < QUANTILES[1]
    with pytest.raises(AdapterError, match="mlp_tokens of layer 2, output tokens"):
        table.threshold(Unit.MLP_TOKENS, 2, Phase.OUTPUT, 0.5)


def test_a_calibration_reads_back_as_it_was_written():
    floors = (ImageFloor(0.4, 0.3), ImageFloor(0.6, 0.5))
    searched = replace(calibration(), search=SearchRecord(300, 0, 38, ended_by_clock=False))
    imaged = replace(calibration(), image_tokens=0.1, image_floors=floors)
    for table in (calibration(), imaged, searched):
        assert read_calibration(json.loads(json.dumps(table.as_json()))) == table


def test_image_tokens_stay_down_to_a_floor_of_each_capacity():
    table = replace(calibration(), image_tokens=0.1)
    assert calibration().image_floor(0.5) is None and table.image_floor(0.5) == 0.1
    floored = replace(table, image_floors=(ImageFloor(0.4, 0.3), ImageFloor(0.6, 0.5)))
    asked = {0.2: 0.3, 0.4: 0.3, 0.5: 0.4, 0.6: 0.5, 0.8: 0.75, 1.0: 1.0}
    assert {each: floored.image_floor(each) for each in asked} == pytest.approx(asked)


def test_every_problem_of_a_calibration_is_named_at_once():
    value = calibration().as_json()
    value["lowest"] = "low"
    value["paths"]["prompt"] = [
        {"layer": 0, "field": "tails", "share": 0.5},
        {"layer": 0, "field": "heads", "share": 0.0},
        {"layer": 1, "field": "mlp_in", "share": 0.5},
        {"layer": 1, "field": "mlp_in", "share": 0.75},
    ]
    value["thresholds"]["output"]["attention_tokens"]["2"] = [3.0, 1.0, float("nan")]
    value["measured"][0]["capacity"] = None
    value["search"] = {"probes": -1, "unanswered": 0, "paths_judged": 2, "ended_by_clock": 1}
    value["image_floors"] = [
        {"capacity": 0.6, "share": 0.5},
        {"capacity": 0.4, "share": 0.3},
        {"capacity": 0.8, "share": 2},
    ]

    with pytest.raises(AdapterError) as refusal:
        read_calibration(value)

    for named in (
        "lowest",
        "paths.prompt[0].field",
        "paths.prompt[1].share",
        "paths.prompt[3]",
        "thresholds.output.attention_tokens.2[2]",
        "must not fall",
        "measured[0].capacity",
        "image_floors[1]: capacities rise",
        "image_floors[2].share",
        "search.probes",
        "search.ended_by_clock: true or false; got 1",
    ):
        assert named in str(refusal.value)


@pytest.mark.parametrize("value", [None, [], {}, {"format": 99}, {"format": 1}])
def test_something_else_than_a_calibration_is_refused(value):
    with pytest.raises(AdapterError, match=r"calibration\.json cannot be used"):
        read_calibration(value)


def test_a_calibration_of_a_larger_model_or_other_units_names_each_misfit():
    misfits = calibration().misfits(layers=4, units=[Unit.ATTENTION_TOKENS, Unit.CHANNELS])

    assert any("names layer 4, this model has 4" in misfit for misfit in misfits)
    assert any("uses experts, which the adapter lacks" in misfit for misfit in misfits)
    # Tokens and channels can be left out without a router.
    assert len(misfits) == 4


def test_every_field_of_a_plan_belongs_to_a_unit():
    units = {unit_of(field) for field in LayerPlan.__dataclass_fields__}

    assert units == set(Unit) - {Unit.IMAGE_TOKENS}  # dropped before the layers
