"""Goals beside a report: what is reached is bold, and nothing but the tables is touched."""

from __future__ import annotations

import json

import pytest

from tests.documents import ROOT
from training.__main__ import main
from training.goals import goals_in, goals_table, report_table, rewritten
from training.summarize import read


def row(capacity, setting, kl, cloze=None):
    return {
        "capacity": capacity,
        "setting": setting,
        "kl": kl,
        "spent": capacity,
        "same_top": 0.75,
        "perplexity_ratio": 1 + kl,
        "cloze": cloze,
        "cloze_whole": 0.5,
    }


@pytest.fixture
def folder(tmp_path):
    both = [row(1.0, "both", 0.0), row(0.5, "both", 0.25, 0.125)]
    others = [row(at, which, 0.1) for at in (1.0, 0.5) for which in ("prompt", "scored")]
    report = {
        "ours": both + others,
        "baselines": {
            "a": [row(0.5, "both", 1.0)],
            "repaired static channels": [row(0.5, "both", 2.0)],
        },
        "greedy": [{"capacity": 0.5, "tokens": 64, "agreement": 0.25}],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    bounds = {"at_most": {"0.5": 0.3}, "setting": "both", "value": "kl"}
    goals = [
        {"what": "loss", **bounds},
        {"what": "over the best", "over": ["a", "repaired static channels"], **bounds},
        {"what": "too much", **bounds, "at_most": {"0.5": 0.2, "0.4": 0.2}},
    ]
    (tmp_path / "goals.json").write_text(json.dumps(goals))
    (tmp_path / "page.md").write_text(
        "Above.\n<!-- goals: begin -->\nstale\n<!-- goals: end -->\n"
        "Between.\n<!-- report: begin -->\n<!-- report: end -->\nBelow.\n"
    )
    return tmp_path


def command(folder) -> list[str]:
    return [
        *("goals", "--report", str(folder), "--goals", str(folder / "goals.json")),
        *("--into", str(folder / "page.md")),
    ]


def test_a_page_gets_both_tables_and_keeps_all_else(folder, capsys):
    assert main(command(folder)) == 0
    told = json.loads(capsys.readouterr().out)
    page = (folder / "page.md").read_text()

    assert (told["reached"], told["missed"], told["not_measured"]) == (2, 1, 1)
    assert "| loss | **0.250**, 0.3 |  |" in page
    assert "| over the best | **0.250**, 0.3 |  |" in page
    assert "| too much | 0.250, 0.2 | not measured, 0.2 |" in page
    assert "| 0.5 | 0.500 | 0.100 | 0.250 | 0.100 | 1.100 | 0.750 | 0.125 (0.500) | 0.25 " in page
    assert "| 1.000 (a) | 2.000 (repaired static channels) |" in page and "stale" not in page
    outside = [line for line in page.splitlines() if not line.startswith("|")]
    assert [line for line in outside if "<" not in line] == ["Above.", "Between.", "Below."]

    assert main(command(folder)) == 0
    assert (folder / "page.md").read_text() == page


@pytest.mark.parametrize(
    ("page", "goals", "said"),
    [
        ("no mark", "[]", "marks no part"),
        ("<!-- goals: begin -->\n", "[]", "has no end"),
        ("", '[{"what": "loss"}]', "holds no goals: KeyError: 'setting'"),
        (
            "",
            '[{"what": "loss", "setting": "both", "value": "joy", "at_most": {"0.5": 1}}]',
            "a number in the report's rows; 'joy' is None",
        ),
    ],
)
def test_a_page_or_file_that_cannot_be_used_is_named(folder, capsys, page, goals, said):
    (folder / "page.md").write_text(page)
    (folder / "goals.json").write_text(goals)

    assert main(command(folder)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "page.md: cannot be read"),
        (b"\xff", "page.md: cannot be read"),
    ],
)
def test_a_page_that_cannot_be_read_is_named(folder, capsys, content, said):
    (folder / "page.md").unlink()
    if content is not None:
        (folder / "page.md").write_bytes(content)

    assert main(command(folder)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "benchmarks/smollm2-quality/ablations.md"])
def test_the_tables_in_the_documents_are_those_of_the_committed_report(name):
    folder = ROOT / "benchmarks" / "smollm2-quality"
    report, goals = read(folder), goals_in(folder / "goals.json")
    parts = {"report": report_table(report), "goals": goals_table(report, goals)}

    assert rewritten(ROOT / name, parts) == (ROOT / name).read_text(encoding="utf-8")
