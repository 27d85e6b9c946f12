"""Promises of the dashboards: current, whole, valid PromQL, and only about metrics that exist."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards.__main__ import BOARDS, JSON, files, main, write
from deploy.dashboards.panels import WIDTH, Scale
from deploy.dashboards.pictures import shown
from deploy.dashboards.queries import (
    PRICE,
    RANGE,
    RATE,
    VARIABLES,
    Window,
    money,
    money_per_hour,
)
from tests.deploy.promql import exported, names_in
from tests.deploy.test_rules import needs_promtool

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((ROOT / JSON).glob("*.json"))
NAMES = [path.stem for path in FILES]
WINDOW = Window(3600, 60, {variable.name: ("a.b", "c|d") for variable in VARIABLES})
AMOUNTS = {"savings": ["price"]}
ENERGY = "elasti_energy_joules_total"
PROMETHEUS_OWN = {"up"}


@pytest.fixture(params=FILES, ids=NAMES)
def committed(request):
    return json.loads(request.param.read_text("utf-8"))


def panels(board):
    """Those of rows that are shut, too."""
    return [
        panel
        for each in board["panels"]
        for panel in (each["panels"] if each["type"] == "row" else [each])
    ]


def queries(board):
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


def test_the_files_are_what_the_program_writes(tmp_path, capsys):
    assert {path.name: path.read_text("utf-8") for path in FILES} == files()
    assert write(ROOT / JSON, check=True) == 0

    for path in FILES:
        shutil.copy(path, tmp_path)
    changed, old = tmp_path / FILES[0].name, tmp_path / "old.json"
    changed.write_text(changed.read_text("utf-8").replace("rate(", "irate("), "utf-8")
    old.write_text("{}", "utf-8")
    capsys.readouterr()
    assert main(["write", "--check", "--out", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out) == {"stale": sorted([changed.name, old.name])}
    assert main(["write", "--out", str(tmp_path)]) == 0
    assert {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.json")} == files()


def test_there_are_three_and_each_links_to_the_other_two():
    assert {board.name for board in BOARDS} == set(NAMES) == {"savings", "latency", "health"}
    boards = [json.loads(path.read_text("utf-8")) for path in FILES]
    for board in boards:
        others = {f"/d/{other['uid']}" for other in boards if other is not board}
        assert {link["url"] for link in board["links"]} == others


def test_grafanas_own_types_read_them_and_lose_nothing(committed):
    register_default_plugins()
    read = Dashboard.from_json(committed)
    assert_holds(json.loads(json.dumps(read, cls=JSONEncoder)), committed)


def assert_holds(read, written):
    """Reading adds defaults; what was written must all be there."""
    if isinstance(written, dict):
        assert written.keys() <= read.keys()
        for name, value in written.items():
            assert_holds(read[name], value)
    elif isinstance(written, list):
        assert len(read) == len(written)
        for one, other in zip(read, written, strict=True):
            assert_holds(one, other)
    else:
        assert read == written


def test_a_picture_of_each_lies_in_the_docs_and_is_small():
    pictures = sorted((ROOT / "docs" / "dashboards").glob("*.png"))
    assert [path.stem for path in pictures] == NAMES
    assert all(0 < path.stat().st_size < 300_000 for path in pictures)
    assert "(docs/dashboards/savings.png)" in (ROOT / "README.md").read_text("utf-8")


def test_the_variables_are_source_job_model_and_instance_and_in_savings_a_price(committed):
    variables = committed["templating"]["list"]
    chosen = ["datasource", "job", "model", "instance"]
    written = AMOUNTS.get(committed["uid"].removeprefix("elastiformer-"), [])
    assert [each["name"] for each in variables] == [*chosen, *written]
    for each in variables[1:4]:
        assert each["multi"] and each["includeAll"]
        assert each["datasource"]["uid"] == "${datasource}"
        assert names_in(each["query"]["query"].split("(")[1].split(",")[0]) <= exported()
    for each in variables[4:]:
        assert each["type"] == "textbox" and each["query"] == each["current"]["value"] == "1"
        assert each["label"] == "Price of an exaFLOP"
    used = {name for name in re.findall(r"\$(\w+)", " ".join(queries(committed)))}
    assert used - {name.removeprefix("$") for name in (RATE, RANGE)} == {*chosen[1:], *written}


def test_money_is_flops_at_the_price_of_an_exaflop():
    filled = replace(WINDOW, price="2.5").filled(money("a - b"))
    assert filled == "(a - b) / 1e18 * 2.5"
    assert WINDOW.filled(money_per_hour("a")) == f"((a) * 3600) / 1e18 * {PRICE.default}"


def test_what_savings_are_not_parted_by_unit_the_panels_say():
    (board,) = (json.loads(path.read_text("utf-8")) for path in FILES if path.stem == "savings")
    told = {panel["title"]: panel["description"] for panel in panels(board)}
    for title in ("FLOPs saved, by model", "Parameters left out per second, by model"):
        assert "Not by unit: " in told[title]
    by_unit = [title for title in told if re.search(r"by (model and )?unit", title)]
    assert len(by_unit) == 5


def test_every_panel_says_which_question_it_answers(committed):
    descriptions = [panel["description"] for panel in panels(committed)]
    assert descriptions and all("?" in each for each in descriptions)


def test_only_what_not_every_device_counts_is_shut(committed):
    rows = [panel for panel in committed["panels"] if panel["type"] == "row"]
    shut = [row["title"] for row in rows if row["collapsed"]]
    assert shut == (["Energy, where the GPU's counter can be read"] if ENERGY in str(rows) else [])
    if shut:
        assert committed["panels"][-1]["collapsed"]
        assert {ENERGY} <= set().union(*map(names_in, queries({"panels": rows[-1:]})))
    elsewhere = [expr for expr in queries(committed) if ENERGY in expr]
    assert len(elsewhere) == (3 if shut else 0)


def test_no_panel_hides_another(committed):
    taken = set()
    rows = [panel for panel in committed["panels"] if panel["type"] == "row"]
    for panel in [*rows, *panels(committed)]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= WIDTH
        taken |= cells
    numbers = [panel["id"] for panel in [*rows, *panels(committed)]]
    assert len(set(numbers)) == len(numbers)


def test_every_query_can_be_narrowed_to_a_job_and_an_instance(committed):
    for expr in queries(committed):
        selectors = re.findall(r"[a-z_]+{[^}]*}", expr)
        assert selectors
        for selector in selectors:
            assert 'job=~"$job"' in selector and 'instance=~"$instance"' in selector
            assert 'model_name=~"$model' in selector or selector.startswith("up{")


def test_every_metric_in_a_query_is_exported_by_the_service(committed):
    for expr in map(WINDOW.filled, queries(committed)):
        names = names_in(expr)
        assert names, expr
        assert names <= exported() | PROMETHEUS_OWN, expr


@needs_promtool
def test_every_query_is_promql(committed, tmp_path):
    exprs = [WINDOW.filled(expr) for expr in queries(committed)]
    assert not any("$" in expr for expr in exprs)
    good, bad = (promtool(tmp_path / name, each) for name, each in (("g", exprs), ("b", ["a("])))
    assert good.returncode == 0, good.stderr
    assert bad.returncode != 0 and "parse" in bad.stderr


def promtool(path, exprs):
    rules = [{"record": f"query:{place}", "expr": expr} for place, expr in enumerate(exprs)]
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")
    command = ["promtool", "check", "rules", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_chosen_is_written_as_grafana_would():
    filled = WINDOW.filled(f'a{{job=~"$job",model_name=~"$model|"}}[{RATE}] [{RANGE}]')
    any_of = r"(a\\.b|c\\|d)"
    assert filled == f'a{{job=~"{any_of}",model_name=~"{any_of}|"}}[60s] [3600s]'


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (0.4231, Scale.SHARE, "42.3 %"),
        (0.0123, Scale.SECONDS, "12.3 ms"),
        (12.34, Scale.SECONDS, "12.3 s"),
        (4.2e12, Scale.FLOPS, "4.2 TFLOP"),
        (1234.0, Scale.PER_SECOND, "1.23 k/s"),
        (999.9, Scale.COUNT, "1 k"),
        (0.0, Scale.COUNT, "0"),
        (0.65, Scale.CAPACITY, "0.65"),
        (1234.0, Scale.JOULES, "1.23 kJ"),
        (0.0123, Scale.MONEY, "0.0123"),
        (12345.6, Scale.MONEY, "12,345.6"),
    ],
)
def test_a_picture_names_units_and_three_digits(value, scale, text):
    assert shown(value, scale) == text
