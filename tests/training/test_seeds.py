"""Several seeds: each gets its own adapter and baselines, on one test text, and is made once."""

from __future__ import annotations

import json

import pytest

from elastiformer import ElasticModel, Unit
from tests.training.test_calibrate import prose
from training.__main__ import main
from training.seeds import keep_shares


@pytest.fixture
def command(tmp_path, tiny_folder) -> list[str]:
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    model.blank_adapter([Unit.CHANNELS], lora_rank=1).save(tmp_path / "adapter")
    for seed, name in enumerate(("data", "held-out", "test")):
        (tmp_path / f"{name}.jsonl").write_text(prose(seed))
    return [
        *("seeds", "--base", str(tiny_folder), "--adapter", str(tmp_path / "adapter")),
        *("--data", str(tmp_path / "data.jsonl"), "--test", str(tmp_path / "test.jsonl")),
        *("--held-out", str(tmp_path / "held-out.jsonl"), "--seeds", "0,3"),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")),
        *("--windows", "2", "--window", "96", "--calibrate-windows", "1", "--check-windows", "1"),
        *("--repair-windows", "3", "--repair-window", "64", "--lora-rank", "2"),
        *("--probes", "4", "--experts", "7"),
    ]


def test_the_range_of_keep_shares_lies_around_the_roots_of_the_capacities():
    assert keep_shares([1.0, 0.65]) == (0.75, 0.85)
    assert keep_shares([1.0, 0.9, 0.5]) == (0.65, 1.0)


def test_every_seed_has_its_own_adapter_and_is_made_once(command, tmp_path, capsys):
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "seeds.json").read_text())
    ours = [row for row in report["rows"] if row["what"] == "this adapter"]
    names = {row["what"] for row in report["rows"]}

    assert len(set(report["adapters"])) == 2
    assert [row["setting"] for row in ours] == ["both", "scored"]
    assert all(len(row["kl"]) == 2 and row["deviation"] > 0 for row in ours)
    # Uniform shares of what one of these tiny paths lowers may not go down to 0.65.
    assert {"this adapter", "random", "repaired random", "repaired static channels"} < names
    assert "repaired drop by sensitivity" in names
    recipe = [row for row in report["rows"] if row["what"] == "paper's recipe, trained"]
    assert [row["setting"] for row in recipe] == ["both", "scored"]
    assert all(row["kl"][0] != row["kl"][1] and min(row["kl"]) > 0 for row in recipe)
    for seed in (0, 3):
        trained = tmp_path / "work" / f"seed-{seed}" / "recipe"
        record = json.loads((trained / "adapter.json").read_text())["training"]
        assert (record["tokens"], record["lessons"]) == (3 * 64, "uniform")
        assert (record["min_capacity"], record["max_capacity"]) == (0.75, 0.85)
        # The same share everywhere: nothing of it was probed.
        assert not (trained / "sensitivity.jsonl").exists()
    (random,) = (r for r in report["rows"] if r["what"] == "random" and r["setting"] == "scored")
    assert random["kl"][0] != random["kl"][1]
    assert (tmp_path / "out" / "seeds.png").stat().st_size > 500
    assert "| 0.65 | this adapter |" in (tmp_path / "out" / "seeds.md").read_text()

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert main(command) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert json.loads((tmp_path / "out" / "seeds.json").read_text()) == report
