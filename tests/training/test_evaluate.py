"""Promises of the report: every number is there, baselines cost the same, nothing is touched."""

import json

import pytest
import torch

from elastiformer import ElasticModel, Unit
from elastiformer.calibration import Calibration, Step
from elastiformer.capacity import Phase
from tests.training.test_calibrate import calibrate, folders, prose  # noqa: F401
from training.__main__ import main
from training.baselines import mean_sizes
from training.picking import ChannelPicking, measure_picked
from training.quality import (
    Setting,
    Window,
    compare,
    copied,
    measure,
    recalibrate,
    windows_of,
    words_of,
)
from training.repaired import REPAIRED
from training.stopwatch import greedy_texts

LAYERS = 3


@pytest.fixture
def calibrated(tiny_llama) -> ElasticModel:
    """A model whose path lowers channels and tokens, calibrated by hand."""
    model = ElasticModel(tiny_llama)
    model.attach(model.blank_adapter([Unit.ATTENTION_TOKENS, Unit.CHANNELS], lora_rank=0))
    path = (
        *(Step(layer, "mlp_out", share) for share in (0.8, 0.5) for layer in range(LAYERS)),
        *(Step(layer, "attention_tokens", 0.5) for layer in range(LAYERS)),
        *(Step(layer, "mlp_in", 0.5) for layer in range(LAYERS)),
    )
    recalibrate(
        model,
        Calibration(
            lowest=0.5,
            context=96,
            paths=dict.fromkeys(Phase, path),
            thresholds={},
            measured=(),
        ),
    )
    return model


def by_chance(model: ElasticModel) -> ChannelPicking:
    return ChannelPicking(model, torch.Generator().manual_seed(0))


def test_the_report_holds_every_capacity_setting_and_baseline(folders, capsys):  # noqa: F811
    base, adapter, data = folders
    assert main(calibrate(folders)) == 0
    test_text = base.parent / "test.jsonl"
    test_text.write_text(prose(seed=1))
    before = (adapter / "calibration.json").read_bytes()
    command = [
        *("evaluate", "--base", str(base), "--adapter", str(adapter), "--data", str(test_text)),
        *("--capacities", "1.0,0.7,0.5,0.1", "--out", str(base.parent / "report")),
        *("--windows", "2", "--window", "160", "--greedy-tokens", "6", "--repeats", "1"),
        *("--decode-tokens", "3", "--dtype", "float32"),
        *("--repair-data", str(data), "--repair-windows", "4", "--repair-window", "160"),
        *("--skip-rank", "2"),
    ]

    assert main(command) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((base.parent / "report" / "report.json").read_text())

    assert last["worst_miss"] < 0.02
    assert report["refused"] == [0.1]
    asked = {(row["capacity"], row["setting"]) for row in report["ours"]}
    assert asked == {(c, s) for c in (1.0, 0.7, 0.5) for s in ("prompt", "both", "scored")}
    whole = [row for row in report["ours"] if row["capacity"] == 1.0]
    assert all(abs(row["kl"]) < 1e-5 and 0.8 < row["spent"] <= 1 for row in whole)
    names = {"drop by sensitivity", "last layers", "uniform", "random", "static channels"}
    assert set(report["baselines"]) == names | set(REPAIRED)
    for rows in report["baselines"].values():
        for row in rows:
            if row["setting"] != "prompt":
                assert row["spent"] == pytest.approx(row["capacity"], abs=0.03)
    assert [row["agreement"] for row in report["greedy"] if row["capacity"] == 1.0] == [1.0]
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in report["timed"])
    for name in last["files"]:
        assert (base.parent / "report" / name).stat().st_size > 500
    assert "Below the calibrated range" in (base.parent / "report" / "report.md").read_text()
    assert (adapter / "calibration.json").read_bytes() == before

    assert main([*command, "--update-adapter", "--baselines", "none"]) == 0
    assert "prefill time / full" in (adapter / "README.md").read_text()
    saved = ElasticModel.load(str(base), adapter, dtype="float32").adapter
    report = json.loads((base.parent / "report" / "report.json").read_text())
    assert report["adapter"] == saved.identity


def test_an_adapter_without_a_calibration_is_refused_with_what_to_do(folders, capsys):  # noqa: F811
    base, adapter, data = folders
    command = ["evaluate", "--base", str(base), "--adapter", str(adapter), "--data", str(data)]

    assert main([*command, "--out", str(base.parent / "report")]) == 1
    assert "run python -m training calibrate" in capsys.readouterr().err


def test_a_capacity_of_one_loses_nothing_in_any_setting(calibrated):
    windows = windows_of(calibrated, torch.randint(97, (2, 40)), prompt_tokens=25)

    for setting in Setting:
        quality = measure(calibrated, windows, 1.0, setting)
        assert abs(quality.kl) < 1e-5
        assert quality.same_top == 1.0
        assert quality.perplexity_ratio == pytest.approx(1.0, abs=1e-4)


def test_what_is_compared_is_what_the_setting_says(calibrated):
    windows = windows_of(calibrated, torch.randint(97, (3, 40)), prompt_tokens=25)

    tokens = {s: measure(calibrated, windows, 0.6, s).tokens for s in Setting}
    assert tokens == {
        Setting.PROMPT: 3 * 15,
        Setting.BOTH: 3 * 15,
        Setting.SCORED: 3 * 39,
    }


def test_the_paths_own_picks_lose_less_than_chance_at_the_same_cost(calibrated):
    windows = windows_of(calibrated, torch.randint(97, (3, 96)), prompt_tokens=64)
    ours = measure(calibrated, windows, 0.7, Setting.SCORED)
    chance = measure_picked(calibrated, windows, 0.7, Setting.SCORED, by_chance(calibrated))

    assert chance.spent == pytest.approx(ours.spent, abs=0.02)
    assert ours.kl < chance.kl


@pytest.mark.parametrize("setting", list(Setting))
def test_whoever_picks_otherwise_pays_what_we_pay(calibrated, setting):
    windows = windows_of(calibrated, torch.randint(97, (2, 96)), prompt_tokens=64)
    ours = measure(calibrated, windows, 0.7, setting)
    chance = measure_picked(calibrated, windows, 0.7, setting, by_chance(calibrated))

    # Position 0 is never skipped, and a router may be two tokens off: on 96 tokens, so much.
    assert chance.spent == pytest.approx(ours.spent, abs=0.01)


def test_static_channels_are_the_same_for_every_token_and_leave_no_trace(calibrated, tiny_llama):
    ids_WT = torch.randint(97, (3, 96))
    windows = windows_of(calibrated, ids_WT, prompt_tokens=64)
    sizes = mean_sizes(calibrated, ids_WT)
    picking = ChannelPicking(calibrated, torch.Generator(), sizes)
    static = measure_picked(calibrated, windows, 0.85, Setting.SCORED, picking)
    ours = measure(calibrated, windows, 0.85, Setting.SCORED)

    assert len(sizes) == 4 * LAYERS
    assert ours.kl < static.kl
    with torch.inference_mode():
        assert torch.equal(tiny_llama(ids_WT[:1]).logits[0].float(), windows[0].teacher_TV)


def test_greedy_text_at_full_capacity_agrees_with_the_pretrained_model(calibrated, tiny_llama):
    ids_WT = torch.randint(97, (2, 12))
    whole, _ = greedy_texts(calibrated, ids_WT.tolist(), [1.0, 0.6], tokens=5)

    assert whole.agreement == 1.0 and whole.same_prefix == 5
    assert whole.spent < 1  # of prompts, the last layer owes keys and values only


def test_a_word_is_whole_from_its_space_to_the_next_piece_that_is_no_letter(
    tiny_llama, tiny_tokenizer
):
    model = ElasticModel(tiny_llama, tokenizer=tiny_tokenizer)
    ids_T = torch.tensor(tiny_tokenizer("a stone, two 3rd words cut off")["input_ids"])
    pieces = [tiny_tokenizer.decode([token]) for token in ids_T.tolist()]

    found = ["".join(pieces[at] for at in word) for word in words_of(model, ids_T)]
    assert found == [" stone", " two", " words", " cut"]


def test_a_word_is_guessed_only_when_all_its_tokens_are():
    ids_T = torch.tensor([3, 1, 4, 1, 5, 2])
    teacher_TV = torch.nn.functional.one_hot(ids_T.roll(-1), 7).float()  # knows what comes next
    student_TV = teacher_TV.clone()
    student_TV[2] = teacher_TV[2].roll(1)  # misses token 3
    window = Window(ids_T, 2, teacher_TV, (range(1), range(2, 4), range(4, 5)))

    scored = compare([window], [(student_TV[:-1], 1.0)], 0.5, Setting.SCORED)
    assert (scored.cloze, scored.cloze_whole) == (0.5, 1.0)  # nothing stands before the first


def test_what_is_copied_is_the_prompts_own_beginning():
    ids_WT = torch.arange(14).view(2, 7)

    assert copied(ids_WT, 4).tolist() == [[0, 1, 2, 3, 0, 1, 2], [7, 8, 9, 10, 7, 8, 9]]
    assert copied(ids_WT, 3).tolist()[0] == [0, 1, 2, 0, 1, 2, 0]
