"""How much a fitted repair is worth by its rank: the table from which to choose one.

    python -m training ranks --base BASE --data DATA --held-out TEXT --out DIR

Prompt tokens leave whole late layers, from each of --leave-at on, and the continuation is whole.
Its KL is measured without a repair and with one of each rank, fitted as `repair` fits it: to that
one layer to leave at, and to all of them together. Writes ranks.json and ranks.md into --out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer import AdapterError, ElasticModel, Phase
from elastiformer.adapter import AdapterSpec, blank
from training.allotment import without_layers
from training.data import check_window, some_windows, tokenizer_of
from training.files import write_atomically, write_json
from training.options import real, whole
from training.progress import track
from training.quality import copied
from training.repair import OWED, ROWS_AT_ONCE, Moments, fit, normed, residuals
from training.sensitivity import Meter

ONE, ALL = "one layer", "all"


@dataclass(frozen=True, slots=True)
class Row:
    """What the continuation loses when prompts leave from one layer on; nats per token."""

    leaving_at: int
    rank: int  # 0: no repair
    fitted: str  # to "one layer" to leave at, or to "all"
    kl: float
    kl_copied: float  # where the continuation repeats the prompt's beginning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--data", required=True, help="text to fit to")
    add("--held-out", required=True, help="other text, to measure on")
    add("--out", required=True, type=Path, help="folder of the table")
    add("--leave-at", type=numbers, required=True, help="layers, comma-separated")
    add("--ranks", type=numbers, default=[8, 32, 64], help="comma-separated")
    add("--windows", type=whole(1), default=64, help="texts to fit to")
    add("--window", type=whole(2), default=256, help="tokens of a text to fit to")
    add("--held-out-windows", type=whole(1), default=6, help="texts to measure on")
    add("--held-out-window", type=whole(3), default=192, help="tokens of a text to measure on")
    add("--ridge", type=real(above=0), default=1e-3, help="of the mean of the inputs' squares")
    add("--seed", type=int, default=0, help="of which texts")
    add("--device", default="auto")


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers of at least 1, each once."""
    return list(dict.fromkeys(whole(1)(part) for part in text.split(",")))


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    model = ElasticModel.load(args.base, dtype="float32", device=args.device)
    layers = len(model.layout.layers)
    if max(args.leave_at) >= layers - 1:
        raise AdapterError(
            f"--leave-at {max(args.leave_at)}: below {layers - 1}, the last layer, where nothing "
            "is owed to a later one"
        )
    check_window("--window", args.window, model.context)
    check_window("--held-out-window", args.held_out_window, model.context)
    fit_WT, check_WT = (
        some_windows(source, tokenizer_of(model), count, tokens, args.seed)[0]
        for source, count, tokens in (
            (args.data, args.windows, args.window),
            (args.held_out, args.held_out_windows, args.held_out_window),
        )
    )
    owed = gather_each(model, fit_WT, args.leave_at)
    prompt_tokens = check_WT.shape[1] * 2 // 3
    meters = [
        Meter(model, ids_WT, prompt_tokens)
        for ids_WT in (check_WT, copied(check_WT, prompt_tokens))
    ]
    cases = [
        (rank, at, which) for rank in args.ranks for which in (ONE, ALL) for at in args.leave_at
    ]
    rows = [measured(meters, at, 0, ONE, layers) for at in args.leave_at]
    for rank, at, which in track(cases, label="ranks"):
        attach(model, owed, [at] if which == ONE else args.leave_at, rank, args.ridge)
        rows.append(measured(meters, at, rank, which, layers))
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "base": model.identity.id,
        "fitted_to": {"name": Path(args.data).name, "tokens": fit_WT.numel()},
        "measured_on": {
            "name": Path(args.held_out).name,
            "windows": len(check_WT),
            "window_tokens": check_WT.shape[1],
            "prompt_tokens": prompt_tokens,
        },
        "ridge": args.ridge,
        "seed": args.seed,
    }
    write_atomically(args.out / "ranks.md", markdown(about, rows).encode())
    write_json(args.out / "ranks.json", about | {"rows": [asdict(row) for row in rows]})
    return about | {"out": str(args.out), "seconds": round(time.monotonic() - started, 1)}


@torch.inference_mode()
def gather_each(
    model: ElasticModel, ids_WT: Tensor, leave_at: Sequence[int]
) -> dict[tuple[int, int], Moments]:
    """The moments of each (layer to leave at, later layer), of one forward of the base."""
    found: dict[tuple[int, int], Moments] = {}
    for ids_BT in track(list(torch.split(ids_WT.to(model.device), ROWS_AT_ONCE)), label="fitting"):
        given = residuals(model, ids_BT)
        for at in leave_at:
            for layer in model.layout.layers[at + 1 :]:
                x_ND = normed(layer, given[at])
                missing_ND = normed(layer, given[layer.index]) - x_ND
                blank_one = Moments(x_ND.shape[-1], x_ND.device)
                found.setdefault((at, layer.index), blank_one).add(x_ND, missing_ND)
    return found


def attach(
    model: ElasticModel,
    owed: dict[tuple[int, int], Moments],
    leave_at: Sequence[int],
    rank: int,
    ridge: float,
) -> None:
    """Give the model a repair fitted to these layers to leave at."""
    first = min(leave_at) + 1
    spec = AdapterSpec(
        units=(), lora_rank=rank, lora_parts=OWED, lora_phases="prompt", lora_first=first
    )
    adapter = blank(spec, model.layout, model.identity)
    assert adapter.lora is not None
    for layer in model.layout.layers[first:]:
        moments = total(owed[at, layer.index] for at in leave_at if at < layer.index)
        for path, held in layer.modules.items():
            pair = adapter.lora.pair(layer.index, path, Phase.PROMPT)
            if pair is not None:
                fit(pair, held, moments, ridge)
    model.attach(adapter)


def total(each: Iterable[Moments]) -> Moments:
    """The moments of all tokens of several."""
    first, *others = each
    found = Moments(len(first.xx_DD), first.xx_DD.device)
    for moments in (first, *others):
        found.xx_DD += moments.xx_DD
        found.missing_x_DD += moments.missing_x_DD
    return found


def measured(meters: Sequence[Meter], at: int, rank: int, fitted: str, layers: int) -> Row:
    kl, kl_copied = (meter.kl(Phase.PROMPT, without_layers(at, layers), at) for meter in meters)
    return Row(at, rank, fitted, kl, kl_copied)


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    fitted, on = about["fitted_to"], about["measured_on"]
    lines = [
        f"# A fitted repair for prompts of {about['base']}, by its rank",
        "",
        f"Fitted to {fitted['tokens']} tokens of {fitted['name']}; measured on {on['windows']} "
        f"windows of {on['window_tokens']} tokens of {on['name']}, {on['prompt_tokens']} of them "
        "prompt. KL of the continuation in nats per token, of text as it is / where it repeats "
        f"the prompt's beginning. Seed {about['seed']}.",
        "",
    ]
    columns = list(dict.fromkeys((row.rank, row.fitted) for row in rows))
    heads = [f"rank {rank}, {which}" if rank else "no repair" for rank, which in columns]
    lines += ["| leaving at | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for at in dict.fromkeys(row.leaving_at for row in rows):
        found = {(row.rank, row.fitted): row for row in rows if row.leaving_at == at}
        cells = [f"{found[key].kl:.4f} / {found[key].kl_copied:.4f}" for key in columns]
        lines.append(f"| {at} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
