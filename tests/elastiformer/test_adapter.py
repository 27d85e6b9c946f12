"""An adapter on disk: it comes back as it was, fits its base, or says exactly why not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from elastiformer import (
    AdapterError,
    Calibration,
    ElasticModel,
    LayerPlan,
    Phase,
    SavedAdapter,
    Step,
    Unit,
)
from elastiformer.adapter import blank
from elastiformer.weights import BaseIdentity
from tests.elastiformer.elastic import (
    PROMPT,
    TOKENS,
    any_plan,
    by_thresholds,
    elastic,
    masked_logits,
    text,
)
from tests.tiny import LAYERS, tiny

PLANS = (any_plan(1, LAYERS), any_plan(2, LAYERS))


def path_of(units=(Unit.MLP_TOKENS,)):
    steps = tuple(Step(layer, unit.value, 0.5) for layer in range(LAYERS) for unit in units)
    return Calibration(0.8, TOKENS, dict.fromkeys(Phase, steps), {}, ())


@pytest.fixture
def saved(tmp_path):
    """A model, and the folder of its adapter."""
    model = elastic(lora_phases="split")
    return model, model.adapter.save(tmp_path / "adapter")


def refit(folder, base=None, identity=None):
    model = ElasticModel(base or tiny("llama"), identity=identity)
    return SavedAdapter.load(folder).fit(model.layout, model.identity)


@pytest.mark.parametrize("phases", ["shared", "split", "prompt"])
def test_a_saved_and_reloaded_adapter_gives_the_same_logits(family, phases, tmp_path):
    model = elastic(family, lora_phases=phases)
    expected = masked_logits(model, text(), PLANS)
    folder = model.adapter.save(tmp_path / "adapter")
    again = ElasticModel(tiny(family))
    again.attach(SavedAdapter.load(folder).fit(again.layout, again.identity))

    assert torch.equal(masked_logits(again, text(), PLANS), expected)
    assert again.adapter.identity == model.adapter.identity


def test_its_folder_holds_json_safetensors_and_a_card_and_nothing_else(saved):
    _, folder = saved
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "adapter.json",
        "lora/output/adapter_config.json",
        "lora/output/adapter_model.safetensors",
        "lora/prompt/adapter_config.json",
        "lora/prompt/adapter_model.safetensors",
        "routers.safetensors",
    }


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_peft_loads_the_repair_onto_the_base_and_computes_the_same(family, tmp_path):
    model = elastic(family, units=[Unit.MLP_TOKENS], lora_phases="shared")
    ids_BT = text()
    # A share that rounds to all channels: every row is repaired, and nothing is left out.
    plan = (LayerPlan(mlp_in=0.99),) * LAYERS
    ours = masked_logits(model, ids_BT, (plan, plan))
    folder = model.adapter.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny(family), folder / "lora").eval()
    with torch.no_grad():
        expected = theirs(ids_BT).logits[0, PROMPT - 1 :]

    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_repair_of_late_layers_alone_is_stored_served_and_loaded_by_peft(tmp_path):
    model = elastic(units=[Unit.MLP_TOKENS])
    spec = replace(model.adapter.spec, lora_first=1)
    late = blank(spec, model.layout, model.identity)
    late.routers.load_state_dict(model.adapter.routers.state_dict())
    for name, parameter in late.parameters().items():
        parameter.data.copy_(model.trainable()[name].data)
    model.attach(late)
    plan = (LayerPlan(mlp_in=0.99),) * LAYERS
    ours = masked_logits(model, text(), (plan, plan))
    folder = late.save(tmp_path / "adapter")
    names = load_file(folder / "lora" / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(tiny("llama"), folder / "lora").eval()
    with torch.no_grad():
        expected = theirs(text()).logits[0, PROMPT - 1 :]
    reloaded = ElasticModel(tiny("llama"))
    reloaded.attach(SavedAdapter.load(folder).fit(reloaded.layout, reloaded.identity))

    assert not any(".layers.0." in name for name in names)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(masked_logits(reloaded, text(), (plan, plan)), ours)


def test_every_misfit_is_named_at_once(saved):
    _, folder = saved
    tensors = load_file(folder / "routers.safetensors")
    tensors["layers.0.heads.weight"] = torch.zeros(3, 24)
    del tensors["layers.1.heads.bias"]
    tensors["layers.9.heads.bias"] = torch.zeros(4)
    tensors["layers.2.heads.bias"][0] = torch.nan
    save_file(tensors, folder / "routers.safetensors")
    _forget_hash(folder)
    header = json.loads((folder / "adapter.json").read_text())
    header["base"]["config_hash"] = "another"
    (folder / "adapter.json").write_text(json.dumps(header))

    with pytest.raises(AdapterError) as refused:
        refit(folder)
    message = str(refused.value)
    assert "config hash: saved another" in message
    assert "layers.0.heads.weight: saved (3, 24), this model has (4, 24)" in message
    assert "layers.1.heads.bias: missing" in message
    assert "layers.9.heads.bias: not a tensor of this model" in message
    assert "layers.2.heads.bias: holds a number that is not finite" in message


def test_what_is_amiss_alike_in_many_layers_stands_on_one_line(saved):
    _, folder = saved
    with pytest.raises(AdapterError) as refused:
        refit(folder, tiny("llama", hidden_size=48))
    message = str(refused.value)
    last = LAYERS - 1
    assert f"layers.{{0-{last}}}.heads.weight: saved (4, 24), this model has (4, 48)" in message
    assert len(message.splitlines()) < 40


def test_an_adapter_of_another_base_is_refused(saved):
    _, folder = saved
    with pytest.raises(AdapterError, match="config hash: saved"):
        refit(folder, tiny("qwen3"))
    with pytest.raises(AdapterError, match="revision: saved unknown"):
        refit(folder, identity=BaseIdentity("LlamaForCausalLM", "2", "x"))
    with pytest.raises(AdapterError, match="base model: saved for LlamaForCausalLM"):
        refit(folder, identity=BaseIdentity("owner/other", "unknown", "x"))


@pytest.mark.parametrize("name", ["routers.safetensors", "lora/prompt/adapter_model.safetensors"])
def test_a_file_that_is_cut_short_is_refused_by_name(saved, name):
    _, folder = saved
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match=f"{name}: cut short or altered"):
        SavedAdapter.load(folder)


def test_a_missing_or_broken_folder_is_refused_by_name(tmp_path, saved):
    _, folder = saved
    with pytest.raises(AdapterError, match="there is no such folder"):
        SavedAdapter.load(tmp_path / "nowhere")
    (folder / "adapter.json").write_text('{"format": 1,')
    with pytest.raises(AdapterError, match=r"adapter\.json: cannot be read"):
        SavedAdapter.load(folder)
    (folder / "adapter.json").write_text('{"format": 2}')
    with pytest.raises(AdapterError, match="format 2; this version reads 1"):
        SavedAdapter.load(folder)


def test_a_file_outside_the_folder_is_never_read(saved):
    _, folder = saved
    header = json.loads((folder / "adapter.json").read_text())
    header["files"]["../secret"] = "0"
    (folder / "adapter.json").write_text(json.dumps(header))
    with pytest.raises(AdapterError, match="names a file outside its folder"):
        SavedAdapter.load(folder)


def test_a_calibration_travels_with_its_adapter(tmp_path):
    model = elastic(units=[Unit.MLP_TOKENS])
    model.adapter.calibration = path_of()
    folder = model.adapter.save(tmp_path / "adapter")
    again = refit(folder)

    assert again.calibration.paths == path_of().paths
    assert "## Training record" not in (folder / "README.md").read_text()


def test_a_calibration_of_a_former_adapter_does_not_stay_in_its_folder(tmp_path):
    model = by_thresholds(elastic(units=(Unit.CHANNELS,)))
    folder = model.adapter.save(tmp_path)
    assert SavedAdapter.load(folder).calibration == model.adapter.calibration
    elastic(units=(Unit.CHANNELS,)).adapter.save(tmp_path)
    assert SavedAdapter.load(folder).calibration is None


def test_a_calibration_of_other_units_or_layers_is_a_misfit(tmp_path):
    model = elastic(units=[Unit.MLP_TOKENS])
    steps = (Step(0, "heads", 0.5), Step(LAYERS, "mlp_tokens", 0.5))
    model.adapter.calibration = Calibration(0.8, TOKENS, dict.fromkeys(Phase, steps), {}, ())
    folder = model.adapter.save(tmp_path / "adapter")
    with pytest.raises(AdapterError) as refused:
        refit(folder)
    assert "heads, which the adapter lacks" in str(refused.value)
    assert f"names layer {LAYERS}, this model has {LAYERS}" in str(refused.value)


def test_choices_that_cannot_be_are_refused_together():
    model = ElasticModel(tiny("llama"))
    with pytest.raises(AdapterError) as refused:
        model.blank_adapter([Unit.EXPERTS], experts=5, kv="some", token_gate="soft", lora_rank=0)
    for problem in ("kv: 'complete' or 'kept'", "token gate: one of", "5 do not divide 56"):
        assert problem in str(refused.value)


def _forget_hash(folder):
    """Let an altered file pass for the one that was saved."""
    import hashlib

    header = json.loads((folder / "adapter.json").read_text())
    content = (folder / "routers.safetensors").read_bytes()
    header["files"]["routers.safetensors"] = hashlib.sha256(content).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(header))
