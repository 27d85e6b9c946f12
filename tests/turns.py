"""Whose turn it is where several processes share the tests.

A test that measures time runs alone: it begins when what the others are at has ended, and they
begin nothing before it has ended itself.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DOOR, _HOUSE = Path(__file__), Path(__file__).with_name("conftest.py")  # only to be locked


@contextmanager
def taken(alone: bool, door: Path = _DOOR, house: Path = _HOUSE) -> Iterator[None]:
    """A turn beside others, or alone; who wants one alone is next, whoever comes after."""
    with door.open() as at_door, house.open() as in_house:
        fcntl.flock(at_door, fcntl.LOCK_EX)
        fcntl.flock(in_house, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        # Let go by name: a process forked meanwhile would keep what closing lets go.
        fcntl.flock(at_door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(in_house, fcntl.LOCK_UN)
