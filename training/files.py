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
from elastiformer.whole_files import write_whole


class DataError(ElastiError):
    """Training data that is missing, empty or malformed; the message names file and line."""


class RunError(ElastiError):
    """A training run that cannot begin, go on or be resumed; the message says why."""


def write_atomically(path: Path, content: bytes) -> None:
    """Afterwards `path` holds `content`, or what it held, and its name is on disk too."""
    write_whole(path, content)
    sync_folder(path.parent)


def check_writable(option: str, path: Path, is_folder: bool = True) -> None:
    """Refuse a place that results cannot be written to, before there are any.

    Args:
        option: that names the place.
        is_folder: what is written there is a folder, not a file.

    Raises:
        RunError: it is of the other sort, or what it would lie in takes nothing.
    """
    if path.exists() and path.is_dir() != is_folder:
        found, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise RunError(f"{option} {path}: is a {found}; the name of a {wanted} is expected")
    around = [path, *path.parents] if is_folder else list(path.parents)
    holder = next(each for each in around if each.exists())
    if not holder.is_dir():
        raise RunError(f"{option} {path}: {holder} is a file, in which nothing can lie")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise RunError(f"{option} {path}: {holder} cannot be written to")


def run_beside(out: Path) -> Path:
    """The folder of a run's own files, beside what it makes.

    Raises:
        RunError: what it makes has no name of its own, as `.` has none.
    """
    if out.name in ("", ".."):
        raise RunError(f"--out {out}: a folder's name is expected, beside which {out}.run can lie")
    return out.with_name(out.name + ".run")


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
