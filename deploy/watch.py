"""The Prometheus of a drill: the rules of deploy/prometheus made short, and what fires now."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

RULES = Path(__file__).resolve().parent / "prometheus" / "rules"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?<![\w.])(\d+)([smhd])\b")  # not the end of a series' name


@dataclass(frozen=True, slots=True)
class Watch:
    """A Prometheus that looks at one server, through rules that are shorter by `speed`."""

    folder: Path
    port: int
    speed: float
    target: str  # host:port

    def show(self, there: bool) -> None:
        """Let Prometheus know of the server, or of none."""
        targets = [{"targets": [self.target]}] if there else []
        beside = self.folder / "targets.json.new"
        beside.write_text(json.dumps(targets), "utf-8")
        beside.rename(self.folder / "targets.json")

    async def firing(self) -> frozenset[str]:
        return await firing(f"http://127.0.0.1:{self.port}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prometheus itself, which ends with the block."""
        self.show(True)
        found = [{"files": ["targets.json"], "refresh_interval": "1s"}]
        job = {"job_name": "elastiformer", "file_sd_configs": found}
        with scraping(self.folder, self.port, [job], self.speed):
            yield


async def firing(address: str) -> frozenset[str]:
    """The alerts that a Prometheus fires now."""
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        answer = await client.get(f"{address}/api/v1/alerts")
    alerts = answer.raise_for_status().json()["data"]["alerts"]
    return frozenset(a["labels"]["alertname"] for a in alerts if a["state"] == "firing")


@contextmanager
def scraping(
    folder: Path, port: int, jobs: Sequence[Mapping[str, Any]], speed: float
) -> Iterator[str]:
    """Prometheus over these jobs and the rules, shorter by `speed`; its address, until the block
    is left.
    """
    rules = folder / "rules"
    rules.mkdir()
    for path in sorted(RULES.glob("*.yml")):
        (rules / path.name).write_text(shortened(path.read_text("utf-8"), speed), "utf-8")
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules/*.yml"],
        "scrape_configs": list(jobs),
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings), "utf-8")
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'measured'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--query.lookback-delta=5s",
        "--log.level=warn",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
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
