"""Files that appear whole or not at all: each is written beside its place, and then renamed.

A reader sees the old content or the new, whenever the writer was killed. What is being written is
locked, and a lock ends with its process: so the next writer to the same place knows what a killed
one has left, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: afterwards `path` holds `content`, or what it held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        with beside.open("xb") as file:
            _lock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # taken for a killed writer's, in the moment before it was locked
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            return


def _remove_left(path: Path) -> None:
    """Remove what killed writers left beside a path, and nothing that is still being written."""
    named = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.part")
    for left in [each for each in path.parent.iterdir() if named.fullmatch(each.name)]:
        try:
            with left.open("rb") as file:
                if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    left.unlink(missing_ok=True)
        except OSError:  # gone meanwhile, or not ours to remove
            continue


def _lock(file: BinaryIO, how: int) -> bool:
    """Whether a file is ours alone now; False too where a file system knows no locks."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True
