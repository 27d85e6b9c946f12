"""The table of ranks: a row for each, of moments that add up."""

from __future__ import annotations

import json

import pytest
import torch

from elastiformer import ElasticModel
from tests.tiny import tiny
from tests.training.test_calibrate import prose
from tests.training.test_repair import text
from training.__main__ import main
from training.ranks import gather_each, total
from training.repair import gather


def test_moments_of_each_layer_to_leave_at_add_up_to_those_of_all():
    model = ElasticModel(tiny())
    each = gather_each(model, text(6, seed=1), (0, 1))
    of_all = gather(model, text(6, seed=1), (0, 1), first=1)

    assert set(each) == {(0, 1), (0, 2), (1, 2)}
    for layer, ats in ((1, (0,)), (2, (0, 1))):
        found = total(each[at, layer] for at in ats)
        torch.testing.assert_close(found.xx_DD, of_all[layer].xx_DD)
        torch.testing.assert_close(found.missing_x_DD, of_all[layer].missing_x_DD)


def test_the_command_writes_a_row_for_every_rank_and_layer(tmp_path, tiny_folder, capsys):
    for name, seed in (("fit.jsonl", 0), ("held-out.jsonl", 1)):
        (tmp_path / name).write_text(prose(seed=seed))
    command = [
        *("ranks", "--base", str(tiny_folder), "--data", str(tmp_path / "fit.jsonl")),
        *("--held-out", str(tmp_path / "held-out.jsonl"), "--out", str(tmp_path / "ranks")),
        *("--leave-at", "1", "--ranks", "4,24", "--windows", "8", "--window", "64"),
        *("--held-out-windows", "2", "--held-out-window", "96"),
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "ranks" / "ranks.json").read_text())["rows"]

    assert [(row["rank"], row["fitted"]) for row in rows] == [
        (0, "one layer"),
        (4, "one layer"),
        (4, "all"),
        (24, "one layer"),
        (24, "all"),
    ]
    none, *_, full, full_of_all = (row["kl"] for row in rows)
    assert full < none
    assert full == pytest.approx(full_of_all)  # of one layer only, both are the same
    table = (tmp_path / "ranks" / "ranks.md").read_text()
    assert "| leaving at | no repair | rank 4, one layer |" in table
    assert f"| 1 | {none:.4f} / {rows[0]['kl_copied']:.4f} |" in table

    assert main([*command[:-12], "--leave-at", "2", *command[-10:]]) == 1
    assert "--leave-at 2: below 2" in capsys.readouterr().err
