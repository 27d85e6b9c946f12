"""What ships beside its reports: each names the adapter that lies here; all are small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastiformer.encoder import ElasticEncoder
from elastiformer.model import ElasticModel
from elastiformer.vlm import ElasticVlm

ROOT = Path(__file__).parent.parent
ADAPTERS = sorted(path for path in (ROOT / "elastiformer" / "adapters").iterdir() if path.is_dir())
KINDS = {
    "fashion-mnist": ElasticEncoder,
    "fashion-vlm": ElasticVlm,
    "sentiment": ElasticEncoder,
    "smollm2-135m-instruct": ElasticModel,
}
FOLDERS = {"smollm2-135m-instruct": "smollm2-quality"}


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_a_shipped_adapter_is_small(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12_000_000


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_a_report_names_the_adapter_that_ships(folder):
    report = ROOT / "benchmarks" / FOLDERS.get(folder.name, f"{folder.name}-quality")
    said = json.loads((report / "report.json").read_text("utf-8"))
    named = said.get("about", said)["adapter"]
    adapter = KINDS[folder.name].load(folder.name, folder).adapter
    assert adapter is not None
    assert named == adapter.identity
