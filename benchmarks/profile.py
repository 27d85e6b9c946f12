"""Where a step's time goes, dense and at 0.65: of decoding, of a prompt, of texts.

PyTorch's profiler sees every operator, and here our compiled kernels, too; each belongs to one
family: whole layers in one call, products, picking and gathering, attention, norms and elementwise,
the rest. What none of them accounts for is Python and dispatch. The profiler slows a step down,
most of all between operators, so the same steps are timed without it as well, and Python is what
that time leaves when the operators are taken off. Decode steps that are one call for whole layers
say nothing of what is in it: `--works parts` runs the same steps part by part.

Takes about half a minute on two cores with the default model and the default works.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiled

from benchmarks import machine, models
from benchmarks.results import Report, Table, write
from benchmarks.runs import Decoding
from benchmarks.saving import TEXT_TOKENS, TEXTS, batches
from benchmarks.timing import Spread
from benchmarks.works import Texts
from elastiformer import (
    Capacity,
    ElasticModel,
    allowances,
    amx,
    attention,
    decoding,
    lanes,
    largest,
    many_queries,
    pairs,
    readings,
    row_kernels,
    sub_layers,
    whole_requests,
)
from training.options import whole
from training.progress import track

CAPACITIES = (1.0, 0.65)
BATCHES = (1, 16)
WARM_UP = 3
WORKS = ("decode", "parts", "prefill", "classification", "scoring")
PYTHON = "Python and dispatch"
OTHER = "other operators"
# The first pattern that an operator's name meets says where it belongs.
FAMILIES = {
    "whole layers in one call": r"^kernel: run$",
    "attention": r"attention|softmax|varlen|kernel: attend",
    "products": r"multiply|mm|linear|matmul|embedding_bag|einsum|conv|dot|sparse",
    "picking and gathering": r"kernel: (take|search|keep_largest|round_picked)|topk|sort|index"
    r"|gather|scatter|select|nonzero|where|masked|take|embedding|unique|searchsorted|bucketize|cumsum|max|min",
    "compiled": r"compiled|inductor|triton|graph",
    "norms and elementwise": r"kernel: (gate|turn)|norm|add|mul|sub|div|neg|pow|sqrt|mean|sum|silu"
    r"|gelu|sigmoid|tanh|cat|copy|fill|zero|abs|cos|sin|exp|eq|ne|le|lt|ge|gt|bitwise|logical|clone|_to|ones",
}


# Where callers look each kernel up.
KERNELS: tuple[tuple[ModuleType, str], ...] = (
    (sub_layers, "run"),
    (lanes, "multiply"),
    (amx, "multiply"),
    (pairs, "round_picked"),
    (allowances, "take"),
    (largest, "search"),
    (readings, "keep_largest"),
    (row_kernels, "normalise"),
    (row_kernels, "gate"),
    (row_kernels, "turn"),
    (row_kernels, "add"),
    (attention, "attend"),
    (many_queries, "attend"),
    (whole_requests, "attend"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser, shapes=True)
    parser.add_argument(
        "--capacity",
        type=models.capacity_argument,
        action="append",
        metavar="JSON",
        help=f"repeatable (default: {', '.join(map(str, CAPACITIES))})",
    )
    parser.add_argument(
        "--works",
        type=works,
        default=("decode",),
        metavar="LIST",
        help=f"of {', '.join(WORKS)} (default: decode)",
    )
    parser.add_argument("--batches", type=batches, default=BATCHES, help="of decoding")
    parser.add_argument("--prompt", type=whole(2), default=512, help="tokens of a prefill")
    parser.add_argument("--context", type=whole(2), default=128, help="tokens before decoding")
    parser.add_argument("--steps", type=whole(1), default=30, help="of each kind, timed and seen")


def works(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if strange := [name for name in found if name not in WORKS]:
        raise argparse.ArgumentTypeError(f"works: of {', '.join(WORKS)}; got {', '.join(strange)}")
    return found


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator's part of a step."""

    name: str
    family: str
    milliseconds: float
    calls: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One step at one capacity and batch, in milliseconds."""

    work: str
    capacity: object
    rows: int  # that decode; 0 where none do
    step: Spread  # without the profiler
    profiled_step: float  # median, with it
    families: dict[str, float]  # the parts of the step without the profiler
    operators: tuple[Operator, ...]  # the dearest ones


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = models.load(args)
    default = [Capacity(share, share) for share in CAPACITIES]
    capacities = list(dict.fromkeys(args.capacity or default))
    needed = max(args.context + 37 * max(args.batches) + 256, args.prompt, TEXTS * TEXT_TOKENS)
    ids = models.text_ids(model, needed)
    cases = [
        (work, capacity, rows)
        for work in args.works
        for capacity in capacities
        for rows in (args.batches if work in ("decode", "parts") else (0,))
    ]
    measured = [_measure(args, model, ids, *case) for case in track(cases, label="profile")]
    return write(_report(args, model, measured), args.out)


def family_of(operator: str) -> str:
    name = operator.removeprefix("aten::").lower()
    for family, pattern in FAMILIES.items():
        if re.search(pattern, name):
            return family
    return OTHER


def _measure(
    args: argparse.Namespace,
    model: ElasticModel,
    ids: list[int],
    work: str,
    capacity: Capacity,
    rows: int,
) -> Measured:
    if rows:
        most = WARM_UP + 2 * args.steps
        running = Decoding(model, capacity, ids, rows, args.context, most)
        with part_by_part() if work == "parts" else nullcontext():
            found = _seen(args, model, work, capacity, rows, lambda: running.step(rows))
        running.release()
        return found
    texts = [ids[: args.prompt]]
    if work != "prefill":
        texts = [ids[at * TEXT_TOKENS : (at + 1) * TEXT_TOKENS] for at in range(TEXTS)]
    label = ids[-1] if work == "classification" else None
    of_texts = Texts(work, model, texts, scored=work == "scoring", label=label)
    return _seen(args, model, work, capacity, rows, lambda: of_texts.turn(capacity))


@contextmanager
def part_by_part() -> Iterator[None]:
    """For a while no decode step is one call for whole layers."""
    fits = decoding.Decoding.fits
    decoding.Decoding.fits = lambda self, packed: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        decoding.Decoding.fits = fits  # type: ignore[method-assign]


def _seen(
    args: argparse.Namespace,
    model: ElasticModel,
    work: str,
    capacity: Capacity,
    rows: int,
    step: Callable[[], float],
) -> Measured:
    for _ in range(WARM_UP):
        step()
    plain = Spread.of([step() for _ in range(args.steps)]).scaled(1000)
    on_gpu = model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with kernels_seen(), profiled(activities=kinds) as seen:
        watched = [step() for _ in range(args.steps)]
    operators = _operators(seen.key_averages(), args.steps, on_gpu)
    families: dict[str, float] = dict.fromkeys((*FAMILIES, OTHER), 0.0)
    for operator in operators:
        families[operator.family] += operator.milliseconds
    families[PYTHON] = max(0.0, plain.median - sum(families.values()))
    return Measured(
        work=work,
        capacity=capacity.as_json(),
        rows=rows,
        step=plain,
        profiled_step=1000 * Spread.of(watched).median,
        families={name: value for name, value in families.items() if value > 0},
        operators=tuple(operators[:12]),
    )


@contextmanager
def kernels_seen() -> Iterator[None]:
    """For a while the profiler is told when a compiled kernel begins and ends."""
    plain = {(module, name): getattr(module, name) for module, name in KERNELS}

    def told(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with record_function(f"kernel: {name}"):
                return kernel(*args)

        return run

    for (module, name), kernel in plain.items():
        setattr(module, name, told(name, kernel))
    try:
        yield
    finally:
        for (module, name), kernel in plain.items():
            setattr(module, name, kernel)


def _operators(events: Iterable[Any], steps: int, on_gpu: bool) -> list[Operator]:
    """By their own time, dearest first; on a GPU that of their kernels."""
    found = []
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found.append(
                Operator(
                    event.key,
                    family_of(event.key),
                    microseconds / 1000 / steps,
                    event.count / steps,
                )
            )
    return sorted(found, key=lambda operator: -operator.milliseconds)


# On paper.


def _report(args: argparse.Namespace, model: ElasticModel, measured: list[Measured]) -> Report:
    names = [
        name
        for name in (*FAMILIES, OTHER, PYTHON)
        if any(name in each.families for each in measured)
    ]
    rows = [
        [
            each.work,
            f"`{_label(each)}`",
            str(each.rows or ""),
            f"{each.step.median:.2f}",
            f"{each.profiled_step:.2f}",
            *(f"{each.families.get(name, 0.0):.2f}" for name in names),
        ]
        for each in measured
    ]
    dearest = [
        Table(
            f"Dearest operators: {_named(each)}",
            ("operator", "family", "ms per step", "calls per step"),
            [
                [f"`{o.name}`", o.family, f"{o.milliseconds:.2f}", f"{o.calls:.0f}"]
                for o in each.operators
            ],
        )
        for each in measured
    ]
    shape = getattr(args, "shape", None)
    return Report(
        name="profile" if not shape else f"profile-{shape}",
        title=f"Where a step's time goes: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "context_tokens": args.context,
            "prompt_tokens": args.prompt,
            "steps": args.steps,
        },
        results=[asdict(each) for each in measured],
        tables=[
            Table("ms per step", ("work", "capacity", "batch", "step", "profiled", *names), rows),
            *dearest,
        ],
        notes=(
            "Operators and kernels by their own time under the profiler; `Python and dispatch` is "
            "what they leave of the step's time without it, so what the profiler adds to them is "
            "missing there."
        ),
        draw=lambda figure: _draw(figure, measured, names),
        size=(9, 1.2 + 0.7 * len(measured)),
    )


def _label(each: Measured) -> str:
    return models.label_of(Capacity.parse(each.capacity))


def _named(each: Measured) -> str:
    batch = f", batch {each.rows}" if each.rows else ""
    return f"{each.work}, {_label(each)}{batch}"


def _draw(figure: Any, measured: Sequence[Measured], names: Sequence[str]) -> None:
    axis = figure.subplots()
    labels = [_named(each) for each in measured]
    left = [0.0] * len(measured)
    for name in names:
        widths = [each.families.get(name, 0.0) for each in measured]
        axis.barh(labels, widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="ms per step")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
