"""What the drill rests on. The drill itself takes eight minutes: `python -m deploy.drill`.

`ELASTI_TEST_DRILL=1 pytest --timeout 0 tests/deploy/test_drill.py` runs it as a test.
"""

from __future__ import annotations

import json
import os

import pytest
import yaml

from deploy.drill import main, scenes
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
