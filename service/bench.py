"""The bench: a thread on which engines take turns.

On a CPU all engines share one. Each step uses all cores anyhow, and OpenMP keeps a pool of threads
for every thread that computes: with more of them than cores, it puts them to sleep after each
operator, and a step of one token takes twice as long. A GPU's engines have a bench each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
_LOOK_SECONDS = 1.0  # how often whoever waits for an end looks whether the thread lives


class Worker(Protocol):
    """What works on a bench; asked and called by its thread alone."""

    @property
    def has_work(self) -> bool:
        """Whether it wants a turn. Asked with `wake` held."""

    def take_turn(self) -> bool:
        """Do a bounded piece of work; False when it was the last one. Raises nothing."""

    def resting(self) -> AbstractContextManager[None]:
        """Entered while nobody on the bench has work."""


class Bench:
    """One thread and those who take turns on it.

    `wake` guards what the workers share with other threads; whoever gives them work notifies it.
    """

    def __init__(self, name: str) -> None:
        self.wake = threading.Condition(threading.RLock())
        self._workers: list[Worker] = []
        self._threads = torch.get_num_threads()
        self._name = name
        self._thread: threading.Thread | None = None

    def add(self, worker: Worker) -> None:
        """From now on it gets turns."""
        with self.wake:
            self._workers.append(worker)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self.wake.notify_all()

    def holds(self, worker: Worker) -> bool:
        """Whether it still gets turns."""
        with self.wake:
            lives = self._thread is not None and self._thread.is_alive()
            return lives and worker in self._workers

    def wait_for_end(self, worker: Worker) -> None:
        """Wait until it had its last turn."""
        with self.wake:
            while self.holds(worker):
                self.wake.wait(_LOOK_SECONDS)

    def _run(self) -> None:
        _compute_with(self._threads)
        while ready := self._ready():
            for worker in ready:
                if not worker.take_turn():
                    with self.wake:
                        self._workers.remove(worker)
                        self.wake.notify_all()

    def _ready(self) -> list[Worker]:
        """Wait until somebody wants a turn; nobody, when nobody is left."""
        with self.wake:
            while self._workers:
                if ready := [worker for worker in self._workers if worker.has_work]:
                    return ready
                with ExitStack() as resting:
                    for worker in self._workers:
                        resting.enter_context(worker.resting())
                    self.wake.wait()
            self._thread = None
            return []


def apart(work: Callable[[], T]) -> T:
    """Do something in a thread that ends, so that no pool of threads is kept for this one."""
    with _executor(1, torch.get_num_threads()) as passing:
        return passing.submit(work).result()


def helpers() -> ThreadPoolExecutor:
    """Threads for what is done beside an event loop; none of them ever has a pool."""
    return _executor(None, 1)


def _executor(workers: int | None, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=_compute_with, initargs=(threads,))


def _compute_with(threads: int) -> None:
    """Let this thread's operators use so many."""
    # A thread's first question gives it the number that any thread set last.
    torch.get_num_threads()
    torch.set_num_threads(threads)
