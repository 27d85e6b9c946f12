"""What the drill rests on. The drill itself takes eight minutes: `python -m deploy.drill`.

`ELASTI_TEST_DRILL=1 pytest --timeout 0 tests/deploy/test_drill.py` runs it as a test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from deploy.drill import main, scenes, table
from deploy.ray import drill as fleet
from deploy.record import setting, write
from deploy.stage import Stage
from deploy.watch import Watch, shortened
from tests.deploy.test_rules import ALERTS, RULE_FILES, needs_promtool, promtool


def test_every_alert_is_drilled(tmp_path):
    played = scenes(Stage(tmp_path, 1), Watch(tmp_path, 2, 60, "127.0.0.1:1"))
    assert set().union(*(scene.alerts for scene in played)) == set(ALERTS)


def test_a_drill_shortens_windows_offsets_and_patience_and_no_name():
    rule = {
        "alert": "A",
        "expr": "job:a:rate5m > 1.5 and avg_over_time(b[1d] offset 1h) < 2 and rate(c[5m]) > 0",
        "for": "2m",
    }
    ((short,),) = [
        group["rules"]
        for group in yaml.safe_load(shortened(yaml.safe_dump({"groups": [{"rules": [rule]}]}), 60))[
            "groups"
        ]
    ]
    assert short["for"] == "2000ms"
    assert short["expr"] == (
        "job:a:rate5m > 1.5 and avg_over_time(b[1440000ms] offset 60000ms) < 2 "
        "and rate(c[5000ms]) > 0"
    )


RESULTS = Path(__file__).resolve().parents[2] / "deploy" / "results"


def test_the_last_drill_is_told_and_every_alert_fired_and_cleared():
    report = json.loads((RESULTS / "alerts.json").read_text("utf-8"))
    assert report["well"] and not report["fired_while_all_was_well"]
    assert set().union(*(scene["fired_seconds"] for scene in report["scenes"])) == set(ALERTS)
    assert table(report["scenes"]).markdown in (RESULTS / "alerts.md").read_text("utf-8")


def test_the_fleet_s_last_drill_is_told_and_its_proxies_fired_the_alerts():
    report = json.loads((RESULTS / "fleet.json").read_text("utf-8"))
    assert report["well"] and not report["wrong"]
    flood = report["scenes"]["flood"]
    assert set(flood["fired_seconds"]) == fleet.ALERTS < set(ALERTS)
    assert flood["refusals_counted"] == flood["turned_away"] > 0
    assert fleet.table(report["scenes"]).markdown in (RESULTS / "fleet.md").read_text("utf-8")


def test_a_record_says_where_it_was_seen_and_whether_all_was_well(tmp_path):
    where = setting(["-m", "deploy.drill"])
    for well, told in ((True, "All was as it"), (False, "Not all was as it")):
        report = {"setting": where, "well": well, "seconds": 61.4, "scenes": []}
        write(tmp_path / "new" / "drill.json", "A drill", report, [table([])])
        assert json.loads((tmp_path / "new" / "drill.json").read_text("utf-8")) == report
        page = (tmp_path / "new" / "drill.md").read_text("utf-8")
        assert page.startswith("# A drill\n") and "\npython -m deploy.drill\n" in page
        assert f"{told} should be. It took 61 seconds." in page
        assert where["processor"] in page and where["versions"]["torch"] in page


def test_a_scene_that_went_wrong_is_told():
    scene = {
        "scene": "a storm",
        "fired_seconds": {"ElastiServerDown": 2.5},
        "also": [],
        "missing": ["ElastiQueueFull"],
        "cleared_seconds": None,
    }
    told = "| a storm | ElastiServerDown 2.5 s, ElastiQueueFull not | nothing | not |"
    assert told in table([scene]).markdown


@needs_promtool
@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_the_shortened_rules_are_rules(path, tmp_path):
    (tmp_path / path.name).write_text(shortened(path.read_text("utf-8"), 60), "utf-8")
    done = promtool("check", "rules", tmp_path / path.name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    "ELASTI_TEST_DRILL" not in os.environ, reason="ELASTI_TEST_DRILL is not set: eight minutes"
)
def test_every_alert_fires_and_clears(tmp_path):
    report = tmp_path / "drill.json"
    code = main(["--out", str(report)])
    assert code == 0, json.loads(report.read_text("utf-8"))
