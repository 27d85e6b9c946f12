"""Image tokens and the language model's own units give what a number asks, together."""

from __future__ import annotations

import json

import pytest

from elastiformer import Calibration, Capacity, Phase, SavedAdapter, Step, Unit
from elastiformer.calibration import ImageFloor
from elastiformer.vlm import ElasticVlm
from tests.tiny import LAYERS
from tests.training.test_calibrate import prose
from tests.training.test_exchanges import commands, data  # noqa: F401
from training.__main__ import main
from training.picture_calibrate import floors_of

UNITS = "image_tokens,mlp_tokens,channels"


@pytest.fixture
def given(tmp_path, data):  # noqa: F811
    base, adapter = commands(tmp_path, data, "--units", UNITS, "--lora-rank", "1", "--steps", "2")
    return ["--base", base, "--adapter", adapter, "--data", str(data), "--dtype", "float32"]


def test_layers_and_image_tokens_share_what_a_number_asks(given, capsys):
    adapter = given[3]
    capsys.readouterr()
    wanted = ["--capacities", "0.6,0.45", "--items", "4", "--check-items", "9"]
    assert main(["calibrate", *given, *wanted, "--sweeps", "0"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = SavedAdapter.load(adapter).calibration
    assert saved is not None and all(saved.paths.values()) and table["runs_whole"] == []
    assert table["worst_miss"] < 0.02 + 1 / 40  # a token's worth: so short are these prompts
    whole = table["measured"][0]["spent"]  # of prompts less than 1: their last layer owes no MLP
    for row in table["measured"]:
        assert row["spent"] == pytest.approx(min(row["capacity"], whole), abs=0.02)
    assert set(table["floors"]) == {"0.6", "0.45"}
    for capacity, losses in table["floors"].items():
        assert len(losses) > 1 and table["image_floors"][capacity] in map(float, losses)
    assert [floor.capacity for floor in saved.image_floors] == [0.45, 0.6]


def test_an_adapter_of_image_tokens_can_lend_its_model_channels(tmp_path, data, capsys):  # noqa: F811
    """They need no router; and nothing is asked of what is generated unless it is named."""
    base, adapter = commands(tmp_path, data, "--steps", "2")
    given = ["--base", base, "--adapter", adapter, "--data", str(data), "--dtype", "float32"]
    asked = ["--prompt-units", "channels", "--capacities", "0.6", "--items", "4", "--sweeps", "0"]
    capsys.readouterr()
    assert main(["calibrate", *given, *asked]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table["runs_whole"] == ["output"] and set(table["chosen"]) == {"prompt"}
    report = tmp_path / "report"
    options = ["--items", "4", "--repeats", "0", "--out", str(report)]
    assert main(["evaluate", *given, "--capacities", "0.6", *options]) == 0
    said = json.loads((report / "report.json").read_text())
    assert set(said["alone"]) == {"image tokens alone", "layers alone"}
    images, layers = said["alone"]["image tokens alone"], said["alone"]["layers alone"]
    assert all(row["kept"] < 1 for row in images) and all(row["kept"] == 1 for row in layers)
    assert len(images) == len(layers) == 1

    assert main(["calibrate", *given, "--output-units", "heads"]) == 1
    assert f"has no routers for {Unit.HEADS}" in capsys.readouterr().err


def test_layers_give_along_lent_paths_what_image_tokens_do_not(tmp_path, data, capsys):  # noqa: F811
    """Then text without images has every capacity, too, and the table says what it loses."""
    base, adapter = commands(tmp_path, data, "--steps", "2")
    given = ["--base", base, "--adapter", adapter, "--data", str(data), "--dtype", "float32"]
    steps = [Step(layer, "mlp_out", 0.5) for layer in range(LAYERS)]
    late = (Step(LAYERS - 1, "attention_tokens", 0.0), Step(LAYERS - 1, "mlp_tokens", 0.0))
    paths = {Phase.OUTPUT: tuple(steps), Phase.PROMPT: late}
    calibration = Calibration(0.9, 64, paths, {phase: {} for phase in Phase}, ())
    (tmp_path / "lender").mkdir()
    for file in ("adapter.json", "routers.safetensors"):
        (tmp_path / "lender" / file).write_bytes((tmp_path / "adapter" / file).read_bytes())
    (tmp_path / "lender" / "calibration.json").write_text(json.dumps(calibration.as_json()))
    (tmp_path / "text.jsonl").write_text(prose())
    lent = ["--keep-paths", str(tmp_path / "lender"), "--text", str(tmp_path / "text.jsonl")]
    lent += ["--windows", "2", "--check-windows", "2", "--window", "160"]
    capsys.readouterr()
    assert main(["calibrate", *given, *lent, "--capacities", "0.8,0.6", "--check-items", "6"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table["lowest"] == 0.6 and table["runs_whole"] == []
    assert all(row["kl_text"] is not None for row in table["measured"])
    model = ElasticVlm.load(base, adapter, dtype="float32")
    kept = model.calibration
    assert kept.paths[Phase.OUTPUT][:LAYERS] == tuple(steps) and not kept.image_floors
    assert len(kept.paths[Phase.OUTPUT]) > LAYERS and len(kept.channel_quantiles) == LAYERS
    for tokens in (1, 40, model.context):
        model.blocks_for(Capacity(0.6, 0.6), tokens, tokens)

    report = ["--items", "4", "--repeats", "0", "--baselines", "none", "--out", str(tmp_path / "r")]
    update = ["--capacities", "1.0,0.6", "--update-adapter"]
    assert main(["evaluate", *given, *update, *report]) == 0
    rows = SavedAdapter.load(adapter).calibration.measured
    assert all(row.accuracy is not None and row.kl_text is not None for row in rows)
    earlier = rows[-1].kl_text
    said = json.loads((tmp_path / "r" / "report.json").read_text())
    saved = ElasticVlm.load(base, adapter, dtype="float32").adapter
    assert said["about"]["adapter"] == saved.identity and said["alone"] == said["text"] == {}

    texts = ["--text", str(tmp_path / "text.jsonl"), "--windows", "1", "--window", "100"]
    assert main(["evaluate", *given, *update, *report, *texts]) == 0
    said = json.loads((tmp_path / "r" / "report.json").read_text())
    rows = SavedAdapter.load(adapter).calibration.measured
    assert {f"{row.capacity:g}": row.kl_text for row in rows} == {
        capacity: row["kl"] for capacity, row in said["text"].items()
    }
    assert rows[-1].kl_text != earlier
    assert "Text without an image: 1 windows" in (tmp_path / "r" / "report.md").read_text()
    assert main(["evaluate", *given, *report, *texts[2:]]) == 1
    assert "--windows: a vision-language model has no use" in capsys.readouterr().err

    capsys.readouterr()
    assert main(["calibrate", *given, *lent[:2]]) == 1
    assert "--keep-paths and --text" in capsys.readouterr().err


def test_floors_lose_least_and_do_not_rise_as_capacity_falls():
    losses = {0.8: {1.0: 0.1, 0.5: 0.2}, 0.6: {1.0: 0.1, 0.5: 0.3}, 0.4: {0.5: 0.3, 0.2: 0.9}}
    floors = (ImageFloor(0.4, 0.5), ImageFloor(0.6, 1.0), ImageFloor(0.8, 1.0))
    assert floors_of(losses) == floors
    losses[0.8] = {1.0: 0.3, 0.2: 0.01}  # now the highest one pulls the others down with it
    losses[0.6] = {1.0: 0.2, 0.2: 0.2}
    losses[0.4] = {0.5: 0.9, 0.2: 0.9}
    assert {floor.share for floor in floors_of(losses)} == {0.2}
