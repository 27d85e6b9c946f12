"""Each command runs on a tiny model in seconds, and writes what it says it writes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.check import Held, Planned
from benchmarks.dense import CONTINUOUS, OURS, PADDED
from benchmarks.guidellm import INSTALL
from benchmarks.overhead import WITH
from benchmarks.saving import BATCHES
from benchmarks.sender import Sender
from benchmarks.simulation import StepTimes, moments

TOP = {"format", "benchmark", "setting", "parameters", "goals", "results"}
SETTING = {
    "processor",
    "cores",
    "threads",
    "instruction_sets",
    "memory_gib",
    "accelerator",
    "dtype",
    "device",
    "attention",
    "versions",
    "date",
    "command",
}
GOAL = {"what", "wanted", "got", "at_most", "reached"}
QUICK = ("--seconds", "0", "--least", "1")


def check(written, name):
    assert set(written) == TOP
    assert written["benchmark"] == name
    assert set(written["setting"]) == SETTING
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", written["setting"]["date"])
    assert all(set(goal) == GOAL for goal in written["goals"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_how_long_it_takes(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "Takes " in capsys.readouterr().out


def test_saving_holds_every_work_and_capacity(run):
    keep = '{"mlp_tokens": 0.5, "attention_tokens": 0.5}'
    written = run(
        "saving",
        *QUICK,
        *("--prompt", "48", "--context", "16", "--batches", "1,4"),
        *("--capacity", "0.65", "--capacity", keep),
    )
    check(written, "saving")
    rows = written["results"]
    works = {"prefill", "classification", "scoring", "decode, batch 1", "decode, batch 4"}
    assert {row["work"] for row in rows} == works
    assert len(rows) == len(works) * 3
    dense = [row for row in rows if row["capacity"] == 1.0]
    assert all(row["time_ratio"]["median"] == row["flop_ratio"] == 1.0 for row in dense)
    assert all(row["realised"] is None for row in dense)
    leaner = {row["work"]: row["block_flop_ratio"] for row in rows if row["capacity"] == 0.65}
    # Of a prompt, one layer in three is nearly free at 1.0 as well.
    assert all(leaner.pop(of_prompts) < 1.0 for of_prompts in ("prefill", "classification"))
    assert all(ratio == pytest.approx(0.65, abs=0.2) for ratio in leaner.values())
    assert all((row["roof_ratio"] is None) == (row["rows"] == 0) for row in rows)
    assert all(0 < row["roof_ratio"] <= 1.0001 for row in rows if row["rows"])


def test_saving_runs_layers_of_a_bigger_shape(run):
    written = run(
        "saving",
        *QUICK,
        *("--shape", "smollm2", "--layers", "2", "--prompt", "24", "--context", "8"),
        *("--batches", "1", "--capacity", "0.65"),
    )
    check(written, "saving-smollm2")
    assert written["parameters"]["model"] == "2 random layers of smollm2's shape"


def test_the_default_batches_are_those_of_the_goals():
    assert {1, 4, 16, 64} == set(BATCHES)


def test_dense_compares_the_paths_of_transformers(run):
    written = run("dense", *QUICK, "--prompt", "32", "--tokens", "3")
    check(written, "dense")
    engines = {
        work: {row["engine"] for row in written["results"] if row["work"] == work}
        for work in ("prefill", "decode", "batch")
    }
    assert {OURS, PADDED, CONTINUOUS} <= engines["batch"]
    assert {OURS, CONTINUOUS} <= engines["decode"]
    assert PADDED not in engines["prefill"]
    for name, reason in written["parameters"]["absent"].items():
        assert name not in engines["decode"]
        assert reason


def test_mixed_runs_the_same_requests_in_every_way(run):
    written = run("mixed", *QUICK, "--prompt", "6", "--tokens", "2")
    check(written, "mixed")
    assert len({row["way"] for row in written["results"]}) == 4
    assert all(row["seconds"]["median"] > 0 for row in written["results"])


def test_overhead_has_a_control_and_an_interval(run):
    written = run("overhead", *QUICK, "--prompt", "16", "--context", "8", "--steps", "16")
    check(written, "overhead")
    assert len(written["results"]) == 9  # three models, three kinds of work
    used = [row["ratio"] for row in written["results"] if row["model"] == WITH]
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in used)


def test_cache_holds_less_at_a_low_capacity_only_where_skipped_tokens_leave_nothing(run):
    written = run("cache", "--pool", "2000", "--prompt", "300", "--tokens", "4")
    check(written, "cache")
    rows = {(row["kv"], row["capacity"]): row for row in written["results"]}
    assert rows["complete", 0.5]["bytes_ratio"] == 1.0
    assert rows["kept", 0.5]["bytes_ratio"] < rows["kept", 0.8]["bytes_ratio"] < 1.0
    assert rows["kept", 0.5]["fit"] > rows["kept", 1.0]["fit"] > 0
    assert all(row["leaked_blocks"] == 0 for row in rows.values())


def test_serving_measures_the_cost_of_http_without_a_load_generator(run):
    written = run(
        "serving",
        "--no-load",
        *("--http-seconds", "0", "--streams", "3", "--prompt", "8", "--tokens", "4"),
    )
    check(written, "serving")
    assert written["results"]["http"]["tokens"] == 12
    assert written["results"]["load"] == []


@pytest.fixture
def _all_are_answered(monkeypatch):
    """Nobody is cut off where a machine stands still for a moment; what is told is as it was."""
    at = Sender.at

    def patiently(self, moments, capacities, seconds):
        return replace(at(self, moments, capacities, seconds + 120), seconds=seconds)

    monkeypatch.setattr(Sender, "at", patiently)


@pytest.mark.usefixtures("_all_are_answered")
def test_serving_tells_what_every_mode_got_at_every_rate(run):
    written = run(
        "serving",
        *("--http-seconds", "0", "--streams", "3", "--prompt", "8", "--tokens", "4"),
        *("--seconds", "1", "--rates", "8,20"),
    )
    check(written, "serving")
    points = written["results"]["load"]
    assert len(points) == 8  # four modes
    for point in points:
        assert 0 < point["capacity_spent"] <= 1
        assert 0 < point["finished"] == point["sent"] and point["failed"] == 0
        assert point["output_tokens_per_second"] == 4 * point["finished"] / point["seconds"]
        assert 0 < point["first_token_ms"][0] <= point["first_token_ms"][-1]
    spent = {point["mode"]: point["capacity_spent"] for point in points}
    assert spent["all at 0.6"] < spent["all at 1.0"] >= spent["all auto"]


def test_serving_without_the_load_generator_that_was_named_says_how_to_install_it(
    tiny_options, capsys
):
    assert main(["serving", *tiny_options, "--guidellm", "no/such/program"]) == 1
    assert INSTALL in capsys.readouterr().err


def test_a_short_soak_leaves_nothing_behind(run):
    written = run("soak", "--minutes", "0.1", "--rate", "6", "--longest", "40")
    check(written, "soak")
    outcome = written["results"]["outcome"]
    assert sum(outcome["endings"].values()) > 0
    assert outcome["wrong"] == []
    assert outcome["running_left"] == outcome["waiting_left"] == outcome["cache_left"] == 0
    possible = outcome["jobs_certain"] + outcome["jobs_possible"]
    assert outcome["jobs_certain"] <= outcome["jobs_ended"] <= possible
    assert written["results"]["samples"]


def test_a_profile_accounts_for_the_step(run):
    written = run("profile", "--steps", "2", "--context", "8")
    check(written, "profile")
    assert {row["rows"] for row in written["results"]} == {1, 16}
    for row in written["results"]:
        families = row["families"]
        assert families.get("whole layers in one call", 0) + families.get("products", 0) > 0
        assert any(operator["name"].startswith("kernel: ") for operator in row["operators"])


def test_a_profile_knows_every_work_and_what_is_in_a_call_for_whole_layers(run):
    asked = ("--works", "decode,parts,prefill,classification,scoring", "--batches", "2")
    small = ("--steps", "1", "--context", "8", "--prompt", "16", "--capacity", "1.0")
    written = run("profile", *asked, *small)
    rows = {row["work"]: row for row in written["results"]}
    assert list(rows) == ["decode", "parts", "prefill", "classification", "scoring"]
    assert [row["rows"] for row in rows.values()] == [2, 2, 0, 0, 0]
    assert "whole layers in one call" in rows["decode"]["families"]
    for name in ("parts", "prefill", "scoring"):
        families = rows[name]["families"]
        assert "whole layers in one call" not in families and families["products"] > 0


def test_planning_says_what_each_mix_holds(run):
    written = run(
        "planning",
        *QUICK,
        *("--prompt", "40", "--tokens", "6", "--overhead", "1.25", "--requests", "100"),
    )
    check(written, "planning")
    for each in written["results"]["planned"]:
        assert each["overhead"] == 1.25
        assert 0 < each["rate"] <= 1.2 * each["saturated"]
        times = each["times"]
        assert times["rows"] == [0, 1, 2, 4, 5, 8, 16] and times["tokens"] == [0, 32, 128, 512]
        assert min(min(line) for line in times["seconds"][1:]) > 0
    assert len(written["results"]["planned"]) == 3 and not written["goals"]


@pytest.mark.usefixtures("_all_are_answered")
def test_a_plan_is_held_for_long_below_and_above_its_rate(run):
    written = run(
        "planning",
        *QUICK,
        *("--prompt", "40", "--tokens", "6", "--requests", "50", "--mix", "1.0", "--mix", "0.6"),
        *("--hold", "--hold-seconds", "0.6", "--hold-warm-up", "0.3", "--overhead-seconds", "0.5"),
    )
    check(written, "planning")
    for planned in written["results"]["planned"]:
        assert not planned["checked"]
        below, above = planned["held"]
        assert (below["part"], above["part"]) == (0.85, 1.15)
        for seed, point in enumerate((below, above), 200):
            assert point["rate"] == pytest.approx(point["part"] * planned["rate"], abs=0.001)
            warmed = [at for at in moments(point["rate"], 0.9, seed) if at >= 0.3]
            assert point["sent"] == len(warmed)  # who came before does not count
            assert point["finished"] + point["failed"] <= point["sent"]
            assert min(point["kept"], point["kept_on_paper"]) >= 0
    assert [(goal["wanted"], goal["at_most"]) for goal in written["goals"]] == [
        (0.9, False),
        (0.899, True),
    ] * 2


def test_what_is_held_for_long_lies_between_the_rates_that_were_tried():
    def planned(**kept):
        held = [Held(float(part), 1.0, 9, 9, 0, share, 1.0, None) for part, share in kept.items()]
        return replace(PLANNED, held=tuple(held))

    assert planned(**{"0.85": 1.0, "1.15": 0.4}).held_parts(0.9) == (0.85, 1.15)
    assert planned(**{"0.85": 1.0, "1": 0.9, "1.15": 0.4}).held_parts(0.9) == (1.0, 1.15)
    assert planned(**{"0.85": 0.5, "1.15": 0.4}).held_parts(0.9) == (None, 0.85)
    assert planned(**{"0.85": 1.0, "1.15": 1.0}).held_parts(0.9) == (1.15, None)


PLANNED = Planned("all at 1.0", StepTimes((0, 1), (0, 1), ((0.0, 1.0),) * 2), 1.0, 1.0, 1.2)


@pytest.mark.usefixtures("_all_are_answered")
def test_a_plan_of_a_mix_is_checked_at_the_very_moments_that_are_simulated(run):
    written = run(
        "planning",
        *QUICK,
        *("--prompt", "40", "--tokens", "6", "--requests", "50", "--mix", "1.0,0.6"),
        *("--check", "--check-seconds", "0.5", "--overhead-seconds", "0.5"),
    )
    (planned,) = written["results"]["planned"]
    assert planned["overhead"] > 0  # measured over HTTP
    assert planned["mode"] == "1, 0.6"
    assert len(planned["checked"]) == 5
    assert sum(point["finished"] for point in planned["checked"]) > 0
    for seed, point in enumerate(planned["checked"]):
        assert point["sent"] == len(moments(point["rate"], 0.5, seed))
        assert point["finished_on_paper"] <= point["sent"] == point["finished"]
        assert point["failed"] == 0
    (goal,) = written["goals"]
    assert goal["wanted"] == 0.15
