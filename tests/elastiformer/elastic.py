"""Tiny elastic models whose routers have opinions, and plans that differ in every layer."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import replace

import torch
from torch import Tensor

from elastiformer import (
    Adapter,
    Calibration,
    Chunk,
    ElasticModel,
    LayerPlan,
    Phase,
    Plan,
    Sequence,
    Site,
    Step,
    Unit,
)
from elastiformer.capacity import DENSE
from tests.devices import DEVICE
from tests.tiny import LAYERS, VOCAB, tiny
from training.channel_sizes import channel_quantiles

TOKENS, PROMPT = 23, 9
EXPERTS = 7
EVERY_UNIT = tuple(unit for unit in Unit if unit is not Unit.IMAGE_TOKENS)  # of the layers


def text(tokens: int = TOKENS, seed: int = 3) -> Tensor:
    """Token ids [1, tokens]."""
    drawn = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE)


def elastic(
    family: str = "llama",
    units: Many[Unit] = EVERY_UNIT,
    layers: int = LAYERS,
    **choices: object,
) -> ElasticModel:
    """A tiny model with an untrained, shaken adapter: no score is near another."""
    changes = {} if layers == LAYERS else {"num_hidden_layers": layers}
    model = ElasticModel(tiny(family, **changes))
    settings = {"experts": EXPERTS, "lora_rank": 2, "calibration_ids": text(), **choices}
    adapter: Adapter = model.blank_adapter(units, **settings)  # type: ignore[arg-type]
    shaken = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=shaken).to(parameter.device)
    model.attach(adapter)
    return model


def by_thresholds(model: ElasticModel) -> ElasticModel:
    """The same model, whose outputs take channels by thresholds; not quite the right ones."""
    assert model.adapter is not None
    calibration = model.adapter.calibration
    if calibration is None:
        path = tuple(Step(layer, site.value, 0.5) for layer in range(LAYERS) for site in Site)
        calibration = Calibration(
            0.7, TOKENS, dict.fromkeys(Phase, path), {phase: {} for phase in Phase}, ()
        )
    quantiles = channel_quantiles(model, calibration, text(60, seed=8))
    off = tuple(
        tuple(tuple(1.1 * size for size in of_site) for of_site in of_layer)
        for of_layer in quantiles
    )
    model.adapter.calibration = replace(calibration, channel_quantiles=off)
    model.attach(model.adapter)
    return model


def any_plan(seed: int, layers: int, units: Many[Unit] = EVERY_UNIT) -> Plan:
    """A plan drawn at random, another one in each layer."""
    draw = random.Random(seed)
    plan = []
    for _ in range(layers):
        shares: dict[str, float] = {}
        for unit in units:
            if unit in (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS):
                shares[unit] = draw.choice((0.0, 0.5, 0.7, 1.0))
            elif unit is Unit.CHANNELS:
                shares |= {site.value: draw.choice((0.4, 0.6, 1.0)) for site in Site}
            else:
                shares[unit] = draw.choice((0.3, 0.5, 0.75, 1.0))
        plan.append(LayerPlan(**shares))
    return tuple(plan)


def planned(model: ElasticModel, plans: tuple[Plan, Plan], prompt: int, most: int) -> Sequence:
    """A sequence that runs under the given (prompt plan, output plan), whatever its capacity."""
    sequence = model.sequence(DENSE, prompt, most)
    priced = [
        model._planner.pricing[phase].of(plan) for phase, plan in zip(Phase, plans, strict=True)
    ]
    sequence._plan_at = lambda phase, position: priced[phase is Phase.OUTPUT]
    return sequence


def cut(ids: Many[int], *sizes: int) -> list[list[int]]:
    """`ids` in pieces of the given sizes, and then one by one."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(list(ids[start : start + size]))
        start += size
    return pieces + [[token] for token in ids[start:]]


def run(model: ElasticModel, sequence: Sequence, pieces: Many[Many[int]]) -> Tensor:
    """The logits of one sequence alone, chunk after chunk, [output rows, vocabulary]."""
    return torch.cat([model.step([Chunk(sequence, list(piece))])[0] for piece in pieces])


def masked_logits(model: ElasticModel, ids_BT: Tensor, plans: tuple[Plan, Plan]) -> Tensor:
    """The output rows of the masked form over the whole text, [output rows, vocabulary]."""
    output_BT = torch.arange(ids_BT.shape[1], device=DEVICE)[None] >= PROMPT - 1
    with torch.no_grad():
        return model.masked(ids_BT, [plans], output_BT).logits_BTV[0, PROMPT - 1 :]
