"""The operator's guide names what exists, and all of it: settings, metrics, errors, commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from opentelemetry import environment_variables as api_variables
from opentelemetry.sdk import environment_variables as sdk_variables

from deploy.ray.fleet import TARGETS
from service.errors import REFUSALS, UNEXPECTED
from service.metrics import Metrics
from service.routes import router
from service.settings import Settings
from service.tracing import PROBES
from tests.documents import ROOT, is_ours, lines, settings_rows, words_of

GUIDE = (ROOT / "docs" / "operating.md").read_text("utf-8")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


def exported() -> dict[str, str]:
    """Every metric, with its type."""
    page = Metrics().page().decode()
    return dict(re.findall(r"^# TYPE (elasti_\w+) (\w+)$", page, flags=re.MULTILINE))


# Settings, metrics, errors and routes.


@pytest.mark.parametrize("row", settings_rows())
def test_every_setting_is_in_the_guide_with_its_flag_and_default(row):
    assert GUIDE.count(row) == 1


def test_every_variable_in_the_guide_is_one():
    settings = {f"ELASTI_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\bELASTI_[A-Z_]+", GUIDE)) == settings | {"ELASTI_CACHE"}
    known = {*vars(api_variables), *vars(sdk_variables)}
    named = set(re.findall(r"\bOTEL_[A-Z_]+", GUIDE))
    assert len(named) > 8 and named <= known


def test_every_metric_is_in_the_guide_once_and_no_other():
    rows = re.findall(r"^\| `(elasti_\w+)`( \(h\))? \| .{10,} \|$", GUIDE, flags=re.MULTILINE)
    kinds = exported()
    assert sorted(name for name, _ in rows) == sorted(kinds)
    for name, marked in rows:
        assert bool(marked) == (kinds[name] == "histogram"), name
    for name in set(re.findall(r"\belasti_[a-z0-9_]+", GUIDE)):
        assert name in kinds or kinds.get(SUFFIXES.sub("", name)) == "histogram", name


def test_every_error_is_in_the_guide_with_its_status():
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| .{10,} \|$", GUIDE, flags=re.MULTILINE)
    refusals = [*REFUSALS.values(), UNEXPECTED]
    assert sorted(rows) == sorted((refusal.code, str(refusal.status)) for refusal in refusals)


def test_the_guide_says_of_every_alert_what_to_do():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/alerts.yml").read_text("utf-8"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    told = GUIDE.partition("### When an alert fires")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(Elasti\w+)` \| .{20,} \| .{10,} \|$", told, flags=re.MULTILINE)
    assert rows == alerts
    points = GUIDE.partition("## Tune")[2].partition("\n## ")[0]
    for point in set(re.findall(r"Tune, (\d)", told)):
        assert f"\n{point}. **" in points


def test_the_routes_and_probes_in_the_guide_are_served():
    served = {route.path for route in router.routes} | {TARGETS}  # of a fleet
    named = set(re.findall(r"`GET (/\S*)`", GUIDE)) | set(re.findall(r":8000(/\S+)", GUIDE))
    assert named and named <= served
    assert set(re.findall(r"`(/[a-z]\w*)`", GUIDE)) <= served
    assert f"Probes ({', '.join(f'`{path}`' for path in PROBES)})" in GUIDE


def test_the_fields_of_a_line_are_in_the_guide():
    source = (ROOT / "service" / "logs.py").read_text("utf-8")
    body = source.partition("def _fields")[2].partition("\ndef ")[0]
    told = GUIDE.partition("of the logger\n`elasti.access` tells")[2].partition("It replaces")[0]
    named = set(re.findall(r"`([a-z_]+)`", told))
    written = set(re.findall(r'^ +"([a-z_]+)":', body, re.MULTILINE))
    written |= {"request_id", "trace_id", "span_id"}
    assert named == written


def test_prometheus_understands_the_queries(tmp_path):
    queries = lines(GUIDE, "promql")
    assert len(queries) >= 5
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    rules = "".join(
        f"  - record: question:{place}\n    expr: {query!r}\n"
        for place, query in enumerate(queries)
    )
    path = tmp_path / "rules.yml"
    path.write_text(f"groups:\n- name: guide\n  rules:\n{rules}")
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Commands and files.


def commands() -> list[str]:
    inline = re.findall(r"`((?:make|python -m|pip|git|curl) [^`…]*)`", GUIDE)
    shown = [re.sub(r"\s+#.*", "", line) for line in lines(GUIDE, "bash")]
    return sorted({line.strip() for line in [*shown, *inline]})


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_guide_exists(command):
    words = words_of(command)
    if words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\.\[(.*)\]", command):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
        for name in re.findall(r"\S+\.txt", command):
            assert (ROOT / name).is_file()
    elif not is_ours(words):
        assert words[0] in ("curl", "git"), command


def test_every_file_in_the_guide_is_there():
    named = set(re.findall(r"`([\w./]+\.(?:py|md|txt|toml|sh|yaml|json))`", GUIDE))
    named |= {f"docs/{link}" for link in re.findall(r"\]\((?!http)([^)#]+)", GUIDE)}
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_readme_leads_to_the_guide():
    assert "(docs/operating.md)" in (ROOT / "README.md").read_text("utf-8")
