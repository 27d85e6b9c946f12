"""Random requests for a long while over HTTP, and then: is anything left behind?

Starts its own server. Requests come at random moments, of random lengths and capacities, streamed
or whole, alone or several in one; some are cancelled in mid-stream, some callers hang up before an
answer, some ask for what is refused. At the end, when all is quiet: no part of the cache is still
reserved, no job runs or waits, every request had exactly one ending, memory is flat, and all the
while `/health` answered at once.

Takes `--minutes`, the server's start, and until the last request ended.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks import machine, models, server
from benchmarks.results import Goal, Report, Table, write
from benchmarks.serving import PERCENTILES, percentiles
from benchmarks.visitors import Ending, Visitor
from elastiformer import ElasticModel
from elastiformer.errors import ElastiError
from training.options import real, whole
from training.progress import bar

WARM_UP = 0.25  # of the time, in which memory may still grow
QUIET_SECONDS = 300.0  # that the last requests may take
_RUNNING, _WAITING = "elasti_num_requests_running", "elasti_num_requests_waiting"
_CACHE, _ENDED = "elasti_kv_cache_usage_perc", "elasti_request_success_total"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--minutes", type=real(above=0), default=20.0, help="of requests")
    parser.add_argument("--rate", type=real(above=0), default=3.0, help="requests per second")
    parser.add_argument("--most-open", type=whole(1), default=48, help="requests at once")
    parser.add_argument("--longest", type=whole(8), default=400, help="tokens of a prompt, at most")
    parser.add_argument(
        "--cache-tokens",
        type=whole(512),
        default=8192,
        help="room of the server's cache: small, so that it is all in use when the warm-up ends",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of all that is random")


class SoakError(ElastiError):
    """The server did not become quiet."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment."""

    seconds: float
    resident_bytes: int
    running: float
    waiting: float
    health_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the requests came to, and what was left."""

    endings: dict[str, int]
    wrong: tuple[str, ...]  # requests with no ending, or more than one
    jobs_certain: int  # sequences that the server must have ended
    jobs_possible: int  # and those of callers that hung up before they could know
    jobs_ended: int  # by the server's count
    running_left: float
    waiting_left: float
    cache_left: float  # share of the cache still reserved
    memory_ratio: float  # of the last quarter over the second, medians
    memory_slope: float  # bytes per minute, after the warm-up
    health_ms: tuple[float, ...]  # at 50, 95 and 99 %


def run(args: argparse.Namespace) -> dict[str, Any]:
    # Only its tokenizer and range of capacities are needed; it is gone before the server starts.
    model = models.load(args)
    texts, lowest, setting = _facts(args, model)
    del model
    settings = {"cache_tokens": args.cache_tokens}
    with server.running(
        args.base, models.adapter_of(args), args.dtype, args.device, args.threads, settings
    ) as place:
        samples, outcome = asyncio.run(_soak(args, place, texts, lowest))
    return write(_report(args, setting, samples, outcome), args.out)


def _facts(
    args: argparse.Namespace, model: ElasticModel
) -> tuple[list[int], float, machine.Setting]:
    ids = models.text_ids(model, 4 * args.longest)
    setting = machine.setting(model, args.command_line)
    return ids, model.lowest, setting


async def _soak(
    args: argparse.Namespace, place: server.Running, ids: list[int], lowest: float
) -> tuple[list[Sample], Outcome]:
    draw = random.Random(args.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
    endings: list[Ending] = []
    samples: list[Sample] = []
    async with httpx.AsyncClient(base_url=place.address, timeout=None, limits=limits) as client:
        before = server.totals((await client.get("/metrics")).text)
        began = time.monotonic()
        watching = asyncio.create_task(_watch(client, place.process, began, samples))
        visits: set[asyncio.Task[None]] = set()
        shown = bar("soak", round(60 * args.minutes), unit="s")
        number = 0
        while (passed := time.monotonic() - began) < 60 * args.minutes:
            await asyncio.sleep(draw.expovariate(args.rate))
            if len(visits) < args.most_open:
                visitor = Visitor(number, random.Random(draw.random()), ids, args.longest, lowest)
                visit = asyncio.create_task(_visit(visitor, client, endings))
                visits.add(visit)
                visit.add_done_callback(visits.discard)
                number += 1
            shown.set_postfix(requests=number, open=len(visits), refresh=False)
            shown.update(round(passed) - shown.n)
        shown.close()
        if visits:
            await asyncio.wait(visits, timeout=QUIET_SECONDS)
        after = await _until_quiet(client)
        watching.cancel()
    if visits:
        raise SoakError(f"{len(visits)} requests have no ending after {QUIET_SECONDS:g} seconds")
    return samples, _outcome(endings, samples, before, after)


async def _visit(visitor: Visitor, client: httpx.AsyncClient, endings: list[Ending]) -> None:
    endings.append(await visitor.visit(client))


async def _watch(
    client: httpx.AsyncClient, process: int, began: float, samples: list[Sample]
) -> None:
    while True:
        asked = time.monotonic()
        (await client.get("/health")).raise_for_status()
        health_ms = 1000 * (time.monotonic() - asked)
        now = server.totals((await client.get("/metrics")).text)
        samples.append(
            Sample(
                time.monotonic() - began,
                machine.resident_bytes(process),
                now[_RUNNING],
                now[_WAITING],
                health_ms,
            )
        )
        await asyncio.sleep(1)


async def _until_quiet(client: httpx.AsyncClient) -> dict[str, float]:
    """Raises SoakError when jobs still run or wait after a while."""
    until = time.monotonic() + QUIET_SECONDS
    while True:
        now = server.totals((await client.get("/metrics")).text)
        if now[_RUNNING] == now[_WAITING] == 0:
            return now
        if time.monotonic() > until:
            raise SoakError(
                f"all callers are gone, but {now[_RUNNING]:g} jobs run and {now[_WAITING]:g} wait"
            )
        await asyncio.sleep(0.1)


def _outcome(
    endings: Sequence[Ending],
    samples: Sequence[Sample],
    before: dict[str, float],
    after: dict[str, float],
) -> Outcome:
    settled = [each for each in samples if each.seconds > WARM_UP * samples[-1].seconds]
    third = max(1, len(settled) // 3)
    early, late = settled[:third], settled[-third:]
    return Outcome(
        endings=dict(Counter(each.kind for each in endings)),
        wrong=tuple(f"request {each.number}: {each.wrong}" for each in endings if each.wrong),
        jobs_certain=sum(each.jobs for each in endings if each.certain),
        jobs_possible=sum(each.jobs for each in endings if not each.certain),
        jobs_ended=round(after[_ENDED] - before[_ENDED]),
        running_left=after[_RUNNING],
        waiting_left=after[_WAITING],
        cache_left=after[_CACHE],
        memory_ratio=_middle(late) / _middle(early),
        memory_slope=_slope(settled),
        health_ms=percentiles([each.health_ms for each in samples]) or (),
    )


def _middle(samples: Sequence[Sample]) -> float:
    return percentiles([each.resident_bytes for each in samples])[0]  # type: ignore[index]


def _slope(samples: Sequence[Sample]) -> float:
    """Least squares, bytes per minute; 0 of a single sample."""
    times = [each.seconds / 60 for each in samples]
    middle = sum(times) / len(times)
    spread = sum((each - middle) ** 2 for each in times)
    if spread == 0:
        return 0.0
    weighted = ((t - middle) * each.resident_bytes for t, each in zip(times, samples, strict=True))
    return sum(weighted) / spread


# On paper.


def _report(
    args: argparse.Namespace,
    setting: machine.Setting,
    samples: Sequence[Sample],
    outcome: Outcome,
) -> Report:
    within = (
        outcome.jobs_certain <= outcome.jobs_ended <= (outcome.jobs_certain + outcome.jobs_possible)
    )
    health = " / ".join(f"{value:.1f}" for value in outcome.health_ms)
    rows = [
        *([f"requests: {kind}", str(count)] for kind, count in sorted(outcome.endings.items())),
        ["requests without exactly one ending", str(len(outcome.wrong))],
        [
            "sequences ended, by the server's count",
            f"{outcome.jobs_ended}; expected {outcome.jobs_certain} to "
            f"{outcome.jobs_certain + outcome.jobs_possible}",
        ],
        [
            "jobs running / waiting at the end",
            f"{outcome.running_left:g} / {outcome.waiting_left:g}",
        ],
        ["share of the cache still reserved", f"{outcome.cache_left:g}"],
        ["memory, last third over first third after warm-up", f"{outcome.memory_ratio:.4f}"],
        ["memory, MiB per minute after warm-up", f"{outcome.memory_slope / 2**20:.3f}"],
        [f"/health, ms at {PERCENTILES} %", health],
    ]
    goals = [
        Goal("requests without exactly one ending", 0, len(outcome.wrong), at_most=True),
        Goal("the server ended as many sequences as were sent (1: yes)", 1, float(within)),
        Goal(
            "jobs left running or waiting",
            0,
            outcome.running_left + outcome.waiting_left,
            at_most=True,
        ),
        Goal("share of the cache left reserved", 0, outcome.cache_left, at_most=True),
        Goal("memory, late over early", 1.02, outcome.memory_ratio, at_most=True),
        Goal("/health, ms at 99 %", 50, outcome.health_ms[-1], at_most=True),
    ]
    return Report(
        name="soak",
        title=f"{args.minutes:g} minutes of random requests: {models.name_of(args)}",
        setting=setting,
        parameters={
            "model": models.name_of(args),
            "minutes": args.minutes,
            "rate": args.rate,
            "most_open": args.most_open,
            "longest": args.longest,
            "cache_tokens": args.cache_tokens,
            "seed": args.seed,
        },
        results={"outcome": asdict(outcome), "samples": [asdict(each) for each in samples]},
        tables=[Table("At the end", ("what", "count"), rows)],
        notes=(
            f"Memory is the server's resident memory; its first {WARM_UP:.0%} are left out as "
            "warm-up. A caller that hangs up before its answer cannot know whether the server had "
            "begun, so the server may have ended some of those or not."
        ),
        draw=lambda figure: _draw(figure, samples),
        goals=goals,
        size=(9, 5),
    )


def _draw(figure: Any, samples: Sequence[Sample]) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = [each.seconds / 60 for each in samples]
    above.plot(minutes, [each.resident_bytes / 2**20 for each in samples], color="tab:red")
    above.axvspan(0, WARM_UP * minutes[-1], color="0.93", zorder=0)
    above.set(ylabel="resident memory, MiB")
    below.plot(minutes, [each.running for each in samples], label="running")
    below.plot(minutes, [each.waiting for each in samples], label="waiting")
    below.set(xlabel="minutes", ylabel="jobs")
    below.legend(fontsize="small")
    for axis in (above, below):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
