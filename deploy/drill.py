"""Do the alerts fire when they should, and clear after? A drill, on the loopback address alone.

    python -m deploy.drill [--speed 60] [--out DRILL.json]

A real Prometheus with the rules of deploy/prometheus scrapes the real server, which serves a tiny
model under a gentle load. Every window and every `for` of the rules is shorter by `--speed`, so
that an hour is a minute. Then things go wrong, one after the other: too many requests, an engine
that hangs, one that dies, a server that is killed, an adapter that is not there, targets that are
gone. It takes about ten minutes and stops by itself. Needs `prometheus`.

Progress goes to stderr. The last line of stdout is one JSON object; 1 is returned where an alert
did not fire, did not clear, or fired while all was well.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.models import routed_tokens
from deploy.faults import DIE, HANG
from elastiformer import ElasticModel
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules"
NAME, LAYERS = "drilled", 12
QUIET_SECONDS = 100  # some more than the hour, made short, over which savings are compared
FIRE_SECONDS, CLEAR_SECONDS, START_SECONDS = 180.0, 240.0, 120.0
FLOOD, MAX_WAITING, MAX_RUNNING = 96, 64, 4
GENTLE_SECONDS = 0.3  # between an answer and the next request
CAPACITIES = (0.5, 0.6, 0.7)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?<![\w.])(\d+)([smhd])\b")  # not the end of a series' name


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


@dataclass
class Stage:
    """The server, Prometheus and the callers."""

    folder: Path
    speed: float
    port: int
    watch_port: int
    capacities: tuple[float, ...] = CAPACITIES
    flood: int = 0
    answers: dict[int, int] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start_server(self, adapter: bool = True) -> None:
        model = f"{NAME}={self.folder / 'base'}"
        model += f",adapter={self.folder / 'adapter'}" if adapter else ""
        flags = {
            "--port": self.port,
            "--model": model,
            "--threads": 1,
            "--max-waiting": MAX_WAITING,
            "--max-running": MAX_RUNNING,
            "--drain-seconds": 1,
            "--log-level": "critical",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "deploy.faults", str(self.faults), *words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )
        await self._until(self._is_ready, START_SECONDS, "the server is not ready")

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    async def _is_ready(self) -> bool:
        assert self._server is not None and self._server.poll() is None, "the server has ended"
        async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
            with suppress(httpx.HTTPError):
                return (await client.get(f"{self.address}/ready")).status_code == 200
        return False

    async def _until(self, true: Callable[[], Awaitable[bool]], most: float, told: str) -> None:
        deadline = time.monotonic() + most
        while not await true():
            assert time.monotonic() < deadline, f"{told} after {most:g} seconds"
            await asyncio.sleep(0.5)

    async def stop_server(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self._server is not None
        self._server.send_signal(how)
        await asyncio.to_thread(self._server.wait, 30)

    def close(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.kill()
            self._server.wait()

    async def firing(self) -> frozenset[str]:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            answer = await client.get(f"http://127.0.0.1:{self.watch_port}/api/v1/alerts")
        alerts = answer.raise_for_status().json()["data"]["alerts"]
        return frozenset(a["labels"]["alertname"] for a in alerts if a["state"] == "firing")

    # Callers.

    async def call_gently(self) -> None:
        """One request after the other, with a pause between, for as long as the drill lasts."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            for number in itertools.count():
                await self._call(client, self.capacities[number % len(self.capacities)], 24)
                await asyncio.sleep(GENTLE_SECONDS)

    async def call_in_a_flood(self) -> None:
        """Whoever gets an answer asks again at once, and who is refused, soon."""
        limits = httpx.Limits(max_connections=FLOOD)
        async with httpx.AsyncClient(trust_env=False, timeout=120, limits=limits) as client:

            async def one(number: int) -> None:
                while True:
                    if number >= self.flood:
                        await asyncio.sleep(0.5)
                    elif await self._call(client, CAPACITIES[number % 3], 48) != 200:
                        await asyncio.sleep(1.0)

            await asyncio.gather(*map(one, range(FLOOD)))

    async def _call(self, client: httpx.AsyncClient, capacity: float, tokens: int) -> int:
        body = {"model": NAME, "prompt": "Once upon", "max_tokens": tokens, "capacity": capacity}
        try:
            answer = await client.post(
                f"{self.address}/v1/completions", json=body | {"ignore_eos": True}
            )
            status = answer.status_code
        except httpx.HTTPError:
            status = 0  # no server: that is what some scenes are about
        self.answers[status] = self.answers.get(status, 0) + 1
        return status

    # What goes wrong.

    def scenes(self) -> tuple[Scene, ...]:
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
                lambda: self._flood(FLOOD),
                lambda: self._flood(0),
            ),
            Scene(
                "an engine that hangs",
                frozenset({"ElastiEngineStalled"}),
                lambda: self._fault(HANG),
                lambda: self._mend(HANG),
            ),
            Scene(
                "an engine that dies",
                frozenset({"ElastiEngineDead", "ElastiErrorRate"}),
                lambda: self._fault(DIE),
                self._restart,
            ),
            Scene(
                "a server that is killed",
                frozenset({"ElastiServerDown"}),
                lambda: self.stop_server(signal.SIGKILL),
                self.start_server,
            ),
            Scene(
                "a server without its adapter",
                frozenset({"ElastiAdapterDropped", "ElastiSavingsGone"}),
                self._drop_adapter,
                self._restart,
            ),
            Scene(
                "no targets",
                frozenset({"ElastiServersMissing"}),
                lambda: self.target(False),
                lambda: self.target(True),
            ),
        )

    async def _flood(self, callers: int) -> None:
        self.flood = callers

    async def _fault(self, name: str) -> None:
        (self.faults / name).touch()

    async def _mend(self, name: str) -> None:
        (self.faults / name).unlink()

    async def _restart(self) -> None:
        await self.stop_server(signal.SIGKILL)
        (self.faults / DIE).unlink(missing_ok=True)
        self.capacities = CAPACITIES
        await self.start_server()

    async def _drop_adapter(self) -> None:
        await self.stop_server()
        self.capacities = (1.0,)
        await self.start_server(adapter=False)

    async def target(self, there: bool) -> None:
        targets = [{"targets": [f"127.0.0.1:{self.port}"]}] if there else []
        beside = self.folder / "targets.json.new"
        beside.write_text(json.dumps(targets), "utf-8")
        beside.rename(self.folder / "targets.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speed", type=float, default=60.0, help="by which durations are shorter")
    parser.add_argument("--out", type=Path, help="file for what was seen, as JSON")
    args = parser.parse_args(argv)
    if shutil.which("prometheus") is None:
        say("error: prometheus is not installed (Debian: prometheus)")
        return 2
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        stage = Stage(Path(folder), args.speed, free_port(), free_port())
        make_model(stage.folder)
        stage.faults.mkdir()
        with watched(stage):
            report = asyncio.run(drill(stage))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))
    return int(not report["well"])


async def drill(stage: Stage) -> dict[str, Any]:
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
            early |= await stage.firing()
        say(f"  fired meanwhile: {', '.join(sorted(early)) or 'nothing'}")
        seen = [await play(stage, scene) for scene in stage.scenes()]
        left = await calm(stage, await stage.firing())
    finally:
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return {
        "well": not early and left is not None and all(each.well for each in seen),
        "speed": stage.speed,
        "fired_while_all_was_well": sorted(early),
        "scenes": [asdict(each) for each in seen],
        "answers": {str(status): count for status, count in sorted(stage.answers.items())},
        "seconds": round(time.monotonic() - begun, 1),
    }


async def play(stage: Stage, scene: Scene) -> Seen:
    say(scene.name)
    await calm(stage, scene.alerts)  # what an earlier scene left shall not be taken for this one's
    before = await stage.firing()
    begun = time.monotonic()
    await scene.cause()
    fired: dict[str, float] = {}
    also: frozenset[str] = frozenset()
    while not scene.alerts <= fired.keys() and time.monotonic() - begun < FIRE_SECONDS:
        await asyncio.sleep(0.5)
        now = await stage.firing()
        for alert in sorted(now & scene.alerts - fired.keys()):
            fired[alert] = round(time.monotonic() - begun, 1)
            say(f"  {fired[alert]:6.1f} s  {alert}")
        also |= now - scene.alerts - before
    await scene.cure()
    cleared = await calm(stage, scene.alerts)
    say(f"  cleared {f'{cleared:.1f} s after' if cleared is not None else 'not'}")
    missing = tuple(sorted(scene.alerts - fired.keys()))
    return Seen(scene.name, fired, tuple(sorted(also)), missing, cleared)


async def calm(stage: Stage, alerts: frozenset[str]) -> float | None:
    """Seconds until none of these fires; None if they do not stop."""
    begun = time.monotonic()
    while time.monotonic() - begun < CLEAR_SECONDS:
        if not alerts & await stage.firing():
            return round(time.monotonic() - begun, 1)
        await asyncio.sleep(0.5)
    return None


def make_model(folder: Path) -> None:
    """A tiny model, and an adapter that leaves tokens out of all its layers."""
    tiny("llama", num_hidden_layers=LAYERS).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = ElasticModel.load(str(folder / "base"), None, dtype="float32", device="cpu")
    routed_tokens(model, kv="complete")
    assert model.adapter is not None
    model.adapter.save(folder / "adapter")


@contextmanager
def watched(stage: Stage) -> Iterator[None]:
    """Prometheus, with the rules made short; it and the server end with the block."""
    rules = stage.folder / "rules"
    rules.mkdir()
    for path in sorted(RULES.glob("*.yml")):
        (rules / path.name).write_text(shortened(path.read_text("utf-8"), stage.speed), "utf-8")
    asyncio.run(stage.target(True))
    job = {
        "job_name": "elastiformer",
        "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}],
    }
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules/*.yml"],
        "scrape_configs": [job],
    }
    (stage.folder / "prometheus.yml").write_text(yaml.safe_dump(settings), "utf-8")
    command = [
        "prometheus",
        f"--config.file={stage.folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={stage.folder / 'measured'}",
        f"--web.listen-address=127.0.0.1:{stage.watch_port}",
        "--query.lookback-delta=5s",
        "--log.level=warn",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        stage.close()
        process.terminate()
        process.wait(30)


def shortened(text: str, speed: float) -> str:
    """Rules whose windows, offsets and patience are shorter by `speed`."""

    def shorter(found: re.Match[str]) -> str:
        return f"{round(int(found[1]) * _UNITS[found[2]] * 1000 / speed)}ms"

    held = yaml.safe_load(text)
    for group in held["groups"]:
        for rule in group["rules"]:
            for place in {"expr", "for"} & rule.keys():
                rule[place] = _DURATION.sub(shorter, rule[place])
    return str(yaml.safe_dump(held))


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
