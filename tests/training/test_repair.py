"""The fitted repair: it gives prompt tokens back what they owe, as far as its rank allows."""

from __future__ import annotations

import json

import pytest
import torch

from elastiformer import ElasticModel, Phase, SavedAdapter, Unit
from elastiformer.adapter import blank
from tests.tiny import LAYERS, tiny
from tests.training.test_calibrate import prose
from training.__main__ import main
from training.repair import fit, gather, residuals


def repaired(model: ElasticModel, rank: int, ids_WT: torch.Tensor) -> float:
    """Fit a repair of this rank on a model; the mean part that it does of a full map's work."""
    spec = model.blank_adapter(
        [Unit.CHANNELS], lora_rank=rank, lora_parts=("key", "value"), lora_phases="prompt"
    ).spec
    adapter = blank(spec, model.layout, model.identity)
    moments = gather(model, ids_WT, leave=(0,), first=1)
    done = []
    for layer in model.layout.layers[1:]:
        for path, held in layer.modules.items():
            pair = adapter.lora.pair(layer.index, path, Phase.PROMPT)
            if pair is not None:
                done.append(fit(pair, held, moments[layer.index], 1e-3))
    model.attach(adapter)
    return sum(done) / len(done)


def text(windows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few different tokens: residuals that a small map can tell apart.
    return torch.randint(12, (windows, 32), generator=generator)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2"])
def test_what_is_owed_comes_nearer_the_higher_the_rank(family):
    model = ElasticModel(tiny(family))
    other_WT = text(6, seed=2)

    @torch.no_grad()
    def owed_wrongly() -> float:
        """How far keys and values of the last layer are from what they would have been."""
        given = residuals(model, other_WT)
        layer = model.layout.layers[-1]
        true_ND, x_ND = (layer.attention_norm(given[at]) for at in (LAYERS - 1, 0))
        error = 0.0
        for projection in (layer.key, layer.value):
            missing_NO = (true_ND - x_ND) @ projection.weight_OI.T
            lora = model.adapter.lora if model.adapter is not None else None
            if lora is not None:
                pair = lora.pair(layer.index, projection.path, Phase.PROMPT)
                missing_NO = missing_NO - pair(x_ND)[:, projection.start : projection.stop]
            error += float(missing_NO.pow(2).sum())
        return error

    wrong = [owed_wrongly()]
    parts = []
    for rank in (2, 6, 24):
        parts.append(repaired(model, rank, text(40, seed=1)))
        wrong.append(owed_wrongly())

    assert wrong == sorted(wrong, reverse=True)
    assert parts == sorted(parts) and parts[-1] <= 1 + 1e-5


def test_both_halves_of_a_fitted_pair_are_of_one_size():
    model = ElasticModel(tiny("llama"))
    repaired(model, 4, text(20, seed=1))

    for layer in model.layout.layers[1:]:
        for path in (layer.key.path, layer.value.path):
            pair = model.adapter.lora.pair(layer.index, path, Phase.PROMPT)
            torch.testing.assert_close(
                pair.a_RI.detach().norm(dim=1), pair.b_OR.detach().norm(dim=0)
            )
            assert float(pair.a_RI.detach().norm()) > 0


def test_a_full_rank_is_the_least_squares_map():
    model = ElasticModel(tiny())
    repaired(model, 24, text(40, seed=1))
    layer = model.layout.layers[2]
    moments = gather(model, text(40, seed=1), leave=(0,), first=1)[2]
    pair = model.adapter.lora.pair(2, layer.key.path, Phase.PROMPT)
    ridge = 1e-3 * moments.xx_DD.diagonal().mean() * torch.eye(24)
    lacking_OD = layer.key.weight_OI @ moments.missing_x_DD
    expected = torch.linalg.solve(moments.xx_DD + ridge, lacking_OD.T).T

    torch.testing.assert_close(pair.scale * pair.b_OR @ pair.a_RI, expected, atol=2e-3, rtol=2e-3)


@pytest.fixture
def folders(tmp_path, tiny_folder):
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    model.blank_adapter([Unit.MLP_TOKENS], lora_rank=1).save(tmp_path / "adapter")
    (tmp_path / "text.jsonl").write_text(prose())
    return tiny_folder, tmp_path


def command(folders, *more: str) -> list[str]:
    base, folder = folders
    return [
        *("repair", "--base", str(base), "--adapter", str(folder / "adapter")),
        *("--data", str(folder / "text.jsonl"), "--out", str(folder / "repaired")),
        *("--windows", "4", "--window", "64", "--lora-rank", "3", *more),
    ]


def test_the_command_keeps_the_routers_and_says_what_it_did(folders, capsys):
    assert main(command(folders, "--lora-from", "2")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = SavedAdapter.load(folders[1] / "adapter")
    after = SavedAdapter.load(folders[1] / "repaired")

    assert all(torch.equal(after.tensors[name], each) for name, each in before.tensors.items())
    assert set(after.lora) == {"prompt"}
    assert {name.split(".")[0] for name in after.lora["prompt"]} == {"2"}
    assert after.training["repair"]["tokens"] == report["tokens"] == 256
    assert set(report["explained"]) == {"2.self_attn.k_proj", "2.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--windows", "9999"), "9999 are wanted"),
        (("--lora-from", "3"), "the number of layers"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_reason(folders, capsys, more, said):
    assert main(command(folders, *more)) == 1
    assert said in capsys.readouterr().err


def test_an_adapter_is_never_overwritten(folders, capsys):
    assert main(command(folders)) == 0
    assert main(command(folders)) == 1
    assert "holds an adapter already" in capsys.readouterr().err
