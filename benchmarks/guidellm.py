"""GuideLLM, an existing load generator, run as the program that it is and read back.

It has needs of its own that do not go with ours, so it lives in an environment of its own:

    python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1

and --guidellm guidellm/bin/guidellm names it. One run sends requests of one capacity; a mix of
capacities is several runs side by side, each at its part of the rate, and what counts is the
time that all of them share.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastiformer.errors import ElastiError

INSTALL = "python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1"
_START_SECONDS = 180.0  # a run loads large libraries, twice

# One process sends what a small machine can bear; more would take the server's cores.
_SETTINGS = {
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class LoadError(ElastiError):
    """A load generator that is missing or fails; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: requests of these sizes, for so long at each rate."""

    address: str
    model: str
    tokenizer: Path
    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sent:
    """One request, as its sender saw it; times of the wall clock, in seconds."""

    started: float
    first_token: float | None
    ended: float | None  # None: cut off when the time was over
    output_tokens: int
    failed: bool

    @property
    def to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    @property
    def between_tokens(self) -> float | None:
        """The mean over the request."""
        if self.ended is None or self.first_token is None or self.output_tokens < 2:
            return None
        return (self.ended - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Phase:
    """Everything sent at one rate, while all runs sent."""

    seconds: float
    requests: tuple[Sent, ...]


def find(named: str | None) -> str:
    """Raises LoadError, saying how to install it."""
    found = shutil.which(named or "guidellm")
    if found is None:
        raise LoadError(f"{named or 'guidellm'} is not there; install it: {INSTALL}")
    return found


def at_rate(
    program: str, load: Load, capacities: Sequence[object], rate: float, scratch: Path
) -> Phase:
    """Poisson arrivals at so many requests per second, spread over the capacities.

    Raises:
        LoadError: a run failed.
    """
    profile = {"kind": "poisson", "rate": [rate / len(capacities)]}
    return _together(program, load, capacities, profile, scratch)


def at_streams(program: str, load: Load, capacity: object, streams: int, scratch: Path) -> Phase:
    """So many requests open at all times; raises LoadError."""
    profile = {"kind": "concurrent", "streams": [streams]}
    return _together(program, load, [capacity], profile, scratch)


def _together(
    program: str,
    load: Load,
    capacities: Sequence[object],
    profile: Mapping[str, object],
    scratch: Path,
) -> Phase:
    """One run for each capacity, side by side, begun together."""
    runs = []
    for place, capacity in enumerate(capacities):
        said = scratch / f"run-{place}.json"
        said.unlink(missing_ok=True)
        plan = scratch / f"plan-{place}.json"
        plan.write_text(json.dumps(_plan(load, capacity, profile, said, place)))
        command = [program, "run", "--config", str(plan), "--disable-console"]
        runs.append((said, _start(command, scratch)))
    limit = load.seconds + _START_SECONDS
    read = []
    try:
        for said, process in runs:
            told, _ = process.communicate(timeout=limit)
            if process.returncode or not said.exists():
                raise LoadError(f"guidellm failed:\n{told[-2000:]}")
            (run,) = json.loads(said.read_text())["benchmarks"]
            read.append(run)
    except subprocess.TimeoutExpired:
        raise LoadError(f"guidellm did not end within {limit:.0f} seconds") from None
    finally:
        for _, process in runs:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return phase_of(read)


def _start(command: Sequence[str], scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=scratch,
        env=os.environ | _SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _plan(
    load: Load,
    capacity: object,
    profile: Mapping[str, object],
    said: Path,
    seed: int,
) -> dict[str, Any]:
    return {
        "metadata": {"name": "load"},
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": load.address,
                "model": load.model,
                "request_format": "/v1/completions",
                "http2": False,
                "extras": {"body": {"capacity": capacity, "temperature": 0}},
            },
            "tokenizer": {"kind": "huggingface_auto", "model": str(load.tokenizer)},
            "data": [
                {
                    "kind": "synthetic_text",
                    "prompt_tokens": load.prompt_tokens,
                    "output_tokens": load.output_tokens,
                }
            ],
            "constraints": [{"kind": "max_duration", "seconds": load.seconds}],
            "seed": {"kind": "static", "value": seed},
            "outputs": [{"kind": "json", "path": str(said)}],
            "profile": profile,
        },
        "benchmarks": [{}],
    }


def phase_of(runs: Sequence[Mapping[str, Any]]) -> Phase:
    began = max(run["scheduler_metrics"]["measure_start_time"] for run in runs)
    ended = min(run["scheduler_metrics"]["measure_end_time"] for run in runs)
    requests = [
        _sent(entry, kind)
        for run in runs
        for kind in ("successful", "errored", "incomplete")
        for entry in run["requests"][kind]
        if entry["info"]["timings"]["request_start"] is not None
    ]
    inside = tuple(each for each in requests if began <= each.started < ended)
    return Phase(max(ended - began, 0.0), inside)


def _sent(entry: Mapping[str, Any], kind: str) -> Sent:
    timings = entry["info"]["timings"]
    return Sent(
        started=timings["request_start"],
        first_token=timings["first_token_iteration"],
        ended=timings["request_end"] if kind == "successful" else None,
        output_tokens=int(entry.get("output_tokens") or 0),
        failed=kind == "errored",
    )
