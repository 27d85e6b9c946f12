"""GuideLLM, an existing load generator, run as the program that it is and read back.

It says whether our own sender (`benchmarks/sender.py`) is to be believed: the same moments and
prompts, as a trace that it replays. A run of it sends requests of one capacity only, and several
side by side starve each other and the server on a small machine, so mixes are our sender's alone.
Its own arrivals at random are not used: where its worker is quicker than its first process, release
0.8.1 takes them to be due since 1970, and sends all at once.

It has needs of its own that do not go with ours, so it lives in an environment of its own:

    python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1

and --guidellm guidellm/bin/guidellm names it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.sender import PATH, Due, Phase, Sent
from benchmarks.server import NAME
from elastiformer.errors import ElastiError

INSTALL = "python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1"
_START_SECONDS = 180.0  # a run loads large libraries, several times

# One process sends what a small machine can bear; more would take the server's cores.
_SETTINGS = {
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class LoadError(ElastiError):
    """A load generator that is missing or fails; the message says what it said."""


def find(named: str | None) -> str:
    """Raises LoadError, saying how to install it."""
    found = shutil.which(named or "guidellm")
    if found is None:
        raise LoadError(f"{named or 'guidellm'} is not there; install it: {INSTALL}")
    return str(Path(found).absolute())


def replay(
    program: str,
    address: str,
    tokenizer: PreTrainedTokenizerBase,
    dues: Sequence[Due],
    tokens: int,
    seconds: float,
    scratch: Path,
) -> Phase:
    """What is due, all of one capacity, cut off `seconds` after the first moment.

    Raises:
        LoadError: nothing is due, or the run failed.
    """
    if not dues:
        raise LoadError(f"nothing is due within {seconds:g} seconds; guidellm needs a request")
    (capacity,) = {json.dumps(due.capacity) for due in dues}
    plan, trace, said = (scratch / name for name in ("plan.json", "trace.jsonl", "run.json"))
    rows = [
        {
            "prompt": tokenizer.decode(list(due.prompt)),
            "output_tokens_count": tokens,
            "relative_timestamp": due.second,
        }
        for due in dues
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said.unlink(missing_ok=True)
    # Its time begins with the first request, and not with the first moment.
    lasting = seconds - dues[0].second
    backend = {
        "kind": "openai_http",
        "target": address,
        "model": NAME,
        "request_format": PATH,
        "http2": False,
        "extras": {"body": {"capacity": json.loads(capacity), "temperature": 0}},
    }
    spec = {
        "backend": backend,
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer.name_or_path)},
        "data": [{"kind": "json_file", "path": str(trace)}],
        "constraints": [{"kind": "max_duration", "seconds": lasting}],
        "outputs": [{"kind": "json", "path": str(said)}],
        "profile": {"kind": "replay", "schedule_turn": "timestamp"},
    }
    plan.write_text(json.dumps({"metadata": {"name": "load"}, "spec": spec, "benchmarks": [{}]}))
    told = _run([program, "run", "--config", str(plan), "--disable-console"], scratch, seconds)
    if not said.exists():
        raise LoadError(f"guidellm failed:\n{told[-2000:]}")
    (run,) = json.loads(said.read_text())["benchmarks"]
    return Phase(seconds, tuple(_requests(run)))


def _run(command: Sequence[str], scratch: Path, seconds: float) -> str:
    """What it said; its processes end with it, whatever becomes of it."""
    told = scratch / "said.txt"
    limit = seconds + _START_SECONDS
    with told.open("w") as lines:
        # To a file: a process of its that outlived it would hold a pipe open for ever.
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=os.environ | _SETTINGS,
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise LoadError(f"guidellm did not end within {limit:.0f} seconds") from None
        finally:
            _end(process)
    return told.read_text("utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _requests(run: Mapping[str, Any]) -> Iterator[Sent]:
    """Those that went out."""
    for kind in ("successful", "errored", "incomplete"):
        for entry in run["requests"][kind]:
            if entry["info"]["timings"]["request_start"] is not None:
                yield _sent(entry, kind)


def _sent(entry: Mapping[str, Any], kind: str) -> Sent:
    timings = entry["info"]["timings"]
    return Sent(
        started=timings["request_start"],
        first_token=timings["first_token_iteration"],
        ended=timings["request_end"] if kind == "successful" else None,
        output_tokens=int(entry.get("output_tokens") or 0),
        failed=kind == "errored",
    )
