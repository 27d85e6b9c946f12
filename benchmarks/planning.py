"""How many requests per second this machine holds, on paper, and how far that is from the truth.

First steps are measured: so many rows that decode, beside so many prompt tokens, at each mix of
capacities. Then the server's own scheduler runs over these step times with random arrivals
(`benchmarks/simulation.py`), and the highest rate is searched at which `--share` of the requests
get their first token and the following ones in time. What HTTP and threads add is one factor: the
same sixteen streams over HTTP, of the first mix, over the time that the simulation gives them.

With --check, GuideLLM then sends requests at rates around the planned one, and the rate at which
the promise breaks is compared with the simulation's over the same rates and the same time.
GuideLLM lives in an environment of its own:

    python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1

Takes `--seconds` for each of three mixes and a minute more: some four minutes on two cores with the
default model. With --check also, for each of three mixes and five rates, `--check-seconds` and the
generator's start: some twenty minutes more.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import guidellm, machine, models, server
from benchmarks.results import Goal, Report, Table, write
from benchmarks.serving import MODES, over_http
from benchmarks.simulation import (
    Arrival,
    Fate,
    Host,
    Promise,
    StepTimes,
    crossing,
    held_rate,
    poisson,
    simulate,
)
from benchmarks.steps import step_times
from elastiformer import Capacity, ElasticModel
from elastiformer.sampling import GREEDY
from elastiformer.weights import resolve
from service.engine import Engine
from service.knob import Resolved
from service.metrics import Metrics
from service.orders import Order
from service.scheduler import Job
from service.served import serve
from service.settings import ModelSpec, Settings
from training.options import real, whole
from training.progress import track

AROUND = (0.6, 0.8, 1.0, 1.2, 1.4)  # times the planned rate: what is checked
SEEDS = 12  # simulations of the time that is checked: as short as that, each is another story


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument(
        "--mix",
        type=_mix,
        action="append",
        help="capacities in equal parts, such as 1.0,0.6; may be repeated; unset: as in serving",
    )
    parser.add_argument("--seconds", type=real(least=0), default=60.0, help="of steps, each mix")
    parser.add_argument("--least", type=whole(1), default=3, help="steps of each kind, at least")
    parser.add_argument("--prompt", type=whole(2), default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=whole(2), default=32, help="new tokens of each request")
    parser.add_argument("--first-token-ms", type=real(above=0), default=2000.0, help="the promise")
    parser.add_argument(
        "--between-tokens-ms", type=real(above=0), default=250.0, help="the promise, on average"
    )
    parser.add_argument(
        "--share", type=real(above=0, below=1), default=0.9, help="of requests that get it"
    )
    parser.add_argument(
        "--overhead", type=real(above=0), help="factor on each step; unset: measured over HTTP"
    )
    parser.add_argument(
        "--requests", type=whole(1), default=1500, help="simulated at each rate that is tried"
    )
    parser.add_argument("--check", action="store_true", help="compare with a load generator")
    parser.add_argument("--guidellm", help="the load generator's program; unset: on the PATH")
    parser.add_argument("--check-seconds", type=real(above=0), default=40.0, help="at each rate")


def _mix(text: str) -> tuple[float, ...]:
    return tuple(real(above=0)(each) for each in text.split(","))


def _mixes(args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Each mix by its name."""
    if args.mix:
        return {", ".join(f"{share:g}" for share in mix): mix for mix in args.mix}
    return {
        name: tuple(share for share in mix if isinstance(share, float))
        for name, mix in MODES.items()
    }


@dataclass(frozen=True, slots=True)
class Checked:
    """One rate, as the load generator saw it and as the simulation has it."""

    rate: float
    sent: int
    finished: int
    kept: float  # share of the finished requests
    kept_on_paper: float
    first_token_ms: float | None  # median
    first_token_ms_on_paper: float | None


@dataclass(frozen=True, slots=True)
class Planned:
    """One mix of capacities: its step times, the rate it holds, and what was seen of it."""

    mode: str
    times: StepTimes
    rate: float  # with the promise, for good
    saturated: float  # finished per second when there is always one more waiting
    checked: tuple[Checked, ...] = ()
    checked_rate: float | None = None  # where the promise broke
    checked_rate_on_paper: float | None = None  # over the same rates and the same time

    @property
    def error(self) -> float | None:
        if not self.checked_rate or not self.checked_rate_on_paper:
            return None
        return abs(self.checked_rate_on_paper / self.checked_rate - 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    program = guidellm.find(args.guidellm) if args.check else None
    model = models.load(args)
    models.check_context(model, args.prompt + args.tokens)
    wished: dict[str, Any] = {}  # what the environment says, as the server reads it
    settings = Settings(**wished)
    engine = serve(ModelSpec(server.NAME, args.base), model, settings, Metrics()).engine
    promise = Promise(args.first_token_ms / 1000, args.between_tokens_ms / 1000, args.share)
    starts = count(0, 3)  # no prompt twice: a stored one would cost nothing
    mixes = _mixes(args)
    jobs = {
        mode: [_job(args, engine, Capacity(share, share)) for share in mix]
        for mode, mix in mixes.items()
    }
    hosts = {
        mode: Host(
            limits=engine.limits,
            max_decode_delay_seconds=settings.max_decode_delay_seconds,
            times=step_times(engine, jobs[mode], starts, args.seconds, args.least, mode),
        )
        for mode in mixes
    }
    needs_server = args.overhead is None or program is not None
    with _server(args) if needs_server else nullcontext() as place:
        overhead = args.overhead
        if overhead is None:
            assert place is not None
            first = next(iter(mixes))
            overhead = _overhead(
                args, model, hosts[first], jobs[first], mixes[first], place.address, starts
            )
        hosts = {mode: replace(host, overhead=overhead) for mode, host in hosts.items()}
        planned = [_plan(mode, hosts[mode], jobs[mode], promise, args.requests) for mode in mixes]
        if program is not None:
            assert place is not None
            load = guidellm.Load(
                address=place.address,
                model=server.NAME,
                tokenizer=resolve(args.base).path,
                prompt_tokens=args.prompt,
                output_tokens=args.tokens,
                seconds=args.check_seconds,
            )
            planned = [
                _checked(
                    each,
                    hosts[each.mode],
                    jobs[each.mode],
                    mixes[each.mode],
                    promise,
                    program,
                    load,
                )
                for each in planned
            ]
    return write(_report(args, model, planned, overhead), args.out)


def _server(args: argparse.Namespace) -> AbstractContextManager[server.Running]:
    adapter = models.adapter_of(args)
    return server.running(args.base, adapter, args.dtype, args.device, args.threads)


def _job(args: argparse.Namespace, engine: Engine, capacity: Capacity) -> Job:
    """A request as the server makes one of it: with what it reserves and where it is cut."""
    prompt = tuple(range(args.prompt))
    job = Job(0, prompt, capacity, most_new=args.tokens, billed_tokens=len(prompt))
    order = Order((job,), Resolved(capacity.as_json(), capacity), GREEDY)
    return engine.checked(order).jobs[0]


# Over HTTP.


def _overhead(
    args: argparse.Namespace,
    model: ElasticModel,
    host: Host,
    jobs: Sequence[Job],
    mix: Sequence[float],
    address: str,
    starts: Iterator[int],
) -> float:
    """The same streams over HTTP, over what the simulation says; the median of three tries."""
    streams = host.limits.max_running
    ids = models.text_ids(model, 4096 + args.prompt)
    on_paper = _last([Arrival(0.0, jobs[at % len(jobs)]) for at in range(streams)], host)
    taken = []
    for _ in range(4):
        prompts = [
            ids[start : start + args.prompt]
            for start in (next(starts) % 4096 for _ in range(streams))
        ]
        taken.append(asyncio.run(over_http(address, prompts, args.tokens, mix)))
    return statistics.median(taken[1:]) / on_paper  # the first one warms up


def _last(arrivals: Sequence[Arrival], host: Host) -> float:
    """When the last of them ends."""
    return max(fate.ended for fate in simulate(host, arrivals) if fate.ended is not None)


# Rates.


def _plan(mode: str, host: Host, jobs: Sequence[Job], promise: Promise, requests: int) -> Planned:
    """The rate that a mix holds for good."""
    some = 8 * host.limits.max_running
    saturated = some / _last([Arrival(0.0, jobs[at % len(jobs)]) for at in range(some)], host)

    def share_at(rate: float) -> float:
        return promise.share_kept(_times(simulate_at(host, jobs, rate, requests / rate, seed=0)))

    return Planned(mode, host.times, held_rate(share_at, promise.share, 1.2 * saturated), saturated)


def simulate_at(
    host: Host, jobs: Sequence[Job], rate: float, seconds: float, seed: int
) -> list[Fate]:
    return simulate(host, poisson(jobs, rate, seconds, seed), until=seconds)


def _times(fates: Sequence[Fate]) -> list[tuple[float | None, float | None]]:
    return [(fate.to_first_token, fate.between_tokens) for fate in fates if fate.ended is not None]


def _checked(
    planned: Planned,
    host: Host,
    jobs: Sequence[Job],
    mix: Sequence[float],
    promise: Promise,
    program: str,
    load: guidellm.Load,
) -> Planned:
    """The same rates for the same time: sent by a load generator, and on paper."""
    points = []
    around = planned.rate or planned.saturated  # where nothing is held, the most there is
    with tempfile.TemporaryDirectory() as folder:
        for part in track(AROUND, label=planned.mode):
            rate = round(part * around, 3)
            phase = guidellm.at_rate(program, load, mix, rate, Path(folder))
            finished = [each for each in phase.requests if each.ended is not None]
            stories = [
                _times(simulate_at(host, jobs, rate, load.seconds, seed)) for seed in range(SEEDS)
            ]
            points.append(
                Checked(
                    rate=rate,
                    sent=len(phase.requests),
                    finished=len(finished),
                    kept=promise.share_kept(
                        (each.to_first_token, each.between_tokens) for each in finished
                    ),
                    kept_on_paper=statistics.mean(map(promise.share_kept, stories)),
                    first_token_ms=_median_ms([each.to_first_token for each in finished]),
                    first_token_ms_on_paper=_median_ms(
                        [first for story in stories for first, _ in story]
                    ),
                )
            )
    return replace(
        planned,
        checked=tuple(points),
        checked_rate=crossing([(each.rate, each.kept) for each in points], promise.share),
        checked_rate_on_paper=crossing(
            [(each.rate, each.kept_on_paper) for each in points], promise.share
        ),
    )


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return 1000 * statistics.median(known) if known else None


# On paper.


def _report(
    args: argparse.Namespace, model: ElasticModel, planned: Sequence[Planned], overhead: float
) -> Report:
    tables = [_step_table(each) for each in planned]
    tables.append(
        Table(
            "What this machine holds",
            ("requests", "requests/s with the promise", "requests/s at most"),
            [[each.mode, f"{each.rate:.2f}", f"{each.saturated:.2f}"] for each in planned],
        )
    )
    if args.check:
        columns = (
            "requests",
            "sent /s",
            "sent",
            "finished",
            "promise kept",
            "on paper",
            "first token, ms: median",
            "on paper",
        )
        rows = [_row(each.mode, point) for each in planned for point in each.checked]
        tables.append(Table(f"{args.check_seconds:g} seconds at each rate", columns, rows))
        headings = ("requests", "promise breaks at, /s", "on paper", "error")
        breaks = [
            [each.mode, *map(_told, (each.checked_rate, each.checked_rate_on_paper, each.error))]
            for each in planned
        ]
        tables.append(Table("Where the promise breaks", headings, breaks))
    return Report(
        name="planning",
        title=f"Requests per second, planned: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "first_token_ms": args.first_token_ms,
            "between_tokens_ms": args.between_tokens_ms,
            "share": args.share,
            "check_seconds": args.check_seconds if args.check else None,
        },
        results={"overhead": overhead, "planned": [asdict(each) for each in planned]},
        tables=tables,
        notes=(
            f"Each request: {args.prompt} prompt tokens, {args.tokens} new ones. The promise: for "
            f"{args.share:.0%} of the requests the first token within {args.first_token_ms:g} ms, "
            f"the others {args.between_tokens_ms:g} ms apart or less on average. Steps are medians "
            f"in this process; HTTP and threads make each {overhead:.2f} times as long. Arrivals "
            "are random and wait for nobody."
        ),
        draw=lambda figure: _draw(figure, planned, args.share),
        goals=[
            Goal(f"planned over measured rate, error, {each.mode}", 0.15, each.error, at_most=True)
            for each in planned
        ]
        if args.check
        else [],
        size=(13, 3.6),
    )


def _step_table(planned: Planned) -> Table:
    times = planned.times
    return Table(
        f"Steps, {planned.mode}, ms",
        ("rows that decode", *(f"{each} prompt tokens" for each in times.tokens)),
        [
            [str(rows), *(f"{1000 * seconds:.1f}" for seconds in line)]
            for rows, line in zip(times.rows, times.seconds, strict=True)
        ],
    )


def _row(mode: str, point: Checked) -> list[str]:
    return [
        mode,
        f"{point.rate:.2f}",
        str(point.sent),
        str(point.finished),
        f"{point.kept:.2f}",
        f"{point.kept_on_paper:.2f}",
        "" if point.first_token_ms is None else f"{point.first_token_ms:.0f}",
        "" if point.first_token_ms_on_paper is None else f"{point.first_token_ms_on_paper:.0f}",
    ]


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _draw(figure: Any, planned: Sequence[Planned], share: float) -> None:
    axes = figure.subplots(1, len(planned), sharey=True, squeeze=False)[0]
    for axis, each in zip(axes, planned, strict=True):
        at = [point.rate for point in each.checked]
        axis.plot(at, [point.kept for point in each.checked], "o-", label="measured")
        axis.plot(at, [point.kept_on_paper for point in each.checked], "x--", label="on paper")
        axis.axvline(each.rate, color="0.6", label="planned for good")
        axis.axhline(share, color="0.85")
        axis.set(title=each.mode, xlabel="requests per second", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share that gets the promise")
    figure.axes[0].legend(fontsize="small")
