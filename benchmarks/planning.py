"""How many requests per second this machine holds, on paper, and how far that is from the truth.

First steps are measured: so many rows that decode, beside so many prompt tokens, at each mix of
capacities. Then the server's own scheduler runs over these step times with random arrivals
(`benchmarks/simulation.py`), and the highest rate is searched at which `--share` of the requests
get their first token and the following ones in time. What HTTP and threads add is one factor for
each mix: requests come over HTTP at half the greatest rate, and it is the factor under which they
take as long on paper.

With --check, requests are then sent at rates around the planned one, at the very moments that are
simulated beside them, and the rates at which the promise breaks are compared.

With --hold, each mix is held to its planned rate for long: 0.85 of it should keep the promise and
1.15 of it should not. If both is so, planning is right to 15 %.

Takes `--seconds` and `--overhead-seconds` for each of three mixes and a minute more: some five
minutes on two cores with the default model. With --check also, for each of three mixes and five
rates, `--check-seconds` and until the last one is answered: some ten minutes more. With --hold,
for each mix and twice, `--hold-warm-up` and `--hold-seconds`: of the mixes 1.0 and 0.6 alone ten
minutes more.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import count
from typing import Any

from benchmarks import models, server
from benchmarks.check import Planned, check, simulate_at, times_of
from benchmarks.hold import hold
from benchmarks.paper import report
from benchmarks.results import write
from benchmarks.sender import Sender
from benchmarks.server import ServerError
from benchmarks.serving import MODES
from benchmarks.simulation import (
    Arrival,
    Host,
    Promise,
    factor_for,
    held_rate,
    moments,
    poisson,
    simulate,
)
from benchmarks.steps import step_times
from elastiformer import Capacity
from elastiformer.sampling import GREEDY
from service.engine import Engine
from service.knob import Resolved
from service.metrics import Metrics
from service.orders import Order
from service.scheduler import Job
from service.served import serve
from service.settings import ModelSpec, Settings
from training.options import real, whole

_OVERHEAD_SEED = 99  # of the moments at which they come; none of those that are checked
_PATIENCE = 4  # times as long until the last one is answered


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
        "--overhead-seconds", type=real(above=0), default=20.0, help="that requests come for it"
    )
    parser.add_argument(
        "--requests", type=whole(1), default=1500, help="simulated at each rate that is tried"
    )
    parser.add_argument("--check", action="store_true", help="compare with a server under load")
    parser.add_argument("--check-seconds", type=real(above=0), default=30.0, help="at each rate")
    parser.add_argument("--hold", action="store_true", help="hold a server to the plan for long")
    parser.add_argument(
        "--hold-seconds", type=real(above=0), default=120.0, help="that count, at each rate"
    )
    parser.add_argument(
        "--hold-warm-up", type=real(least=0), default=20.0, help="seconds before them"
    )
    parser.add_argument(
        "--hold-windows",
        type=whole(2),
        default=2,
        help="rates of each mix; more halve the interval",
    )


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


def run(args: argparse.Namespace) -> dict[str, Any]:
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
    needs_server = args.overhead is None or args.check or args.hold
    with _server(args) if needs_server else nullcontext() as place:
        if place is not None:
            ids = models.text_ids(model, 4096 + args.prompt)
            sender = Sender(place.address, ids, starts, args.prompt, args.tokens)
        hosts = {
            mode: replace(
                host,
                overhead=args.overhead
                or _overhead(sender, host, jobs[mode], mixes[mode], args.overhead_seconds),
            )
            for mode, host in hosts.items()
        }
        planned = [_plan(mode, hosts[mode], jobs[mode], promise, args.requests) for mode in mixes]
        if args.check:
            planned = [
                check(
                    each,
                    hosts[each.mode],
                    jobs[each.mode],
                    mixes[each.mode],
                    promise,
                    sender,
                    args.check_seconds,
                )
                for each in planned
            ]
        if args.hold:
            planned = [
                hold(
                    each,
                    hosts[each.mode],
                    jobs[each.mode],
                    mixes[each.mode],
                    promise,
                    sender,
                    args.hold_seconds,
                    args.hold_warm_up,
                    args.hold_windows,
                )
                for each in planned
            ]
    return write(report(args, model, planned), args.out)


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
    sender: Sender, host: Host, jobs: Sequence[Job], mix: Sequence[float], seconds: float
) -> float:
    """The factor on steps under which requests take on paper what they take over HTTP, on average.

    Steps of few rows and cut prompts, which is what requests that come one by one make, have more
    between them than those of many streams that begin together.
    """
    sender.at_once(max(host.limits.max_running // 2, 1), mix)  # warms up
    rate = max(_saturated(host, jobs) / 2, 2 / seconds)
    seen = sender.at(moments(rate, seconds, _OVERHEAD_SEED), mix, _PATIENCE * seconds)
    taken = [each.ended - each.started for each in seen.finished if each.ended is not None]
    if not taken:
        raise ServerError(
            f"of {len(seen.requests)} requests in {seconds:g} s none was answered within "
            f"{_PATIENCE * seconds:g}; give --overhead-seconds more, or --overhead"
        )
    return factor_for(host, poisson(jobs, rate, seconds, _OVERHEAD_SEED), statistics.fmean(taken))


def _saturated(host: Host, jobs: Sequence[Job]) -> float:
    """Requests finished per second when there is always one more waiting."""
    some = 8 * host.limits.max_running
    return some / _last([Arrival(0.0, jobs[at % len(jobs)]) for at in range(some)], host)


def _last(arrivals: Sequence[Arrival], host: Host) -> float:
    """When the last of them ends."""
    return max(fate.ended for fate in simulate(host, arrivals) if fate.ended is not None)


# Rates.


def _plan(mode: str, host: Host, jobs: Sequence[Job], promise: Promise, requests: int) -> Planned:
    """The rate that a mix holds for good."""
    saturated = _saturated(host, jobs)

    def share_at(rate: float) -> float:
        return promise.share_kept(times_of(simulate_at(host, jobs, rate, requests / rate, seed=0)))

    rate = held_rate(share_at, promise.share, 1.2 * saturated)
    return Planned(mode, host.times, host.overhead, rate, saturated)
