"""Do the alerts fire when they should, and clear after? A drill, on the loopback address alone.

    python -m deploy.drill [--speed 60] [--out DRILL.json]

A real Prometheus with the rules of deploy/prometheus scrapes the real server, which serves a tiny
model under a gentle load. Every window and every `for` of the rules is shorter by `--speed`, so
that an hour is a minute. Then things go wrong, one after the other: too many requests, an engine
that hangs, one that dies, a server that is killed, an adapter that is not there, requests too
short for what they ask, targets that are gone. It takes some twelve minutes and stops by itself.
Needs `prometheus`.

Progress goes to stderr. The last line of stdout is one JSON object; 1 is returned where an alert
did not fire, did not clear, or fired while all was well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Table
from deploy.faults import DIE, HANG
from deploy.record import setting, write
from deploy.stage import FLOOD, SHORT, USUAL, Stage, free_port, make_model, say
from deploy.watch import Watch

QUIET_SECONDS = 100  # some more than the hour, made short, over which savings are compared
FIRE_SECONDS, CLEAR_SECONDS = 180.0, 240.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Something that goes wrong, what must be told of it, and how it is put right."""

    name: str
    alerts: frozenset[str]
    cause: Callable[[], Awaitable[None]]
    cure: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a scene: seconds until each alert fired, and until all were clear again."""

    scene: str
    fired_seconds: dict[str, float]
    also: tuple[str, ...]  # other alerts, that may come with it
    missing: tuple[str, ...]
    cleared_seconds: float | None

    @property
    def well(self) -> bool:
        return not self.missing and self.cleared_seconds is not None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speed", type=float, default=60.0, help="by which durations are shorter")
    parser.add_argument("--out", type=Path, help="JSON of what was seen; a page comes beside it")
    args = parser.parse_args(argv)
    if shutil.which("prometheus") is None:
        say("error: prometheus is not installed (Debian: prometheus)")
        return 2
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        stage = Stage(Path(folder), free_port())
        make_model(stage.folder)
        stage.faults.mkdir()
        watch = Watch(stage.folder, free_port(), args.speed, f"127.0.0.1:{stage.port}")
        try:
            with watch.running():
                report = asyncio.run(drill(stage, watch))
        finally:
            stage.close()
    command = ["-m", "deploy.drill", "--speed", f"{args.speed:g}"]
    report = {"setting": setting(command), **report}
    if args.out:
        write(args.out, "The alerts, in a drill", report, [table(report["scenes"])])
    print(json.dumps(report))
    return int(not report["well"])


def scenes(stage: Stage, watch: Watch) -> tuple[Scene, ...]:
    """All of them, in their order."""
    return (
        Scene(
            "more requests than can be done",
            frozenset(
                {
                    "ElastiQueueGrowing",
                    "ElastiQueueFull",
                    "ElastiErrorRate",
                    "ElastiFirstTokenBudgetBurnsFast",
                    "ElastiFirstTokenBudgetBurnsSlowly",
                }
            ),
            lambda: stage.flood_with(FLOOD),
            lambda: stage.flood_with(0),
        ),
        Scene(
            "an engine that hangs",
            frozenset({"ElastiEngineStalled"}),
            lambda: stage.fault(HANG),
            lambda: stage.mend(HANG),
        ),
        Scene(
            "an engine that dies",
            frozenset({"ElastiEngineDead", "ElastiErrorRate"}),
            lambda: stage.fault(DIE),
            stage.restart,
        ),
        Scene(
            "a server that is killed",
            frozenset({"ElastiServerDown"}),
            lambda: stage.stop_server(signal.SIGKILL),
            stage.start_server,
        ),
        Scene(
            "a server without its adapter",
            frozenset({"ElastiAdapterDropped", "ElastiSavingsGone"}),
            stage.drop_adapter,
            stage.restart,
        ),
        Scene(
            "requests too short for their capacity",
            frozenset({"ElastiSpendOffCapacity"}),
            lambda: stage.ask(SHORT),
            lambda: stage.ask(USUAL),
        ),
        Scene(
            "no targets",
            frozenset({"ElastiServersMissing"}),
            lambda: _show(watch, False),
            lambda: _show(watch, True),
        ),
    )


async def _show(watch: Watch, there: bool) -> None:
    watch.show(there)


async def drill(stage: Stage, watch: Watch) -> dict[str, Any]:
    """All scenes in their order; the callers call all the while."""
    begun = time.monotonic()
    await stage.start_server()
    callers = [
        asyncio.create_task(stage.call_gently()),
        asyncio.create_task(stage.call_in_a_flood()),
    ]
    try:
        say(f"all is well, for {QUIET_SECONDS} seconds")
        early: frozenset[str] = frozenset()
        for _ in range(QUIET_SECONDS):
            await asyncio.sleep(1)
            early |= await watch.firing()
        say(f"  fired meanwhile: {', '.join(sorted(early)) or 'nothing'}")
        seen = [await play(watch, scene) for scene in scenes(stage, watch)]
        left = await calm(watch, await watch.firing())
    finally:
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return {
        "well": not early and left is not None and all(each.well for each in seen),
        "speed": watch.speed,
        "fired_while_all_was_well": sorted(early),
        "scenes": [asdict(each) for each in seen],
        "answers": {str(status): count for status, count in sorted(stage.answers.items())},
        "seconds": round(time.monotonic() - begun, 1),
    }


def table(scenes: Sequence[Mapping[str, Any]]) -> Table:
    """What came of each scene; seconds of the drill, whose rules are shorter."""
    return Table(
        "Scenes",
        ("what goes wrong", "fired after", "came with it", "cleared after"),
        [
            [
                each["scene"],
                ", ".join(f"{alert} {taken:g} s" for alert, taken in each["fired_seconds"].items())
                + "".join(f", {alert} not" for alert in each["missing"]),
                ", ".join(each["also"]) or "nothing",
                "not" if each["cleared_seconds"] is None else f"{each['cleared_seconds']:g} s",
            ]
            for each in scenes
        ],
    )


async def play(watch: Watch, scene: Scene) -> Seen:
    say(scene.name)
    await calm(watch, scene.alerts)  # what an earlier scene left shall not be taken for this one's
    before = await watch.firing()
    begun = time.monotonic()
    await scene.cause()
    fired: dict[str, float] = {}
    also: frozenset[str] = frozenset()
    while not scene.alerts <= fired.keys() and time.monotonic() - begun < FIRE_SECONDS:
        await asyncio.sleep(0.5)
        now = await watch.firing()
        for alert in sorted(now & scene.alerts - fired.keys()):
            fired[alert] = round(time.monotonic() - begun, 1)
            say(f"  {fired[alert]:6.1f} s  {alert}")
        also |= now - scene.alerts - before
    await scene.cure()
    cleared = await calm(watch, scene.alerts)
    say(f"  cleared {f'{cleared:.1f} s after' if cleared is not None else 'not'}")
    missing = tuple(sorted(scene.alerts - fired.keys()))
    return Seen(scene.name, fired, tuple(sorted(also)), missing, cleared)


async def calm(watch: Watch, alerts: frozenset[str]) -> float | None:
    """Seconds until none of these fires; None if they do not stop."""
    begun = time.monotonic()
    while time.monotonic() - begun < CLEAR_SECONDS:
        if not alerts & await watch.firing():
            return round(time.monotonic() - begun, 1)
        await asyncio.sleep(0.5)
    return None


if __name__ == "__main__":
    sys.exit(main())
