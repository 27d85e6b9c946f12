"""Files of the offline rooms: written whole or not at all, and what is wrong with data said aloud.

A file written here appears under its name only when every byte of it is on disk, so a reader
never sees half of one, whenever the writer was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from elastiformer.errors import ElastiError


class DataError(ElastiError):
    """Training data that is missing, empty or malformed; the message names file and line."""


class RunError(ElastiError):
    """A training run that cannot begin, go on or be resumed; the message says why."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: afterwards `path` holds `content`, or what it held."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is on disk only after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def same_run(path: Path, options: Mapping[str, object], free: Collection[str]) -> None:
    """Note what is run, or refuse to mix it with what another run has left.

    Args:
        free: options in which a run may differ from the one that it goes on with.
    """
    noted = {name: value for name, value in options.items() if name not in free}
    noted = json.loads(json.dumps(noted, default=str))
    if path.exists() and (before := json.loads(path.read_text())) != noted:
        changed = [name for name in noted if before.get(name) != noted[name]]
        raise RunError(
            f"{path.parent}: holds a run with another {', '.join(changed)}; choose another --out"
        )
    write_json(path, noted)
