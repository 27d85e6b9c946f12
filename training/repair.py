"""Fit the repair of prompt tokens that leave late layers: what they owe is keys and values.

    python -m training repair --base BASE --adapter DIR --data DATA --out DIR

A prompt token that leaves at some layer still owes every later layer its keys and values, made
of the residual it left with. How they differ from what they would have been is fitted here by
least squares (ridge) from a little text, for all layers to leave at together, and cut to the rank
of the pairs where that loses least: minutes, and no gradient. Writes the adapter anew into --out,
with this repair in place of the one it had; it must be calibrated again.

Shape letters: B rows   T tokens   N tokens of all rows   D width   O outputs   K rank
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastiformer import AdapterError, ElasticModel, Phase
from elastiformer.adapter import blank
from elastiformer.families import Layer, Projection
from elastiformer.lora import LoraPair
from training.data import Windows, check_window, pack, read_corpus
from training.files import DataError
from training.options import real, whole
from training.progress import track
from training.regression import low_rank

OWED = ("key", "value")
ROWS_AT_ONCE = 4
LEAST_SIZE = 1e-12  # of one half of a pair: smaller is nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--adapter", required=True, help="folder or Hub id")
    add("--data", required=True, help="text like what prompts hold")
    add("--out", type=Path, required=True, help="folder of the adapter to write")
    add("--lora-rank", type=whole(1), default=64, help="of each pair")
    add(
        "--lora-from",
        type=whole(1),
        default=None,
        help="the first layer that is repaired (default: half of them, less one)",
    )
    add("--leave-every", type=whole(1), default=2, help="layers between those fitted to leave at")
    add("--windows", type=whole(1), default=64, help="texts")
    add("--window", type=whole(2), default=256, help="tokens of a text")
    add("--ridge", type=real(above=0), default=1e-3, help="of the mean of the inputs' squares")
    add("--seed", type=int, default=0, help="of which texts")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="of the base")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    if (args.out / "adapter.json").exists():
        raise DataError(f"{args.out}: holds an adapter already; choose another --out")
    model = ElasticModel.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    assert model.adapter is not None
    if model.tokenizer is None:
        raise AdapterError(f"{args.base}: fitting needs a tokenizer")
    layers = len(model.layout.layers)
    first = max(1, layers // 2 - 1) if args.lora_from is None else args.lora_from
    if first >= layers:
        raise AdapterError(f"--lora-from {first}: below {layers}, the number of layers")
    check_window("--window", args.window, model.context)
    corpus = read_corpus(args.data, model.tokenizer)
    ids_WT = pack(corpus, model.tokenizer, args.window)
    if len(ids_WT) < args.windows:
        raise DataError(f"{args.data}: {len(ids_WT)} windows; {args.windows} are wanted")
    ids_WT = Windows(ids_WT, args.seed).take(args.windows)
    leave = tuple(range(first - 1, layers - 1, args.leave_every))
    spec = replace(
        model.adapter.spec,
        lora_rank=args.lora_rank,
        lora_parts=OWED,
        lora_phases="prompt",
        lora_first=first,
    )
    old, trained = model.adapter, dict(model.adapter.training)
    adapter = blank(spec, model.layout, model.identity)
    adapter.routers.load_state_dict(old.routers.state_dict())
    adapter.neuron_order = old.neuron_order
    moments = gather(model, ids_WT, leave, first)
    assert adapter.lora is not None
    explained = {}
    for layer in model.layout.layers[first:]:
        for path, held in layer.modules.items():
            pair = adapter.lora.pair(layer.index, path, Phase.PROMPT)
            if pair is not None:
                part = fit(pair, held, moments[layer.index], args.ridge)
                explained[f"{layer.index}.{path}"] = round(part, 4)
    adapter.training = trained | {
        "repair": {
            "fitted": "least squares, in place of any repair trained before",
            "data": Path(args.data).name,
            "data_sha256": corpus.sha256,
            "tokens": args.windows * args.window,
            "window": args.window,
            "leaving_at": list(leave),
            "rank": args.lora_rank,
            "first_layer": first,
            "ridge": args.ridge,
            "seed": args.seed,
            "versions": {name: importlib.metadata.version(name) for name in ("torch",)},
        }
    }
    adapter.save(args.out)
    return {
        "adapter": str(args.out),
        "identity": adapter.identity,
        "tokens": args.windows * args.window,
        "explained": explained,
        "seconds": round(time.monotonic() - started, 1),
    }


class Moments:
    """Sums over tokens of what one layer's projections read, and of what they should have read.

    `x`: the normed residual with which tokens left; `missing`: what it lacks of the true one.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.xx_DD = torch.zeros(width, width, device=device)
        self.missing_x_DD = torch.zeros(width, width, device=device)

    def add(self, x_ND: Tensor, missing_ND: Tensor) -> None:
        self.xx_DD += x_ND.T @ x_ND
        self.missing_x_DD += missing_ND.T @ x_ND


@torch.inference_mode()
def gather(
    model: ElasticModel, ids_WT: Tensor, leave: Sequence[int], first: int
) -> dict[int, Moments]:
    """The moments of every layer from `first` on, over all layers of `leave` before it."""
    found: dict[int, Moments] = {}
    batches = torch.split(ids_WT.to(model.device), ROWS_AT_ONCE)
    for ids_BT in track(list(batches), label="what prompt tokens owe"):
        given = residuals(model, ids_BT)
        for layer in model.layout.layers[first:]:
            moments = found.setdefault(layer.index, Moments(given[0].shape[-1], given[0].device))
            true_ND = normed(layer, given[layer.index])
            for at in leave:
                if at < layer.index:
                    x_ND = normed(layer, given[at])
                    moments.add(x_ND, true_ND - x_ND)
    return found


def residuals(model: ElasticModel, ids_BT: Tensor) -> list[Tensor]:
    """What each layer is given; without position 0, which never leaves and is like no other."""
    given: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        h_BTD = args[0] if args else kwargs["hidden_states"]
        given.append(h_BTD[:, 1:].flatten(0, 1))

    with ExitStack() as hooks:
        for module in model.base.get_submodule(model.layout.layers_path).children():
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        model.teacher(ids_BT)
    return given


def normed(layer: Layer, h_ND: Tensor) -> Tensor:
    """What a layer's keys and values are made of, where its tokens came with the residual `h`."""
    x_ND: Tensor = layer.attention_norm(h_ND)
    return x_ND.float()


@torch.no_grad()
def fit(pair: LoraPair, held: Sequence[Projection], moments: Moments, ridge: float) -> float:
    """Set a pair to the best repair of its rank; the part that it does of what a full map could."""
    rank, width = pair.a_RI.shape
    weight_OD = pair.b_OR.new_zeros(len(pair.b_OR), width)
    for projection in _owed(held):
        weight_OD[projection.start : projection.stop] = projection.weight_OI.float()
    lacking_OD = weight_OD @ moments.missing_x_DD
    a_RI, b_OR, part = low_rank(lacking_OD, moments.xx_DD, rank, ridge)
    found = len(a_RI)  # no more than there are outputs
    b_OR = b_OR / pair.scale
    # Of one size, so that one learning rate suits both where training goes on from here.
    factor_R = (b_OR.norm(dim=0) / a_RI.norm(dim=1).clamp_min(LEAST_SIZE)).sqrt()
    factor_R = factor_R.clamp_min(LEAST_SIZE)
    pair.a_RI.zero_()
    pair.b_OR.zero_()
    pair.a_RI[:found] = a_RI * factor_R[:, None]
    pair.b_OR[:, :found] = b_OR / factor_R
    return part


def _owed(held: Sequence[Projection]) -> Iterator[Projection]:
    return (projection for projection in held if projection.part in OWED)
