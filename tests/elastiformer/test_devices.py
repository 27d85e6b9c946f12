"""What a GPU runs and a CPU can check: packing, masks, thresholds in tensors, honest timings."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from elastiformer import Chunk, ElasticModel, Site, Unit, attention, costs, dense_plan
from elastiformer.attention import Portable, Varlen
from elastiformer.costs import ROWS, SHARES, SINGLE_ROWS, compare
from elastiformer.decoding import Decoding
from elastiformer.device_allowances import DeviceAllowances
from elastiformer.packed import Packed
from elastiformer.workshop import Workshop
from tests.devices import cpu_only
from tests.elastiformer.elastic import PROMPT, TOKENS, any_plan, by_thresholds, elastic, text
from tests.elastiformer.elastic import planned as planned_sequence
from tests.tiny import LAYERS, tiny

pytestmark = cpu_only  # where all of it can be held against the host's way
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
STEPS = 5


def varlen_by_sdpa(*args: object, **named: object) -> torch.Tensor:
    """What `varlen_attn` computes, request by request; it takes what that takes."""
    bound = inspect.signature(varlen_attn).bind(*args, **named)
    bound.apply_defaults()
    asked = bound.arguments
    query_NAH, keys_SGH, values_SGH = asked["query"], asked["key"], asked["value"]
    left, right = asked["window_size"]
    assert right == 0 and query_NAH.shape[2] % 8 == 0
    assert asked["cu_seq_q"].dtype == asked["cu_seq_k"].dtype == torch.int32
    bounds = [asked[name].tolist() for name in ("cu_seq_q", "cu_seq_k")]
    for each, whole, longest in zip(
        bounds, (query_NAH, keys_SGH), (asked["max_q"], asked["max_k"]), strict=True
    ):
        counts = [b - a for a, b in pairwise(each)]
        assert each[0] == 0 and each[-1] == len(whole) and max(counts) == longest
    outs = []
    for place in range(len(bounds[0]) - 1):
        asking, held = (slice(*each[place : place + 2]) for each in bounds)
        query_AQH = query_NAH[asking].transpose(0, 1)
        queries, keys = query_AQH.shape[1], held.stop - held.start
        back_QK = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen_QK = (back_QK >= 0) & ((back_QK <= left) if left >= 0 else True)
        out_AQH = F.scaled_dot_product_attention(
            query_AQH[None],
            keys_SGH[held].transpose(0, 1)[None],
            values_SGH[held].transpose(0, 1)[None],
            attn_mask=seen_QK,
            scale=asked["scale"],
            enable_gqa=asked["enable_gqa"],
        )[0]
        outs.append(out_AQH.transpose(0, 1))
    return torch.cat(outs)


def logits_of_a_mix(model: ElasticModel) -> torch.Tensor:
    """Two that decode beside a prompt that comes in pieces."""
    dense = (dense_plan(LAYERS), dense_plan(LAYERS))
    running = [planned_sequence(model, dense, PROMPT + row, TOKENS) for row in range(3)]
    ids = [text(TOKENS, seed=row)[0].tolist() for row in range(3)]
    for row in range(2):
        model.step([Chunk(running[row], ids[row][: PROMPT + row])])
    logits = []
    for step, size in enumerate((4, 3, 4, 1)):
        chunks = [Chunk(running[row], [ids[row][PROMPT + row + step]]) for row in range(2)]
        done = running[2].length
        chunks.insert(1, Chunk(running[2], ids[2][done : done + size]))
        logits += model.step(chunks)
    return torch.cat(logits)


@pytest.mark.parametrize(("family", "head_dim"), [("llama", 16), ("mistral", 16), ("qwen3", 10)])
def test_variable_length_attention_gets_each_requests_queries_and_keys(
    family, head_dim, monkeypatch
):
    monkeypatch.setattr(Decoding, "fits", lambda self, packed: False)
    monkeypatch.setattr(Decoding, "may_run_apart", False)
    calls = []

    def noted(*args, **named):
        calls.append(args)
        return varlen_by_sdpa(*args, **named)

    monkeypatch.setattr(attention, "varlen_attn", noted)
    model = ElasticModel(tiny(family, head_dim=head_dim))
    model._sparse.workshop.backend = Portable()
    expected = logits_of_a_mix(model)
    assert not calls
    model._sparse.workshop.backend = Varlen()
    torch.testing.assert_close(logits_of_a_mix(model), expected, **CLOSE)
    steps = 2 + 4
    assert len(calls) == (steps * LAYERS if head_dim % 8 == 0 else 0)  # it takes no other heads


def test_a_mask_is_made_once_for_all_layers_of_a_step(monkeypatch):
    made, seen = [], attention._seen

    def noted(positions_Q, read, window):
        made.append(len(positions_Q))
        return seen(positions_Q, read, window)

    monkeypatch.setattr(attention, "_seen", noted)
    model = ElasticModel(tiny("llama"))
    sequence = planned_sequence(model, (dense_plan(LAYERS),) * 2, PROMPT, TOKENS)
    ids = text()[0].tolist()
    for begin, end in ((0, 4), (4, 7), (7, 15)):
        model.step([Chunk(sequence, ids[begin:end])])
    # The first chunk needs none; in the last layer a prompt's rows ask nothing.
    assert made == [3, 8] or made == [3, 8, 7], made


def decoded(model: ElasticModel, plans: list) -> tuple[torch.Tensor, list, list]:
    """Some decode steps of three requests: logits, debts, usage."""
    sequences = [planned_sequence(model, plan, PROMPT, TOKENS) for plan in plans]
    ids = [text(seed=row)[0].tolist() for row in range(len(plans))]
    for sequence, own in zip(sequences, ids, strict=True):
        model.step([Chunk(sequence, own[:PROMPT])])
    # One that owes more than it is granted: what is beyond is paid back sooner.
    sequences[1].channel_debts = np.full((LAYERS, len(Site)), 40)
    logits = []
    for step in range(PROMPT, PROMPT + STEPS):
        chunks = [Chunk(s, [own[step]]) for s, own in zip(sequences, ids, strict=True)]
        logits += model.step(chunks)
    debts = [sequence.channel_debts.tolist() for sequence in sequences]
    return torch.cat(logits), debts, [sequence.usage for sequence in sequences]


@pytest.mark.parametrize("units", [(Unit.CHANNELS,), (Unit.CHANNELS, Unit.HEADS)])
def test_on_a_device_rows_take_what_they_take_on_the_host(units, monkeypatch):
    """With heads left out, a row takes its grant and reads some sites twice."""
    model = by_thresholds(elastic("llama", units, lora_rank=0))
    for layer in model.layout.layers:
        for site in Site:
            model._sparse.workshop.at_site(layer, site).few = SINGLE_ROWS
    dense, drawn = dense_plan(LAYERS), any_plan(1, LAYERS, (Unit.CHANNELS,))
    plans = [(dense, dense), (dense, drawn), (drawn, any_plan(2, LAYERS, units))]
    expected, debts, usages = decoded(model, plans)
    assert any(any(map(any, each)) for each in debts)

    taken, take = [], DeviceAllowances.take

    def noted(self, layer, site, rows_R, *rest):
        taken.append(len(rows_R))
        return take(self, layer, site, rows_R, *rest)

    monkeypatch.setattr(DeviceAllowances, "take", noted)
    monkeypatch.setattr(Workshop, "takes_on_device", True)
    found, device_debts, device_usages = decoded(model, plans)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert device_debts == debts and device_usages == usages
    assert len(taken) >= STEPS * LAYERS * len(Site)


def test_no_layer_brings_what_rows_take_to_the_host(monkeypatch):
    """Only what a step ends with does: one copy, whatever the number of layers."""
    model = by_thresholds(elastic("llama", (Unit.CHANNELS,), lora_rank=0))
    drawn = any_plan(1, LAYERS, (Unit.CHANNELS,))
    sequences = [planned_sequence(model, (drawn, drawn), 1, TOKENS) for _ in range(3)]
    model.step([Chunk(sequence, [5]) for sequence in sequences])
    workshop = model._sparse.workshop
    packed = Packed([Chunk(sequence, [6]) for sequence in sequences], model.device)
    for layer in model.layout.layers:
        for site in Site:
            workshop.at_site(layer, site).few = SINGLE_ROWS
    monkeypatch.setattr(Workshop, "takes_on_device", True)
    packed.allowances = workshop.allowances(packed)
    copies = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *args, name=name, method=method: (copies.append(name), method(*args))[1],
        )
    layer = model.layout.layers[0]
    x_RI = torch.randn(3, len(model.layout.column_norms(layer, Site.MLP_IN)))
    reading = workshop.picked(layer, Site.MLP_IN, x_RI, packed, packed.everything)
    assert reading.only_RI.shape == x_RI.shape
    assert copies == []
    packed.allowances.settle()
    assert copies == ["cpu", "numpy"]


def test_a_product_is_timed_until_it_has_run(monkeypatch):
    """A device returns at once: what by row takes shows only when it has finished."""
    seconds, waiting = [0.0], [0.0]
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def by_row(share: float, rows: int) -> None:
        waiting[0] += 0.003

    def at_once(share: float, rows: int) -> None:
        seconds[0] += 0.0005  # its launch takes longer

    def finish() -> None:
        seconds[0] += waiting[0]
        waiting[0] = 0.0

    assert compare(by_row, at_once, 0.01).most == (ROWS[-1],) * len(SHARES)
    assert compare(by_row, at_once, 0.01, finish=finish).most == (0,) * len(SHARES)
