"""Promises of the rules: valid, about metrics that exist, and each alert fires when it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import exported, names_in

PROMETHEUS = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*.yml"))

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def promtool(*words: object, cwd: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def read(path: Path) -> dict[str, Any]:
    held = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(held, dict)
    return held


RULES = [rule for path in RULE_FILES for group in read(path)["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
CASES = [
    case
    for path in TEST_FILES
    for test in read(path)["tests"]
    for case in test.get("alert_rule_test", ())
]


@needs_promtool
def test_the_scrape_configuration_and_its_rules_are_valid():
    done = promtool("check", "config", "--lint-fatal", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_and_holds_back_as_its_cases_say():
    done = promtool("test", "rules", *TEST_FILES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_reads_only_series_that_exist(rule):
    names = names_in(rule["expr"])
    assert names
    assert names <= exported() | RECORDED | {"up"}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_case_that_fires_and_one_that_does_not(alert):
    fired = {bool(case["exp_alerts"]) for case in CASES if case["alertname"] == alert}
    assert fired == {True, False}


@needs_promtool
@pytest.mark.parametrize("stuck", ["vector(1) < 0", "vector(1)"], ids=["never", "always"])
def test_the_cases_notice_each_alert_that_is_stuck(stuck, tmp_path):
    for folder in ("rules", "tests"):
        shutil.copytree(PROMETHEUS / folder, tmp_path / folder)
    for path in sorted((tmp_path / "rules").glob("*.yml")):
        held = read(path)
        for group in held["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    rule["expr"] = stuck
                    rule.pop("for", None)
        path.write_text(yaml.safe_dump(held), "utf-8")
    done = promtool("test", "rules", *(tmp_path / "tests").glob("*.yml"), cwd=tmp_path)
    unnoticed = [each for each in ALERTS if f"alertname: {each}," not in done.stdout + done.stderr]
    assert not unnoticed


def test_the_target_has_the_job_that_the_rules_look_for():
    jobs = {each["job_name"] for each in read(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    assert "elastiformer" in jobs
    assert all('up{job="elastiformer"}' in rule["expr"] for rule in RULES if "up{" in rule["expr"])


def test_the_guide_names_every_alert_and_no_other():
    guide = (PROMETHEUS.parent / "README.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(Elasti\w+)` \|", guide, flags=re.MULTILINE)) == set(ALERTS)
