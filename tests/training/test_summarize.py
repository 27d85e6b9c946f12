"""Reports side by side: every row once, the spread over reports, and no mix of adapters."""

from __future__ import annotations

import json

import pytest

from training.__main__ import main


def row(capacity, setting, kl, **more):
    return {
        "capacity": capacity,
        "setting": setting,
        "kl": kl,
        "kl_p95": 3 * kl,
        "perplexity_ratio": 1 + kl,
        "spent_least": capacity - 0.001,
        "spent_most": capacity + 0.004,
        **more,
    }


def write(folder, seed, kl, adapter="a1", baselines=None):
    folder.mkdir()
    report = {
        "adapter": adapter,
        "data": {"name": "prose-test.jsonl"},
        "copied": seed == 2,
        "seed": seed,
        "windows": 3,
        "ours": [
            row(1.0, "scored", 0.0),
            row(0.65, "scored", kl, cloze=0.25, cloze_whole=0.5),
        ],
        "baselines": baselines or {},
        "greedy": [],
    }
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_a_row_has_a_cell_for_each_report_and_their_spread(tmp_path, capsys):
    other = {"uniform": [row(0.65, "scored", 0.9)]}
    folders = [
        write(tmp_path / "one", 1, 0.125, baselines=other),
        write(tmp_path / "two", 2, 0.375),
    ]
    assert main(["summarize", "--reports", *folders, "--out", str(tmp_path / "s.md")]) == 0
    assert json.loads(capsys.readouterr().out)["reports"] == 2
    lines = (tmp_path / "s.md").read_text().splitlines()

    titles = "prose-test, seed 1, 3 windows | prose-test, copied, seed 2, 3 windows"
    assert lines.count(f"| capacity | what | {titles} | KL, least to most |") == 3
    cells = "0.1250 (0.3750) | 0.3750 (1.1250) | 0.1250 to 0.3750"
    assert f"| 0.65 | this adapter | {cells} |" in lines
    assert "| 0.65 | uniform | 0.9000 (2.7000) |  |  |" in lines
    assert "| 0.65 | this adapter | 0.250 (0.500) | 0.250 (0.500) | 0.1250 to 0.3750 |" in lines
    assert not any(line.startswith("| 1 |") for line in lines)
    assert "further than 0.0040 from its capacity" in lines[-1]


def test_reports_of_two_adapters_are_not_mixed(tmp_path, capsys):
    folders = [write(tmp_path / "one", 1, 0.1), write(tmp_path / "two", 2, 0.1, adapter="b2")]

    assert main(["summarize", "--reports", *folders, "--out", str(tmp_path / "s.md")]) == 1
    assert "different adapters: a1, b2" in capsys.readouterr().err


def test_a_folder_without_a_report_is_named(tmp_path, capsys):
    command = ["summarize", "--reports", str(tmp_path), "--out", str(tmp_path / "s.md")]
    assert main(command) == 1
    assert f"{tmp_path / 'report.json'}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ([], "an object is expected; got list"),
        ({}, "has no ours, baselines, greedy"),
        ({"ours": [{"capacity": 1}], "baselines": {}}, "has no greedy"),  # as of an encoder
    ],
)
def test_a_report_of_another_kind_is_named(tmp_path, capsys, report, said):
    (tmp_path / "report.json").write_text(json.dumps(report))
    command = ["summarize", "--reports", str(tmp_path), "--out", str(tmp_path / "s.md")]
    assert main(command) == 1
    assert f"{tmp_path / 'report.json'}: " in (told := capsys.readouterr().err) and said in told


def test_a_report_of_the_full_model_alone_has_missed_nothing(tmp_path):
    folder = write(tmp_path / "one", 1, 0.1)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    report["ours"] = [row(1.0, "scored", 0.0)]
    (tmp_path / "one" / "report.json").write_text(json.dumps(report))
    assert main(["summarize", "--reports", folder, "--out", str(tmp_path / "s.md")]) == 0
    assert "further than 0.0000 from its capacity" in (tmp_path / "s.md").read_text()
