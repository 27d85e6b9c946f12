"""Promises of calibration: what it finds is worth more than chance, kept, and remembered."""

import json
import math
import random
import shutil
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from elastiformer import Capacity, ElasticModel, LayerPlan, Phase, SavedAdapter, Unit
from elastiformer.accounting import LayerShape, ModelShape
from elastiformer.calibration import Step, walk
from elastiformer.capacity import dense_plan
from training.__main__ import main
from training.allotment import Allotment, Curves, fields_of, gradually, late_layers, uniform
from training.sensitivity import (
    LATE,
    Meter,
    Notebook,
    Probe,
    coarse_first,
    late_counts,
    probes,
    remembered,
)
from training.tuning import Knobs, reorder, reshaped, tune

LAYERS = 3
SHAPE = ModelShape((LayerShape(24, 4, 2, 10, 56, gated=True, experts=7),) * LAYERS, 24, 97)
UNITS = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.EXPERTS, Unit.CHANNELS)


def prose(seed: int = 0, documents: int = 12, words: int = 90) -> str:
    """JSONL of nonsense with a vocabulary: enough for a byte-level tokenizer."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(40)]
    return "".join(
        json.dumps({"text": " ".join(rng.choices(known, k=words))}) + "\n" for _ in range(documents)
    )


@pytest.fixture
def elastic(tiny_llama) -> ElasticModel:
    model = ElasticModel(tiny_llama)
    model.attach(model.blank_adapter(UNITS, experts=7, expert_split="contiguous", lora_rank=0))
    return model


@pytest.fixture
def folders(tmp_path, tiny_folder):
    """A base, an untrained adapter of every kind of unit, and held-out text, on disk."""
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    adapter = model.blank_adapter(
        (*UNITS, Unit.HEADS), experts=7, expert_split="contiguous", lora_rank=1
    )
    adapter.save(tmp_path / "adapter")
    (tmp_path / "held-out.jsonl").write_text(prose())
    return tiny_folder, tmp_path / "adapter", tmp_path / "held-out.jsonl"


def calibrate(folders, *more: str) -> list[str]:
    base, adapter, data = folders
    return [
        *("calibrate", "--base", str(base), "--adapter", str(adapter), "--data", str(data)),
        *("--windows", "2", "--window", "160", "--check-windows", "2", "--dtype", "float32"),
        *("--capacities", "0.9,0.7,0.5", "--sweeps", "0", *more),
    ]


def test_a_calibrated_capacity_is_kept_on_other_text_and_its_cost_is_in_the_table(folders, capsys):
    assert main(calibrate(folders)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert report["promise_kept"], report["worst_miss"]
    assert [row["capacity"] for row in report["measured"]] == [1.0, 0.9, 0.7, 0.5]
    whole, *rest = report["measured"]
    # Of prompts, the last of three layers owes keys and values only.
    assert 0.7 < whole["spent"] < 1 and abs(whole["kl"]) < 1e-5
    # Of three layers the last one is free for prompts, so theirs may well lose nothing.
    assert all(row["kl"] > 0 and row["kl_prompt"] > -1e-5 and row["kl_scored"] > 0 for row in rest)

    calibration = SavedAdapter.load(folders[1]).calibration
    assert calibration.lowest == 0.5
    assert calibration.data.window_tokens == 160
    assert (folders[1] / "calibration.png").stat().st_size > 1000
    assert "| 0.7 |" in (folders[1] / "README.md").read_text()

    base, adapter, _ = folders
    model = ElasticModel.load(str(base), adapter, dtype="float32")
    assert model.sequence(Capacity(0.5, 0.5), 140, 150).length == 0


def test_a_calibration_that_was_stopped_continues_and_ends_the_same(folders, capsys):
    assert main(calibrate(folders)) == 0
    whole = json.loads((folders[1] / "calibration.json").read_text())
    notes = folders[1] / "sensitivity.jsonl"
    lines = notes.read_text().splitlines(keepends=True)
    # As a kill leaves it: some answers, and half a line.
    notes.write_text("".join(lines[:20]) + lines[20][:30])

    assert main(calibrate(folders)) == 0

    again = notes.read_text().splitlines()
    assert len(again) == len(lines) + 1  # the half line stays, and is asked again
    assert json.loads((folders[1] / "calibration.json").read_text()) == whole


def test_paths_that_are_kept_are_probed_no_more_and_get_thresholds(folders, capsys):
    _, adapter, _ = folders
    keep = ("--keep-paths", "--prompt-units", "none", "--output-units", "channels")
    without_sweeps = [each for each in calibrate(folders, "--keep-paths") if each != "--sweeps"]
    without_sweeps.remove("0")
    assert main(without_sweeps) == 1
    assert "--keep-paths: this adapter is not calibrated" in capsys.readouterr().err
    assert main(calibrate(folders, *keep[1:])) == 0
    found = SavedAdapter.load(adapter).calibration
    quantiles = [each for of_layer in found.channel_quantiles for each in of_layer]
    assert len(quantiles) == 4 * LAYERS and {len(each) for each in quantiles} == {33}
    assert all(list(each) == sorted(each) and each[-1] > 0 for each in quantiles)

    assert main(calibrate(folders, *keep)) == 1
    assert "--prompt-units: an adapter that keeps its paths" in capsys.readouterr().err
    stored = json.loads((adapter / "calibration.json").read_text())
    del stored["channel_quantiles"]
    stored["measured"] = []
    (adapter / "calibration.json").write_text(json.dumps(stored))
    (adapter / "sensitivity.jsonl").unlink()
    assert main(without_sweeps) == 0
    assert not (adapter / "sensitivity.jsonl").exists()
    assert SavedAdapter.load(adapter).calibration == found


def test_a_search_of_so_many_probes_ends_the_same_whatever_was_asked_before(folders, capsys):
    base, adapter, data = folders
    copy = shutil.copytree(adapter, adapter.with_name("copy"))
    counted = ("--probes", "12", "--sweeps", "1")
    assert main(calibrate((base, copy, data))) == 0  # which answers more than 12
    for folder in (adapter, copy):
        assert main(calibrate((base, folder, data), *counted)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])

    first, second = ((each / "calibration.json").read_bytes() for each in (adapter, copy))
    assert first == second
    search = SavedAdapter.load(adapter).calibration.search
    assert report["search"] == asdict(search)
    assert (search.probes, search.ended_by_clock) == (24, False)
    assert search.unanswered > 0 and search.paths_judged > 4

    assert main(calibrate(folders, *counted, "--keep-paths")) == 1
    assert "--probes" in capsys.readouterr().err
    keep = [each for each in calibrate(folders, "--keep-paths") if each not in ("--sweeps", "0")]
    assert main(keep) == 0
    assert SavedAdapter.load(adapter).calibration.search == search  # whose paths these are


def test_uniform_paths_give_every_unit_alike_in_all_layers_and_nothing_is_probed(folders, capsys):
    whole = [each for each in calibrate(folders, "--uniform") if each not in ("--sweeps", "0")]
    assert main([*whole, "--output-units", "mlp_tokens,experts"]) == 0
    calibration = SavedAdapter.load(folders[1]).calibration

    assert not (folders[1] / "sensitivity.jsonl").exists() and calibration.search is None
    assert {step.field for step in calibration.paths[Phase.OUTPUT]} == {"mlp_tokens", "experts"}
    # As far as the lowest capacity asks: a share falls in every layer before another falls.
    for path in calibration.paths.values():
        whole_rounds = path[: len(path) // LAYERS * LAYERS]
        for first in range(0, len(whole_rounds), LAYERS):
            steps = whole_rounds[first : first + LAYERS]
            assert [step.layer for step in steps] == list(range(LAYERS))
            assert len({(step.field, step.share) for step in steps}) == 1

    assert main([*whole, "--probes", "3"]) == 1
    assert "--probes: --uniform" in capsys.readouterr().err


def test_when_time_runs_out_the_rest_is_interpolated(folders, capsys):
    assert main(calibrate(folders, "--max-minutes", "0.002")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert report["probes_unanswered"] > 0 and report["search"]["ended_by_clock"]
    assert report["promise_kept"]


def test_too_little_text_is_refused_in_a_sentence(folders, capsys):
    folders[2].write_text(prose(documents=2, words=20))

    assert main(calibrate(folders)) == 1
    assert "fewer than a window of 160" in capsys.readouterr().err


def test_a_probe_that_starts_at_its_layer_answers_as_a_whole_forward_does(elastic):
    meter = Meter(elastic, torch.randint(97, (2, 21)), prompt_tokens=13)

    for phase in Phase:
        for layer in (1, 2):
            plan = Probe(phase, layer, "mlp_out", 0.5).plan(LAYERS)
            assert meter.kl(phase, plan, layer) == pytest.approx(meter.kl(phase, plan), rel=1e-4)
        assert abs(meter.kl(phase, dense_plan(LAYERS))) < 1e-6


def test_a_probe_leaves_the_model_as_it_was(elastic, tiny_llama):
    ids = torch.randint(97, (2, 21))
    with torch.inference_mode():
        before = tiny_llama(ids).logits
        meter = Meter(elastic, ids, prompt_tokens=13)
        meter.kl(Phase.PROMPT, Probe(Phase.PROMPT, 2, LATE, 0.0).plan(LAYERS), 2)
        assert torch.equal(tiny_llama(ids).logits, before)


def test_the_last_layer_costs_a_prompt_nothing(elastic):
    # Only the keys and values of prompt tokens are needed, and those come from what is below.
    meter = Meter(elastic, torch.randint(97, (2, 21)), prompt_tokens=13)
    plan = Probe(Phase.PROMPT, LAYERS - 1, LATE, 0.0).plan(LAYERS)

    assert abs(meter.kl(Phase.PROMPT, plan)) < 1e-6
    assert meter.kl(Phase.OUTPUT, plan) > 1e-3


def test_answers_to_other_data_are_kept_but_not_used(tmp_path):
    probe = Probe(Phase.OUTPUT, 1, "heads", 0.5)
    Notebook(tmp_path / "notes", dict.fromkeys(Phase, "one")).note(probe, 0.25)

    other = Notebook(tmp_path / "notes", dict.fromkeys(Phase, "other"))
    assert other.answers == {}
    other.note(probe, 0.5)
    assert Notebook(tmp_path / "notes", dict.fromkeys(Phase, "one")).answers == {probe: 0.25}
    assert remembered(tmp_path / "notes") == {probe: 0.5}


def test_every_layer_is_probed_once_the_ends_first():
    assert sorted(coarse_first(30)) == list(range(30))
    assert coarse_first(30)[:3] == [0, 1, 29]
    assert coarse_first(1) == [0]
    assert late_counts(30)[:5] == [1, 2, 3, 4, 6] and late_counts(30)[-1] == 21
    for phase in Phase:
        asked = list(probes(phase, 5, fields_of(UNITS)))
        assert len(set(asked)) == len(asked)


def curves_of(losses: dict[tuple[int, str], float]) -> Curves:
    return Curves(LAYERS, {key: {0.5: kl} for key, kl in losses.items()})


def test_what_loses_least_goes_first():
    losses = {(layer, "mlp_out"): kl for layer, kl in enumerate((0.5, 0.001, 0.1))}
    path = Allotment(SHAPE, 64, curves_of(losses), ["mlp_out"], whole=False).path()

    assert path[0].layer == 1
    half = next(at for at, step in enumerate(path) if step.share <= 0.5 and step.layer == 2)
    plan = list(walk(path, LAYERS))[half]
    assert plan[1].mlp_out < plan[2].mlp_out < plan[0].mlp_out


def test_every_step_of_a_path_spends_less():
    losses = {
        (layer, name): 0.1 * (layer + 1) for layer in range(LAYERS) for name in fields_of(UNITS)
    }
    whole = {(layer, name): {0.0: 0.3} for layer in range(LAYERS) for name in ("mlp_tokens",)}
    known = curves_of(losses)
    for key, points in whole.items():
        known.probed[key] |= points

    for path in (Allotment(SHAPE, 64, known, fields_of(UNITS)).path(), late_layers(LAYERS)):
        spent = [SHAPE.planned_share(plan, 64) for plan in walk(path, LAYERS)]
        assert all(after < before for before, after in pairwise(spent))
    assert spent[-1] < 0.6


def test_late_layers_go_together_and_in_order():
    known = curves_of({(layer, "mlp_out"): 0.1 for layer in range(LAYERS)})
    path = Allotment(SHAPE, 64, known, ["mlp_out"], late={2: 0.0, 1: 0.05}).path()
    plans = list(walk(path, LAYERS))

    assert plans[2][2] == LayerPlan(attention_tokens=0, mlp_tokens=0)  # it loses nothing
    gone = [step.layer for step in path if step.field == "attention_tokens"]
    assert gone == [2, 1]


def test_a_layer_that_was_not_probed_takes_the_mean_of_its_neighbours():
    known = Curves(5, {(1, "heads"): {0.5: 0.1}, (3, "heads"): {0.5: 0.4}})

    assert known.loss(2, "heads", 0.5) == pytest.approx(0.2)
    assert known.loss(4, "heads", 0.5) == pytest.approx(0.4)
    assert known.loss(2, "heads", 1.0) == 0
    assert known.loss(1, "heads", 0.25) > 0.1 > known.loss(1, "heads", 0.75)


def test_a_curve_goes_through_its_probes_and_never_falls():
    known = Curves(1, {(0, "mlp_out"): {0.8: 0.01, 0.5: 0.2, 0.2: 0.15}})  # the last one is noise
    losses = [known.loss(0, "mlp_out", share / 20) for share in range(20, 0, -1)]

    assert known.loss(0, "mlp_out", 0.5) == pytest.approx(0.2)
    assert losses == sorted(losses)


def test_uniform_shares_are_the_same_in_every_layer():
    plans = list(walk(uniform(SHAPE, ["heads", "mlp_out"]), LAYERS))

    assert plans[-1][0] == plans[-1][1] == plans[-1][2]
    assert plans[-1][0].heads == 0.25 and plans[-1][0].mlp_out == 0.1


def test_turning_a_knob_keeps_only_what_is_better():
    names = ("heads", "mlp_out")
    known = curves_of({(layer, name): 0.1 for layer in range(LAYERS) for name in names})

    def make(curves: Curves) -> tuple[Step, ...]:
        return Allotment(SHAPE, 64, curves, ["heads", "mlp_out"], whole=False).path()

    def judge(path: tuple[Step, ...]) -> tuple[int, float]:
        late = [place for place, step in enumerate(path) if step.field == "heads"]
        return 0, -float(sum(late))  # the later, the better

    path, score, knobs = tune(known, ["heads", "mlp_out"], make, judge, math.inf, sweeps=3)
    assert score == judge(path) < judge(make(known))
    assert make(reshaped(known, knobs)) == path
    assert tune(known, ["heads"], make, judge, -math.inf, sweeps=3)[0] == make(known)


def test_neighbours_change_places_only_while_it_helps():
    order = tuple(Step(layer, "mlp_tokens", 0.0) for layer in (0, 2, 1, 3))

    def judge(path: tuple[Step, ...]) -> tuple[int, float]:
        late = sum(place * step.layer for place, step in enumerate(path))
        return 0, float(late)  # the later layers first, the better

    path, score = reorder(order, judge, math.inf, sweeps=9)
    assert [step.layer for step in path] == [3, 2, 1, 0] and score == judge(path)
    assert reorder(order, judge, -math.inf, sweeps=9)[0] == order
    assert reorder(order, judge, math.inf, sweeps=0)[0] == order


def test_gradually_a_sub_layer_goes_from_whole_to_nothing():
    steps = gradually(Step(2, "mlp_tokens", 0.0))
    shares = [step.share for step in steps]
    assert shares == sorted(set(shares), reverse=True) and shares[0] < 1 and shares[-1] == 0
    assert {(step.layer, step.field) for step in steps} == {(2, "mlp_tokens")}


def test_knobs_that_are_not_turned_change_nothing():
    known = Curves(2, {(0, "heads"): {0.5: 0.1, 0.25: 0.4}, (1, "heads"): {0.5: 0.01}})

    same = reshaped(known, Knobs())
    for layer in (0, 1):
        for share in (0.75, 0.5, 0.3, 0.1):
            expected = known.loss(layer, "heads", share)
            assert same.loss(layer, "heads", share) == pytest.approx(expected)


def test_prompts_may_give_up_whole_late_layers_only(folders, capsys):
    assert main(calibrate(folders, "--prompt-units", "none", "--output-units", "channels")) == 0
    capsys.readouterr()
    calibration = SavedAdapter.load(folders[1]).calibration

    assert all(step.share == 0.0 for step in calibration.paths[Phase.PROMPT])
    inside = {step.field for step in calibration.paths[Phase.OUTPUT] if step.share > 0}
    assert inside <= set(fields_of([Unit.CHANNELS]))


@pytest.mark.parametrize("named", ["channels,tails", "0.5"])
def test_an_unknown_unit_is_refused(folders, capsys, named):
    with pytest.raises(SystemExit):
        main(calibrate(folders, "--prompt-units", named))
    assert "unknown unit" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
@pytest.mark.parametrize(
    ("base", "options", "told"),
    [
        ("fashion-mnist", ["--windows", "9"], "--windows: an encoder has no use for it; got 9"),
        ("fashion-vlm", ["--seen", "0.5"], "--seen: a vision-language model has no use for it"),
        ("smollm2-135m-instruct", ["--items", "3"], "--items: a language model has no use for it"),
    ],
)
def test_what_a_sort_of_model_has_no_use_for_is_refused(
    tmp_path, capsys, command, base, options, told
):
    out = ["--out", str(tmp_path / "out")] if command == "evaluate" else []
    there = ["--adapter", str(tmp_path), "--data", str(tmp_path / "none.jsonl")]

    assert main([command, "--base", base, *there, *out, *options]) == 1
    assert told in capsys.readouterr().err
