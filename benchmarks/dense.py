"""Capacity 1.0 beside other engines on the same weights, type of numbers and threads.

Three kinds of work, by turns: one prompt of 512 tokens, one token at batch 1, and sixteen
prompts of mixed lengths continued together. Against Transformers' `generate` (one by one, and
padded), Transformers' continuous batching, and, where installed, vLLM and llama.cpp. With --shape
the layers of a bigger model, at capacity 0.65 too, against llama.cpp on the same weights.

Takes about `--seconds` for each kind of work and for each engine's start: some four minutes in
all on two cores with the default model.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import gguf_file, machine, models
from benchmarks.engines import Continuous, Eager, Engine, LlamaCpp, OneByOne, Ours, Vllm, installed
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.runs import STEP_TOKENS
from benchmarks.timing import Spread, take_turns
from elastiformer import DENSE, Capacity, ElasticModel
from elastiformer.weights import resolve
from training.options import real, whole

OURS, ONE_BY_ONE, PADDED = "ours, 1.0", "Transformers, one by one", "Transformers, padded"
CONTINUOUS, VLLM, LLAMA_CPP = "Transformers, continuous batching", "vLLM", "llama.cpp"
LEANER = 0.65
REQUESTS = 16
WORKS = ("prefill", "decode", "batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser, shapes=True)
    parser.add_argument("--seconds", type=real(least=0), default=60.0, help="for each kind of work")
    parser.add_argument("--least", type=whole(1), default=3, help="rounds, however long they take")
    parser.add_argument("--prompt", type=whole(16), default=512, help="tokens of the prefill")
    parser.add_argument("--tokens", type=whole(2), default=32, help="new tokens of each request")
    parser.add_argument(
        "--works",
        type=_works,
        default=WORKS,
        help=f"kinds of work, such as prefill,decode (default: {','.join(WORKS)})",
    )


def _works(text: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(text.split(",")))
    if stray := [name for name in asked if name not in WORKS]:
        raise argparse.ArgumentTypeError(f"{', '.join(stray)}: not among {', '.join(WORKS)}")
    return asked


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine at one kind of work; `seconds` is of one turn, for decoding of one token."""

    engine: str
    work: str
    seconds: Spread
    tokens_per_second: float  # generated ones; of the prefill, prompt tokens


def run(args: argparse.Namespace) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    model = models.load(args)
    models.check_context(model, args.prompt + args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        engines, absent = _engines(args, model, Path(scratch))
        ids = models.text_ids(model, args.prompt + 31 * REQUESTS)
        lengths = mixed_lengths(args.prompt // 2)
        prompts = [ids[31 * at : 31 * at + length] for at, length in enumerate(lengths)]
        measured = []
        for work in args.works:
            measured += _measure(args, work, engines, ids, prompts)
    for engine in engines.values():
        if isinstance(engine, Continuous | LlamaCpp):
            engine.close()
    return write(_report(args, model, measured, absent, lengths), args.out)


def mixed_lengths(longest: int) -> list[int]:
    """Prompts from short to long, in no order."""
    return [max(2, longest * (1 + at * 7 % REQUESTS) // REQUESTS) for at in range(REQUESTS)]


def _engines(
    args: argparse.Namespace, model: ElasticModel, scratch: Path
) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines to compare, and why some are absent."""
    engines: dict[str, Engine] = {OURS: Ours(model, DENSE)}
    if model.lowest <= LEANER:
        engines[f"ours, {LEANER:g}"] = Ours(model, Capacity(LEANER, LEANER))
    room = 2 * (REQUESTS * (args.prompt // 2 + args.tokens) + args.prompt)
    engines |= {
        ONE_BY_ONE: OneByOne(model),
        PADDED: Eager(model),
        CONTINUOUS: Continuous(model, STEP_TOKENS, room),
    }
    absent = {}
    if not installed("llama_cpp"):
        absent[LLAMA_CPP] = "not installed (llama-cpp-python)"
    elif reason := gguf_file.unfit(model):
        absent[LLAMA_CPP] = reason
    else:
        path = scratch / "model.gguf"
        gguf_file.write(model, path)
        engines[LLAMA_CPP] = LlamaCpp(path, torch.get_num_threads())
    if not installed("vllm"):
        absent[VLLM] = "not installed (vllm)"
    elif getattr(args, "shape", None):
        absent[VLLM] = "needs a model folder, and a shape has none"
    else:
        folder = resolve(args.base).path
        engines[VLLM] = Vllm(folder, model.dtype)
    return engines, absent


def _measure(
    args: argparse.Namespace,
    work: str,
    engines: Mapping[str, Engine],
    ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
) -> list[Measured]:
    prompt, short = list(ids[: args.prompt]), list(ids[: args.prompt // 4])
    jobs: dict[str, tuple[Callable[[Engine], float], int]] = {
        "prefill": (lambda engine: engine.prefill(prompt), args.prompt),
        "decode": (lambda engine: engine.decode(short, args.tokens), 1),
        "batch": (lambda engine: engine.batch(prompts, args.tokens), len(prompts) * args.tokens),
    }
    job, tokens = jobs[work]
    # A single prompt is never padded.
    names = [name for name in engines if work == "batch" or name != PADDED]
    ways = {name: partial(job, engines[name]) for name in names}
    taken = take_turns(ways, args.seconds, args.least, work)
    found = []
    for name in names:
        spread = Spread.of(taken[name])
        found.append(Measured(name, work, spread, tokens / spread.median))
    return found


# On paper.


def _report(
    args: argparse.Namespace,
    model: ElasticModel,
    measured: Sequence[Measured],
    absent: Mapping[str, str],
    lengths: Sequence[int],
) -> Report:
    titles = {
        "prefill": f"Prefill, {args.prompt} tokens",
        "decode": "Decode, batch 1",
        "batch": f"{REQUESTS} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{args.tokens} new ones each",
    }
    tables = []
    for work in args.works:
        mine = [each for each in measured if each.work == work]
        base = next(each for each in mine if each.engine == OURS)
        rows = [
            [
                each.engine,
                told(each.seconds.scaled(1000)),
                f"{each.tokens_per_second:.1f}",
                f"{each.seconds.median / base.seconds.median:.2f}",
            ]
            for each in mine
        ]
        rows += [[name, reason, "", ""] for name, reason in absent.items()]
        columns = ("engine", "ms, median [quartiles]", "tokens/s", "time over ours")
        tables.append(Table(titles[work], columns, rows))
    shape = getattr(args, "shape", None)
    return Report(
        name="dense" if not shape else f"dense-{shape}",
        title=f"Capacity 1.0 beside other engines: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "lengths": list(lengths),
            "absent": dict(absent),
        },
        results=[asdict(each) for each in measured],
        tables=tables,
        notes=(
            "The same weights, type of numbers and threads. All continue greedily; none stops "
            "early. A batch's time includes its prompts; its tokens/s count generated ones. "
            "Transformers runs uncompiled, with its own choice of attention."
        ),
        draw=lambda figure: _draw(figure, measured, {work: titles[work] for work in args.works}),
        goals=_goals(measured),
        size=(14, 3.8),
    )


def _goals(measured: Sequence[Measured]) -> list[Goal]:
    seconds = {(each.work, each.engine): each.seconds.median for each in measured}

    def over(work: str, theirs: Sequence[str], mine: str = OURS) -> float | None:
        found = [seconds[work, name] for name in theirs if (work, name) in seconds]
        if not found or (work, mine) not in seconds:
            return None
        return min(found) / seconds[work, mine]

    return [
        Goal(
            f"throughput, batch {REQUESTS}, over the best of Transformers",
            1.5,
            over("batch", (ONE_BY_ONE, PADDED, CONTINUOUS)),
        ),
        Goal("decode, batch 1, over Transformers", 1.7, over("decode", (ONE_BY_ONE,))),
        Goal("decode, batch 1, over vLLM", 1.0, over("decode", (VLLM,))),
        Goal(
            f"decode, batch 1, at {LEANER:g} over llama.cpp's dense",
            1.3,
            over("decode", (LLAMA_CPP,), f"ours, {LEANER:g}"),
        ),
    ]


def _draw(figure: Any, measured: Sequence[Measured], titles: Mapping[str, str]) -> None:
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, work in zip(axes, titles, strict=True):
        mine = [each for each in measured if each.work == work]
        colours = ["tab:blue" if each.engine.startswith("ours") else "0.7" for each in mine]
        bars = axis.barh(
            [each.engine for each in mine], [each.tokens_per_second for each in mine], color=colours
        )
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_title(textwrap.fill(titles[work], 32), fontsize="medium")
        axis.set_xlabel("tokens/s")
