"""A tiny model with a calibrated adapter on disk, and a benchmark's command run on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from elastiformer import Calibration, ElasticModel, Phase, Step, Unit
from tests.tiny import LAYERS, tiny, tiny_tokenizer

LOWEST = 0.5
PATH = (
    *(Step(layer, "mlp_out", share) for share in (0.8, 0.5) for layer in range(LAYERS)),
    *(Step(layer, "attention_tokens", 0.5) for layer in range(LAYERS)),
    *(Step(layer, "mlp_in", 0.5) for layer in range(LAYERS)),
    *(Step(layer, "mlp_tokens", 0.25) for layer in range(LAYERS)),
)


@pytest.fixture(scope="session")
def tiny_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a tiny base, its adapter, and one thread."""
    folder = tmp_path_factory.mktemp("benchmarks")
    base, adapter = folder / "tiny-llama", folder / "adapter"
    tiny("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = ElasticModel.load(str(base), dtype="float32", device="cpu")
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.CHANNELS)
    made = model.blank_adapter(units, lora_rank=0)
    made.calibration = Calibration(
        lowest=LOWEST, context=96, paths=dict.fromkeys(Phase, PATH), thresholds={}, measured=()
    )
    made.save(adapter)
    return [
        *("--base", str(base), "--adapter", str(adapter)),
        *("--dtype", "float32", "--device", "cpu", "--threads", "1"),
    ]


@pytest.fixture
def run(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs one benchmark on the tiny model, checks its files, and returns its JSON."""

    def run_command(name: str, *options: str) -> dict[str, Any]:
        assert main([name, *tiny_options, "--out", str(tmp_path), *options]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        files = [Path(path) for path in last["files"]]
        assert [path.suffix for path in files] == [".json", ".md", ".svg"]
        assert sorted(tmp_path.iterdir()) == sorted(files)
        assert b"</svg>" in files[2].read_bytes()
        written: dict[str, Any] = json.loads(files[0].read_text())
        assert written["goals"] == last["goals"]
        page = files[1].read_text()
        assert written["setting"]["command"] in page
        assert files[2].name in page
        return written

    return run_command
