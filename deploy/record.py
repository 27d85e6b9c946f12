"""What a drill leaves behind: its report as JSON, and beside it a page with its table."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from benchmarks.results import Table
from training.files import write_atomically, write_json

_PACKAGES = ("torch", "transformers", "fastapi", "ray")


def setting(command: Sequence[str]) -> dict[str, Any]:
    """Where and when; a drill's seconds mean little without it."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1),  # of all that runs on the machine, at the end
        "versions": {name: told for name in _PACKAGES if (told := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *command]),
    }


def write(path: Path, title: str, report: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Write PATH and the page beside it; `report` has a `setting`."""
    where = report["setting"]
    versions = ", ".join(f"{name} {told}" for name, told in where["versions"].items())
    verdict = "All was as it should be." if report["well"] else "Not all was as it should be."
    parts = [
        f"# {title}\n",
        f"{where['processor']}, {where['cores']} cores, load {where['load']}; {versions}; "
        f"{where['date']}.\n",
        f"```bash\n{where['command']}\n```\n",
        f"{verdict} It took {report['seconds']:.0f} seconds.\n",
        *(table.markdown for table in tables),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(report))
    write_atomically(path.with_suffix(".md"), "\n".join(parts).encode())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
