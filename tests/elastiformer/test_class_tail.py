"""Late layers of class tokens, each in one compiled call: as its operators one by one."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import DENSE, amx, kernels, tail_kernels
from elastiformer.blocks import blocks_of
from elastiformer.class_kernels import NORMED
from elastiformer.class_tail import ClassTail
from elastiformer.encoder import ElasticEncoder
from elastiformer.sequence import WholeSequence
from elastiformer.tail_kernels import Items
from tests.elastiformer.test_direct_reading import FAMILIES, leaving, ours_or_keys, without_keys
from tests.elastiformer.test_encoders import EVERY_UNIT, items, stepped
from tests.tiny_encoders import LAYERS, tiny_encoder

NEAR = 0.04  # of what is largest: bfloat16, rounded at other places; float32 is as far from both

needs_tiles = pytest.mark.skipif(not amx.ABLE, reason="no tile registers (AMX) here")


def small_encoder(family: str, lora_rank: int = 2) -> ElasticEncoder:
    """As `elastic_encoder`, in bfloat16."""
    model = ElasticEncoder(tiny_encoder(family).to(torch.bfloat16))
    width = model.layout.layers[0].shape.mlp_width
    sample = model.collate(items(model, (20, 20)))
    settings = {"experts": width // 8, "lora_rank": lora_rank, "calibration_ids": sample}
    adapter = model.blank_adapter(EVERY_UNIT, **settings)
    shaken = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=shaken)
    model.attach(adapter)
    return model


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassTail, "calls", lambda *_: None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many class tokens each call ran."""
    found: list[int] = []
    run = tail_kernels.run

    def noted(h_QD: np.ndarray, *rest: object) -> None:
        found.append(len(h_QD))
        run(h_QD, *rest)

    monkeypatch.setattr(tail_kernels, "run", noted)
    return found


@needs_tiles
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("first", [1, LAYERS - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_one_call_is_its_operators_one_by_one(
    family, first, lora_rank, ran, monkeypatch
):
    """Repaired or not, of all lengths; beside items with keys and repairs of their own as well."""
    model, prompts = small_encoder(family, lora_rank), leaving(first)
    given = items(model, (9, 17, 4, 30))

    def both() -> list[list[torch.Tensor]]:
        ours = stepped(model, *(without_keys(model, each, prompts) for each in given))
        alike = (without_keys(model, given[0], leaving(2)), model.sequence(DENSE, given[1]))
        mixed = [ours_or_keys(model, prompts, *each) for each in enumerate(given)]
        return [ours, stepped(model, *alike), stepped(model, *mixed)]

    actual = both()
    assert ran.count(len(given) * model._outputs) == LAYERS - first
    ran.clear()
    one_by_one(monkeypatch)
    expected = both()

    assert not ran
    for ours, wanted in zip(chain(*actual), chain(*expected), strict=True):
        assert (ours - wanted).abs().max() <= NEAR * max(wanted.abs().max(), 1)


@needs_tiles
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_items_enter_one_after_the_other_and_each_gets_and_spends_what_it_does_alone(
    family, lora_rank, ran
):
    model = small_encoder(family, lora_rank)
    given = items(model, (9, 17, 4, 30, 12, 7))
    firsts = (2, 1, None, 2, 1, None)  # the last layers of whole items are direct, too

    def request(at: int) -> WholeSequence:
        if firsts[at] is None:
            return model.sequence(DENSE, given[at])
        return without_keys(model, given[at], leaving(firsts[at]))

    together, alone = ([request(at) for at in range(len(given))] for _ in range(2))
    expected = [stepped(model, each)[0] for each in alone]
    ran.clear()
    actual = stepped(model, *together)

    last = 6 if LAYERS - 1 in model.shape.absorbing else 4
    assert [count // model._outputs for count in ran] == [2, last]
    for ours, wanted in zip(actual, expected, strict=True):
        assert (ours - wanted).abs().max() <= NEAR * max(wanted.abs().max(), 1)
    for ours, wanted in zip(together, alone, strict=True):
        assert ours.usage == wanted.usage


@needs_tiles
@pytest.mark.parametrize("family", ["bert", "deit"])
def test_a_layer_gives_an_item_the_same_bits_whoever_else_is_there(family):
    model = small_encoder(family, lora_rank=0)
    layer, each = model.layout.layers[1], model._outputs
    weights = model._sparse._tail._weights.of(layer, (None,))
    lengths = [5, 9, 3, 40] * 12  # more than one thread multiplies at a time
    read_C = np.concatenate([[0], np.cumsum(lengths)])
    ask_C = each * np.arange(len(lengths) + 1)
    row_Q = (read_C[:-1, None] + np.arange(each)).reshape(-1)
    h_ND = torch.randn(int(read_C[-1]), layer.shape.width)

    def run(first: int, end: int, threads: int) -> np.ndarray:
        rows = slice(read_C[first], read_C[end])
        mine = slice(each * first, each * end)
        own_QD = h_ND.numpy()[row_Q[mine]]
        begin = read_C[first]
        own = Items(row_Q[mine] - begin, ask_C[: end - first + 1], read_C[first : end + 1] - begin)
        x_ND = tail_kernels.room_for(h_ND[rows])
        tail_kernels.bring(h_ND[rows], NORMED, x_ND)
        side_N = np.zeros(len(x_ND), dtype=np.uint8)
        tail_kernels.run(own_QD, x_ND, side_N, own, weights, threads, True)
        return own_QD

    kernels.use_threads()
    together = run(0, len(lengths), 2)
    assert np.isfinite(together).all()
    assert np.array_equal(together, run(0, len(lengths), 1))
    for first, end in ((0, 1), (3, 5), (20, 48)):
        alone = run(first, end, 1)
        assert np.array_equal(alone, together[each * first : each * end])


@needs_tiles
@pytest.mark.parametrize(
    ("form", "activation"),
    [
        (tail_kernels.GELU, F.gelu),
        (tail_kernels.GELU_TANH, lambda x: F.gelu(x, approximate="tanh")),
        (tail_kernels.QUICK_GELU, lambda x: x * torch.sigmoid(1.702 * x)),
        (tail_kernels.RELU, F.relu),
    ],
)
def test_activations_are_pytorchs(form, activation):
    x_I = torch.linspace(-12, 12, 999)
    expected_I = activation(x_I + 0.25).bfloat16().float()
    small_I = np.empty(999, dtype=np.uint16)
    bias_I = np.full(999, 0.25, dtype=np.float32)
    tail_kernels._activate(form, x_I.clone().numpy(), bias_I, small_I)
    actual_I = torch.from_numpy(small_I).view(torch.bfloat16).float()
    torch.testing.assert_close(actual_I, expected_I, rtol=2**-7, atol=2e-6)


def test_a_weight_in_blocks_is_all_there_and_zero_behind_it():
    weight_EOI = torch.randn(2, 33, 40).bfloat16()
    blocks = blocks_of(weight_EOI, torch.arange(66.0))
    assert (blocks.groups, blocks.blocks, len(blocks.bias_O)) == (2, 2, 66)
    cut = torch.from_numpy(blocks.weight_).view(torch.bfloat16).view(2, 2, 2, 2, 16, 16, 2)
    whole = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    whole[:, :33, :40] = weight_EOI
    for e, o, i in ((0, 0, 0), (1, 32, 39), (0, 17, 33), (1, 40, 5), (1, 3, 63)):
        place = (e, o // 32, i // 32, o % 32 // 16, i % 32 // 2, o % 16, i % 2)
        assert cut[place] == whole[e, o, i]


@needs_tiles
def test_what_the_call_does_not_know_runs_one_by_one(ran):
    model = small_encoder("vit", lora_rank=0)
    (given,) = items(model, (9,))
    with FlopCounterMode(display=False):  # somebody counts operators
        counted = stepped(model, without_keys(model, given, leaving(1)))
    assert not ran
    stepped(model, without_keys(model, given, leaving(1)))
    assert ran
    ran.clear()
    for layer in model.layout.layers:
        layer.mlp.activation_fn = nn.Mish()
    other = ElasticEncoder(model.base)
    assert isinstance(other.layout.layers[0].activation, nn.Mish)
    unlike = stepped(other, without_keys(other, given, leaving(1)))
    assert not ran
    assert not torch.equal(unlike[0], counted[0])


def test_in_float32_layers_run_one_by_one(ran):
    model = ElasticEncoder(tiny_encoder("bert"))
    stepped(model, *(without_keys(model, each, leaving(1)) for each in items(model)))
    assert not ran
