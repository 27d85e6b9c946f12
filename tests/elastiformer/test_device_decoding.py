"""Decode steps as a GPU runs them: the same answers, channels and debts as layer by layer.

On a CPU Triton's interpreter runs the kernels one by one; on a GPU (`ELASTI_TEST_DEVICE=cuda`) they
are compiled and captured.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastiformer import Chunk, ElasticModel, Site, Unit, dense_plan
from elastiformer.decoding import Decoding
from elastiformer.pointwise import CompiledNorm, RootMeanSquare
from elastiformer.workshop import SITES, Workshop
from tests.devices import DEVICE
from tests.elastiformer.elastic import PROMPT, TOKENS, any_plan, by_thresholds, elastic, text
from tests.elastiformer.elastic import planned as planned_sequence
from tests.tiny import LAYERS, tiny

pytest.importorskip("triton", exc_type=ImportError)
device_decoding = pytest.importorskip("elastiformer.device_decoding")
Tile = device_decoding.Tile

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
STEPS = 3
KNOWN = ("llama", "qwen2", "phi3")  # families whose layers the kernels know


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    monkeypatch.setattr(Workshop, "takes_on_device", True)


def as_elsewhere(norm):
    """The form that a norm has on other devices than a CPU."""
    if isinstance(norm, CompiledNorm):
        return RootMeanSquare(torch.from_numpy(norm.scale_D), norm.epsilon)
    return norm


def on_device(model: ElasticModel, few: float) -> ElasticModel:
    """The model, its decode steps by these kernels.

    Args:
        few: up to this share kept a lone row reads only that of the weights.
    """
    form = model._sparse
    for norms in (form.workshop.attention_norms, form.workshop.mlp_norms):
        norms[:] = map(as_elsewhere, norms)
    form._decoding = device_decoding.DeviceDecoding(form.workshop)
    form._decoding.lone = {site: (few, Tile(16, 32, 8, 1)) for site in SITES}
    return model


class Layers(Decoding):
    """Leaves every step to the layers."""

    may_run_apart = False

    def fits(self, packed):
        return False


def layer_by_layer(model: ElasticModel) -> ElasticModel:
    form = model._sparse
    form._decoding = Layers(form.workshop)
    form.workshop.marks_picks = True
    return model


def decoded(model: ElasticModel, plans: list, kv=None) -> tuple[torch.Tensor, list, list]:
    """Some decode steps of several requests: logits, debts, usage."""
    sequences = [
        planned_sequence(model, plan, PROMPT - row, TOKENS) for row, plan in enumerate(plans)
    ]
    ids = [text(seed=row)[0].tolist() for row in range(len(plans))]
    for row, (sequence, own) in enumerate(zip(sequences, ids, strict=True)):
        # The last token by itself either way: what it attends to is counted by chunk.
        model.step([Chunk(sequence, own[: PROMPT - row - 1])])
        model.step([Chunk(sequence, [own[PROMPT - row - 1]])])
    if len(sequences) > 1:  # one that owes more than it is granted
        sequences[1].channel_debts = np.full((LAYERS, len(Site)), 40)
    logits = []
    for step in range(STEPS):
        chunks = [
            Chunk(sequence, [own[PROMPT - row + step]])
            for row, (sequence, own) in enumerate(zip(sequences, ids, strict=True))
        ]
        logits += model.step(chunks)
    debts = [
        None if sequence.channel_debts is None else sequence.channel_debts.tolist()
        for sequence in sequences
    ]
    usages = [sequence.usage for sequence in sequences]
    for sequence in sequences:
        sequence.release()
    return torch.cat(logits), debts, usages


def counted(monkeypatch) -> list[int]:
    """The rows of each step that these kernels ran."""
    ran, run = [], device_decoding.DeviceDecoding.run

    def noted(self, h_ND, *rest):
        ran.append(len(h_ND))
        run(self, h_ND, *rest)

    monkeypatch.setattr(device_decoding.DeviceDecoding, "run", noted)
    return ran


@pytest.mark.parametrize(("family", "rows"), [("llama", 1), *((family, 3) for family in KNOWN)])
def test_at_full_capacity_it_is_the_base(family, rows, monkeypatch):
    ran = counted(monkeypatch)
    model = ElasticModel(tiny(family).to(DEVICE))
    teacher = [model.teacher(text(seed=row).to(DEVICE))[0] for row in range(rows)]
    found, _, _ = decoded(on_device(model, 1.0), [(dense_plan(LAYERS),) * 2] * rows)
    expected = torch.stack(
        [teacher[row][PROMPT - row + step] for step in range(STEPS) for row in range(rows)]
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert ran[-STEPS:] == [rows] * STEPS
    assert (
        ElasticModel(model.base).teacher(text().to(DEVICE)).equal(model.teacher(text().to(DEVICE)))
    )


@pytest.mark.parametrize(("rows", "few"), [(1, 0.0), (1, 1.0), (3, 0.0)])
def test_rows_take_what_they_take_layer_by_layer(rows, few, monkeypatch):
    ran = counted(monkeypatch)
    model = by_thresholds(elastic("llama", (Unit.CHANNELS,), lora_rank=0))
    dense = dense_plan(LAYERS)
    drawn = [any_plan(seed, LAYERS, (Unit.CHANNELS,)) for seed in range(rows)]
    plans = [(dense, drawn[0]), *((dense, dense if row % 2 else drawn[row]) for row in range(rows))]
    plans = plans[:rows]
    expected, debts, usages = decoded(layer_by_layer(model), plans)
    assert not ran
    found, own_debts, own_usages = decoded(on_device(model, few), plans)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert own_debts == debts and own_usages == usages
    assert any(each is not None and np.any(each) for each in debts)
    assert ran[-STEPS:] == [rows] * STEPS


def test_rows_that_only_the_layers_know_are_theirs(monkeypatch):
    """Those that leave heads out, or are repaired; and families with other norms."""
    ran = counted(monkeypatch)
    dense = dense_plan(LAYERS)
    by_head = by_thresholds(elastic("llama", (Unit.CHANNELS, Unit.HEADS), lora_rank=0))
    decoded(on_device(by_head, 1.0), [(dense, any_plan(2, LAYERS, (Unit.HEADS,)))])
    for family in ("gpt2", "gemma2", "qwen3"):
        decoded(on_device(ElasticModel(tiny(family).to(DEVICE)), 1.0), [(dense, dense)])
    assert not ran


def test_weights_lie_once_in_memory():
    model = on_device(ElasticModel(tiny("llama").to(DEVICE)), 1.0)
    decoded(model, [(dense_plan(LAYERS),) * 2])
    workshop = model._sparse.workshop
    for layer in model.layout.layers:
        for site in SITES:
            product = workshop.at_site(layer, site)
            lies = product.weight_IO.untyped_storage().data_ptr()
            for projection in product.projections:
                assert projection.weight_OI.untyped_storage().data_ptr() == lies
