"""What a capacity saves: the time it takes beside the FLOPs it spends, both over capacity 1.0.

A prompt of 512 tokens, one token for 1, 4, 16 and 64 sequences, texts with a label each, and texts
that are scored whole, each at several capacities by turns. Realised saving = (1 - time ratio) /
(1 - FLOP ratio): 1 where every FLOP saved is time saved. Decoding is also held against the
roofline: the least time that the plan needs here, by the bytes of weights that some row needs and
by its FLOPs.

Takes about `--seconds` for each kind of work, and the time to run the prompts of the decoded
sequences: some five minutes in all on two cores with the default model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks import machine, models
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.roofline import Roofline
from benchmarks.runs import STAGGER, TRIAL_STEPS, Decoding
from benchmarks.timing import Spread, ratios, take_turns
from benchmarks.works import Decode, Texts, Work
from elastiformer import DENSE, Capacity, ElasticModel
from training.options import real, whole

CAPACITIES = (1.0, 0.8, 0.65, 0.5)
OF_PREFILL = 0.6  # measured there too, for its goal
BATCHES = (1, 4, 16, 64)
TEXTS, TEXT_TOKENS = 4, 128
LITTLE = 0.05
STEPS = 384  # of decoding, at most: how much room a sequence gets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser, shapes=True)
    parser.add_argument(
        "--capacity",
        type=models.capacity_argument,
        action="append",
        metavar="JSON",
        help='a number, or keep shares such as {"mlp_tokens": 0.5}; repeatable; 1.0 is always '
        f"measured (default: {', '.join(map(str, CAPACITIES))})",
    )
    parser.add_argument("--seconds", type=real(least=0), default=30.0, help="for each kind of work")
    parser.add_argument("--least", type=whole(1), default=3, help="rounds, however long they take")
    parser.add_argument("--batches", type=batches, default=BATCHES, help="such as 1,4,16,64")
    parser.add_argument("--prompt", type=whole(2), default=512, help="tokens of the prefill")
    parser.add_argument("--context", type=whole(2), default=128, help="tokens before decoding")


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of work at one capacity."""

    work: str
    rows: int  # of the batch; 0: not decoding
    capacity: object
    milliseconds: Spread
    time_ratio: Spread  # over capacity 1.0 in the same round
    block_flop_ratio: float
    flop_ratio: float  # with the output head
    realised_blocks: float | None  # None where next to nothing was to be saved
    realised: float | None
    roof_milliseconds: float | None = None  # of decode steps
    roof_ratio: float | None = None
    of_roof_saving: float | None = None  # saved, over what the roofline lets the plan save

    @property
    def is_bounded(self) -> bool:
        """Whether what the roofline says holds for it: no step was faster, nothing saved more."""
        if self.roof_milliseconds is None:
            return True
        is_above = self.of_roof_saving is not None and self.of_roof_saving > 1
        return self.milliseconds.median >= self.roof_milliseconds and not is_above


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = models.load(args)
    capacities = tuple(dict.fromkeys((DENSE, *(args.capacity or map(_both, CAPACITIES)))))
    longest = max(args.prompt, args.context + STAGGER + STEPS)
    models.check_context(model, longest)
    ids = models.text_ids(model, 2 * longest + 64 * 37)
    texts = [ids[at * TEXT_TOKENS : (at + 1) * TEXT_TOKENS] for at in range(TEXTS)]
    of_prefill = capacities
    if not args.capacity:
        of_prefill = tuple(map(_both, sorted((*CAPACITIES, OF_PREFILL), reverse=True)))
    measured = [
        *_measure(args, Texts("prefill", model, [ids[: args.prompt]]), of_prefill),
        *_measure(args, Texts("classification", model, texts, label=ids[-1]), capacities),
        *_measure(args, Texts("scoring", model, texts, scored=True), capacities),
        *_decode(args, model, capacities, ids),
    ]
    return write(_report(args, model, measured), args.out)


def batches(text: str) -> tuple[int, ...]:
    return tuple(whole(1)(each) for each in text.split(","))


def _decode(
    args: argparse.Namespace,
    model: ElasticModel,
    capacities: Sequence[Capacity],
    ids: list[int],
) -> list[Measured]:
    limits = machine.limits(model.dtype, model.device)
    most_rows = max(args.batches)
    # The first sequences serve every batch, so each batch finds them a little longer.
    running = {
        capacity: Decoding(model, capacity, ids, most_rows, args.context, STEPS)
        for capacity in capacities
    }
    measured: list[Measured] = []
    steps_left = STEPS
    for place, rows in enumerate(args.batches):
        most = steps_left // (len(args.batches) - place) - TRIAL_STEPS
        least = min(args.least, most)
        before = running[DENSE].steps
        measured += _measure(args, Decode(running, rows), capacities, least, most, model)
        steps_left -= running[DENSE].steps - before
    for each in running.values():
        each.release()
    # Once more: whatever else ran here may have slowed the first measurement.
    limits = limits.or_better(machine.limits(model.dtype, model.device))
    return _under(Roofline(model, limits, ids[:256]), model, measured, args.context)


def _under(
    roofline: Roofline, model: ElasticModel, measured: Sequence[Measured], context: int
) -> list[Measured]:
    """Decode steps beside the least time that their plans need."""

    def seconds(each: Measured, capacity: Capacity) -> float:
        return roofline.seconds(model.plans(capacity, context)[1], each.rows, context)

    found = []
    for each in measured:
        roof, dense = seconds(each, Capacity.parse(each.capacity)), seconds(each, DENSE)
        found.append(
            replace(
                each,
                roof_milliseconds=1000 * roof,
                roof_ratio=roof / dense,
                of_roof_saving=_realised(each.time_ratio.median, roof / dense),
            )
        )
    return found


def _measure(
    args: argparse.Namespace,
    work: Work,
    capacities: Sequence[Capacity],
    least: int | None = None,
    most: int = 1_000_000,
    model: ElasticModel | None = None,
) -> list[Measured]:
    ways = {models.label_of(capacity): partial(work.turn, capacity) for capacity in capacities}
    warm_up = 1 if model is None else TRIAL_STEPS
    taken = take_turns(ways, args.seconds, least or args.least, work.name, most, warm_up)
    dense_flops, dense_taken = work.flops(DENSE), taken[models.label_of(DENSE)]
    found = []
    for capacity in capacities:
        mine = taken[models.label_of(capacity)]
        ratio = Spread.of(ratios(mine, dense_taken))
        flops = work.flops(capacity)
        blocks, whole_model = flops.blocks / dense_flops.blocks, flops.all / dense_flops.all
        found.append(
            Measured(
                work=work.name,
                rows=work.rows,
                capacity=capacity.as_json(),
                milliseconds=Spread.of(mine).scaled(1000),
                time_ratio=ratio,
                block_flop_ratio=blocks,
                flop_ratio=whole_model,
                realised_blocks=_realised(ratio.median, blocks),
                realised=_realised(ratio.median, whole_model),
            )
        )
    return found


def _realised(time_ratio: float, ratio: float | None) -> float | None:
    """None where next to nothing could be saved: then the quotient is noise."""
    if ratio is None or ratio > 1 - LITTLE:
        return None
    return (1 - time_ratio) / (1 - ratio)


def _both(share: float) -> Capacity:
    return Capacity(share, share)


# On paper.


def _report(args: argparse.Namespace, model: ElasticModel, measured: list[Measured]) -> Report:
    rows = [
        [
            each.work,
            f"`{_short(each.capacity)}`",
            told(each.milliseconds),
            f"{each.time_ratio.median:.3f}",
            f"{each.block_flop_ratio:.3f}",
            f"{each.flop_ratio:.3f}",
            _number(each.realised_blocks),
            _number(each.realised),
            _number(each.roof_milliseconds),
            _number(each.roof_ratio, 3),
            _number(each.of_roof_saving) + ("" if each.is_bounded else " †"),
        ]
        for each in measured
    ]
    columns = (
        "work",
        "capacity",
        "ms, median [quartiles]",
        "time ratio",
        "block FLOPs",
        "all FLOPs",
        "realised, blocks",
        "realised, all",
        "roofline ms",
        "roofline ratio",
        "of the roofline's saving",
    )
    parameters = {
        "model": models.name_of(args),
        "seconds": args.seconds,
        "prompt_tokens": args.prompt,
        "context_tokens": args.context,
        "batches": list(args.batches),
        "texts": TEXTS,
        "text_tokens": TEXT_TOKENS,
    }
    name = "saving" if not getattr(args, "shape", None) else f"saving-{args.shape}"
    return Report(
        name=name,
        title=f"What a capacity saves: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters=parameters,
        results=[asdict(each) for each in measured],
        tables=[Table("Time and FLOPs over capacity 1.0", columns, rows)],
        notes=(
            "Ratios are over capacity 1.0 of the same round; medians. FLOPs are those counted in "
            "`usage`, over those counted at 1.0. Realised saving is (1 - time ratio) / "
            "(1 - FLOP ratio), once for the blocks' FLOPs and once for all, the output head "
            "included. The roofline of a decode step counts the weights that some row needs and "
            "the FLOPs; its last column is (1 - time ratio) / (1 - roofline ratio), "
            "and † marks where it is no bound: a step took less than its roofline, or the dense "
            "one is farther from its own than this one. Goals leave such values out. "
            f"Each saving is left out where less than {LITTLE:.0%} could be saved."
        ),
        draw=lambda figure: _draw(figure, measured),
        goals=_goals(measured, shaped=name != "saving"),
        size=(4.2 * min(len({each.work for each in measured}), 3), 6.4),
    )


def _goals(measured: Sequence[Measured], shaped: bool) -> list[Goal]:
    def worst(work: str, of_roof: bool = False) -> float | None:
        found = [
            each.of_roof_saving if of_roof else each.realised
            for each in measured
            if each.work == work and _is_low(each.capacity) and (each.is_bounded or not of_roof)
        ]
        return min((value for value in found if value is not None), default=None)

    def slowest(work: str) -> float | None:
        found = [each.time_ratio.median for each in measured if each.work == work]
        return max(found, default=None)

    def speed_up() -> float | None:
        found = [
            1 / each.time_ratio.median
            for each in measured
            if each.work == "prefill" and each.capacity == OF_PREFILL
        ]
        return max(found, default=None)

    kinds = {each.work for each in measured}
    goals = [
        Goal("realised saving, prefill, capacity <= 0.65", 0.9, worst("prefill")),
        *(
            Goal(f"realised saving, {work}, capacity <= 0.65", 0.9, worst(work))
            for work in ("classification", "scoring")
        ),
        Goal("prefill, capacity 0.6: speed over 1.0", 1.6, speed_up()),
    ]
    for rows, wanted in ((1, 0.9), (64, 0.7)):
        if f"decode, batch {rows}" in kinds:
            what = f"realised saving, decode, batch {rows}, capacity <= 0.65"
            goals.append(Goal(what, wanted, worst(f"decode, batch {rows}")))
    goals += [
        Goal("decode, batch 1, capacity 0.65, ms", 15, each.milliseconds.median, at_most=True)
        for each in measured
        if not shaped and (each.rows, each.capacity) == (1, 0.65)
    ]
    for rows in (4, 16):
        work = f"decode, batch {rows}"
        if work in kinds:
            what = f"of the roofline's saving, decode, batch {rows}, capacity <= 0.65"
            goals.append(Goal(what, 0.8, worst(work, of_roof=True)))
            what = f"decode, batch {rows}: time over dense, at the slowest capacity"
            goals.append(Goal(what, 1.02, slowest(work), at_most=True))
    return goals


def _is_low(capacity: object) -> bool:
    return not isinstance(capacity, float) or capacity <= 0.65


def _short(capacity: object) -> str:
    return models.label_of(Capacity.parse(capacity))


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _draw(figure: Any, measured: Sequence[Measured]) -> None:
    """One panel per kind of work: time and FLOPs over capacity 1.0 at each capacity."""
    works = list(dict.fromkeys(each.work for each in measured))
    columns = min(len(works), 3)
    axes = figure.subplots(-(-len(works) // columns), columns, squeeze=False, sharey=True).flatten()
    for axis, work in zip(axes, works, strict=False):
        points = [each for each in measured if each.work == work]
        places = range(len(points))
        axis.plot(places, [p.flop_ratio for p in points], "s--", color="0.6", label="FLOPs")
        roof = [p.roof_ratio for p in points]
        if all(value is not None for value in roof):
            axis.plot(places, roof, "^:", color="tab:green", label="roofline")
        middles = [p.time_ratio.median for p in points]
        errors = [
            [p.time_ratio.median - p.time_ratio.lower for p in points],
            [p.time_ratio.upper - p.time_ratio.median for p in points],
        ]
        axis.errorbar(places, middles, errors, fmt="o-", capsize=3, color="tab:blue", label="time")
        axis.set_xticks(places, [_wrapped(p.capacity) for p in points], fontsize="small")
        axis.set(title=work, ylim=(0, 1.35))
        axis.axhline(1, color="0.85", zorder=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left")
    for axis in axes[len(works) :]:
        axis.set_visible(False)
    figure.supxlabel("capacity")
    figure.supylabel("over capacity 1.0")


def _wrapped(capacity: object) -> str:
    return _short(capacity).replace(", ", ",\n")
