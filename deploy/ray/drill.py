"""A fleet on Ray Serve under load: it grows, loses a replica, turns callers away, and shrinks.

    python -m deploy.ray.drill [--out DRILL.json]

One machine, the loopback address, a tiny model, one or two replicas on the CPU. While callers
stream all the time, one replica is killed, then far too many call, then few. What each caller was
told is compared with what should have been. A real Prometheus, where there is one, finds replicas
and proxies by their lists, with the configuration beside this file, and fires the alerts of
deploy/prometheus, made shorter by 60. It takes some five minutes, and needs the extra `ray`.

Progress goes to stderr. The last line of stdout is one JSON object; 1 is returned where something
was not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.results import Table
from benchmarks.server import totals
from deploy.dashboards.prometheus import Prometheus
from deploy.ray.callers import Call, Callers
from deploy.ray.fleet import TARGETS
from deploy.ray.stage import HOST, ONGOING, jobs, running, small_fleet
from deploy.record import setting, write
from deploy.stage import NAME, free_port, make_model, say
from deploy.watch import firing, scraping

SOME, MANY, FEW = 8, 60, 2  # callers
SPEED = 60.0  # by which the rules' durations are shorter
AT_THE_PROXY = 'model_name="any model"'
ALERTS = frozenset(
    {
        "ElastiQueueGrowing",
        "ElastiQueueFull",
        "ElastiErrorRate",
        "ElastiFirstTokenBudgetBurnsFast",
    }
)
FLOOD_SECONDS, CALM_SECONDS, AFTER_SECONDS = 10.0, 5.0, 15.0
WAIT_SECONDS = 180.0  # for a replica to come or go
ENDED = "elasti_request_success_total"


@dataclass
class Drill:
    """A fleet that runs, and those who call it."""

    address: str
    callers: Callers
    prometheus: str | None
    wrong: list[str] = field(default_factory=list)

    def hold(self, true: bool, told: str) -> None:
        """Note what is not as it should be."""
        if not true:
            say(f"  WRONG: {told}")
            self.wrong.append(told)

    async def targets(self) -> list[dict[str, Any]]:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            answer = await client.get(f"{self.address}{TARGETS}")
        return list(answer.raise_for_status().json())

    async def replicas(self) -> dict[str, int]:
        """The process of each replica."""
        return {
            each["labels"]["replica"]: int(each["labels"]["__meta_elasti_process"])
            for each in await self.targets()
        }

    async def until(self, true: Callable[[], Awaitable[bool]], what: str) -> float:
        """Seconds until it is so."""
        began = time.monotonic()
        while not await true():
            if time.monotonic() - began > WAIT_SECONDS:
                self.hold(False, f"{what}: not within {WAIT_SECONDS:g} seconds")
                break
            await asyncio.sleep(0.25)
        return round(time.monotonic() - began, 1)

    async def until_there_are(self, count: int) -> float:
        async def there_are() -> bool:
            return len(await self.replicas()) == count

        return await self.until(there_are, f"{count} replicas")

    async def sums(self) -> dict[str, float]:
        """Every metric, summed over the replicas."""
        found: defaultdict[str, float] = defaultdict(float)
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            for each in await self.targets():
                page = await client.get(f"http://{each['targets'][0]}/metrics")
                for name, value in totals(page.text).items():
                    found[name] += value
        return dict(found)

    # The scenes.

    async def leave(self) -> dict[str, Any]:
        """Callers hang up in the middle: their work ends."""
        body = {"model": NAME, "prompt": "a", "max_tokens": 500, "ignore_eos": True}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            url = f"{self.address}/v1/completions"
            async with client.stream("POST", url, json=body | {"stream": True}) as answer:
                await anext(answer.aiter_lines())
            asking = asyncio.create_task(client.post(url, json=body))

            async def runs() -> bool:
                return (await self.sums())["elasti_num_requests_running"] == 1

            await self.until(runs, "the second request")
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def idle() -> bool:
            sums = await self.sums()
            return not sums["elasti_num_requests_running"]

        taken = await self.until(idle, "nothing runs")
        sums = await self.sums()
        self.hold(sums[ENDED] == 2, f"two ended; got {sums[ENDED]:g}")
        made = sums["elasti_generation_tokens_total"]
        self.hold(made < 900, f"less than all tokens were made; got {made:g}")
        return {"let_go_seconds": taken, "tokens_made_of_1000": made}

    async def grow(self) -> dict[str, Any]:
        """More calls than one replica shall have: there are two, and nobody notices."""
        await self.callers.number(SOME)
        taken = await self.until_there_are(2)
        before = len(self.callers.calls)

        async def both() -> bool:
            return len({call.replica for call in self.callers.calls[before:]}) == 2

        working = await self.until(both, "both replicas answer")
        self.hold(all(call.whole for call in self.callers.calls), "nobody loses anything")
        return {
            "seconds_to_two": taken,
            "seconds_to_answers_of_both": working,
            "answers": len(self.callers.calls),
        }

    async def kill(self) -> dict[str, Any]:
        """A replica's process is killed: only what was in flight on it is lost, and is told."""
        before = len(self.callers.calls)
        replicas = await self.replicas()
        killed, process = next(iter(replicas.items()))
        moment = time.monotonic()
        os.kill(process, signal.SIGKILL)
        await asyncio.sleep(AFTER_SECONDS)

        async def replaced() -> bool:
            now = await self.replicas()
            return len(now) == 2 and killed not in now

        taken = AFTER_SECONDS + await self.until(replaced, "another replica")
        calls = self.callers.calls[before:]
        lost = [call for call in calls if not call.whole]
        elsewhere = [call for call in lost if call.replica not in (killed, None)]
        late = [call for call in lost if call.began > moment]
        spared = [
            call for call in calls if call.spans(moment) and call.replica not in (killed, None)
        ]
        self.hold(bool(lost), "something was in flight on the killed replica")
        self.hold(not elsewhere, f"nothing is lost on the other: {elsewhere}")
        self.hold(not late, f"nothing is lost that came later: {late}")
        self.hold(len(lost) <= ONGOING, f"no more than it may hold, {ONGOING}: {len(lost)}")
        self.hold(all(call.told for call in lost), "each caller is told")
        unbegun = [call for call in lost if call.status not in (None, 200)]
        self.hold(all(_is_ours(call, "internal_error") for call in unbegun), "in our words")
        self.hold(bool(spared) and all(call.whole for call in spared), "the others go on")
        return {
            "lost": len(lost),
            "told": sorted({call.told for call in lost}),
            "lost_elsewhere": len(elsewhere),
            "lost_later": len(late),
            "went_on": len(spared),
            "answers_meanwhile": sum(call.whole for call in calls),
            "seconds_to_two": round(taken, 1),
        }

    async def flood(self) -> dict[str, Any]:
        """Far more than fit: the queue is bounded, who does not fit is told at once, it alerts."""
        before = len(self.callers.calls)
        await self.callers.number(MANY)
        await asyncio.sleep(FLOOD_SECONDS)
        seen = await self.alerts() if self.prometheus else {}
        asked = time.monotonic()
        listed = len(await self.targets())
        listing = time.monotonic() - asked
        self.hold(listed == 2 and listing < 2, f"the list answers: {listed} in {listing:.1f} s")
        await self.callers.number(SOME)
        calls = self.callers.calls[before:]
        away = [call for call in calls if call.turned_away]
        lost = [call for call in calls if not call.whole and not call.turned_away]
        self.hold(bool(away), "some are turned away")
        self.hold(all(_is_ours(call, "queue_full") for call in away), "in our words")
        self.hold(not lost, f"nobody else loses anything: {lost}")
        slowest = max((call.ended - call.began for call in away), default=0.0)
        if self.prometheus:
            seen |= await self.calm()
        return seen | {
            "turned_away": len(away),
            "statuses": dict(Counter(str(call.status) for call in away)),
            "told": sorted({call.told for call in away})[:1],
            "list_answers_in_seconds": round(listing, 2),
            "slowest_refusal_seconds": round(slowest, 2),
            "answers": sum(call.whole for call in calls),
        }

    async def alerts(self) -> dict[str, Any]:
        """What waits at the proxy fires the alerts, and it waits there: not in the replicas."""
        fired: dict[str, float] = {}
        began = time.monotonic()

        async def all_fire() -> bool:
            for alert in sorted(await firing(str(self.prometheus)) & ALERTS - fired.keys()):
                fired[alert] = round(FLOOD_SECONDS + time.monotonic() - began, 1)
            return fired.keys() >= ALERTS

        await self.until(all_fire, f"{', '.join(sorted(ALERTS))} fire")
        waiting = self.measured(
            f"avg_over_time(job_model:elasti_num_requests_waiting:sum{{{AT_THE_PROXY}}}[10s])"
        )
        inside = self.measured(
            'max(max_over_time(elasti_num_requests_waiting{model_name!="any model"}[10s]))'
        )
        own = "histogram_quantile(0.5, sum by (le) (rate({}_bucket[30s])))"
        queue = self.measured(own.format("elasti_request_queue_time_seconds"))
        first = self.measured(own.format("elasti_time_to_first_token_seconds"))
        self.hold(waiting > 16, f"the queue is seen at the proxy: {waiting:g}")
        self.hold(inside <= ONGOING, f"and not in the replicas: {inside:g}")
        self.hold(queue > 1, f"a request's waiting there is in the queue's time: {queue:.2f} s")
        return {
            "fired_seconds": fired,
            "seen_waiting_at_the_proxy": round(waiting, 1),
            "seen_waiting_in_a_replica": inside,
            "median_queue_seconds": round(queue, 2),
            "median_first_token_seconds": round(first, 2),
        }

    async def calm(self) -> dict[str, Any]:
        """The alerts clear, and every refusal of the proxy was counted."""

        async def clear() -> bool:
            return not await firing(str(self.prometheus)) & ALERTS

        taken = await self.until(clear, "the alerts clear")
        told = sum(call.turned_away for call in self.callers.calls)
        refused = f'elasti_admission_rejections_total{{{AT_THE_PROXY},reason="queue_full"}}'
        counted = self.measured(f"sum({refused})")
        self.hold(counted == told, f"all {told} refusals are counted: {counted:g}")
        lost = sum(not call.whole and not call.turned_away for call in self.callers.calls)
        failed = self.measured(f"sum({refused.replace('queue_full', 'internal')})")
        self.hold(failed == lost, f"all {lost} lost answers are counted: {failed:g}")
        return {
            "cleared_seconds": taken,
            "refusals_counted": counted,
            "lost_answers_counted": failed,
        }

    def measured(self, query: str) -> float:
        """What Prometheus answers now; NaN where that is nothing."""
        with httpx.Client(trust_env=False) as client:
            found = Prometheus(client, str(self.prometheus)).now(query, time.time())
        return found[0].values[-1] if found else math.nan

    async def watch(self) -> dict[str, Any]:
        """Prometheus finds both replicas by their list, under the names that one server has."""
        if self.prometheus is None:
            return {"skipped": "prometheus is not installed"}

        async def both() -> bool:
            return self.measured('sum(up{job="elastiformer"})') == 2

        taken = await self.until(both, "Prometheus sees two servers")
        await asyncio.sleep(3)
        working = "count(sum by (replica) (rate(elasti_generation_tokens_total[5s])) > 0)"
        self.hold(self.measured(working) == 2, "both are seen to generate tokens")
        return {"seconds_to_two": taken}

    async def shrink(self) -> dict[str, Any]:
        """Few call: a replica drains and goes, and nobody notices."""
        await self.callers.number(FEW)
        before = len(self.callers.calls)
        taken = await self.until_there_are(1)
        await asyncio.sleep(CALM_SECONDS)
        calls = self.callers.calls[before:]
        self.hold(all(call.whole for call in calls), f"nobody loses anything: {_lost(calls)}")
        return {"seconds_to_one": taken, "answers": len(calls)}


def _is_ours(call: Call, code: str) -> bool:
    """Whether a caller was told an error object with that code."""
    with suppress(ValueError, KeyError, TypeError):
        return bool(json.loads(call.told.partition(": ")[2])["error"]["code"] == code)
    return False


def _lost(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if not call.whole]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.ray.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="JSON of what was seen; a page comes beside it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        folder, port = Path(name), free_port()
        make_model(folder)
        address = f"http://{HOST}:{port}"
        watching = (
            scraping(folder, free_port(), jobs(address), SPEED)
            if shutil.which("prometheus")
            else nullcontext(None)
        )
        with running(small_fleet(folder), port, folder), watching as prometheus:
            drill = Drill(address, Callers(address, NAME), prometheus)
            report = asyncio.run(play(drill))
    report = {"setting": setting(["-m", "deploy.ray.drill"]), **report}
    if args.out:
        write(args.out, "A fleet on Ray Serve, in a drill", report, [table(report["scenes"])])
    print(json.dumps(report))
    return int(not report["well"])


def table(scenes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Everything that was seen, one row each."""
    rows = [
        [scene, what.replace("_", " "), _told(value)]
        for scene, seen in scenes.items()
        for what, value in seen.items()
    ]
    return Table("Seen", ("scene", "what", "seen"), rows)


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(f"`{each}`" for each in value) or "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)


async def play(drill: Drill) -> dict[str, Any]:
    """All scenes in their order."""
    begun = time.monotonic()
    seen: dict[str, Any] = {}
    await drill.until_there_are(1)
    for scene in (drill.leave, drill.grow, drill.watch, drill.kill, drill.flood, drill.shrink):
        say(f"{scene.__name__}: {scene.__doc__}")
        seen[scene.__name__] = await scene()
        say(f"  {json.dumps(seen[scene.__name__])}")
    await drill.callers.number(0)
    return {
        "well": not drill.wrong,
        "wrong": drill.wrong,
        "scenes": seen,
        "seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
