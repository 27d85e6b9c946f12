"""Being told to stop: a first signal is remembered, so that the step can end; a second kills."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

GOES_ON = "the same command goes on where it was"


class Stop:
    """`with Stop("step") as stop:` … `stop.asked` is True after the first SIGINT or SIGTERM."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ends: str | None) -> None:
        """
        Args:
            ends: what is ended first, as whoever stops is told at once; None: nothing is said.
        """
        self.asked = False
        self._ends = ends
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        # Python lets only the main thread set handlers; elsewhere the caller decides.
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._ask) for each in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        if self._ends is not None:
            tell(f"stopping after this {self._ends}; Ctrl-C again stops at once")

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def tell(line: str) -> None:
    """Say a line on stderr, whatever else is being written there: beside a bar, say."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
