"""A test that runs alone waits for the others, and they for it, in the order in which they came."""

import fcntl
import threading
import time
from functools import partial

import pytest

from tests.turns import taken

PATIENCE_SECONDS = 120  # only what hangs takes so long


@pytest.fixture
def turn(tmp_path):
    door, house = tmp_path / "door", tmp_path / "house"
    door.touch()
    house.touch()
    return partial(taken, door=door, house=house)


class Visitor:
    """Takes a turn on a thread of its own, and keeps it until it is told to leave."""

    def __init__(self, turn, alone):
        self.is_in, self._may_leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._visit, args=(turn, alone))
        self._thread.start()

    def _visit(self, turn, alone):
        with turn(alone=alone):
            self.is_in.set()
            assert self._may_leave.wait(PATIENCE_SECONDS)

    @property
    def waits(self):
        return not self.is_in.wait(0.2)

    def is_at(self, door):
        """Wait until somebody stands at the door."""
        with door.open() as mine:
            while True:
                try:
                    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                fcntl.flock(mine, fcntl.LOCK_UN)
                time.sleep(0.01)

    def leave(self):
        self._may_leave.set()
        self._thread.join()


def test_others_run_together(turn):
    first, second = Visitor(turn, alone=False), Visitor(turn, alone=False)
    assert first.is_in.wait(PATIENCE_SECONDS) and second.is_in.wait(PATIENCE_SECONDS)
    first.leave()
    second.leave()


def test_who_is_alone_waits_for_the_others_and_comes_before_who_came_after(turn):
    first = Visitor(turn, alone=False)
    assert first.is_in.wait(PATIENCE_SECONDS)
    alone = Visitor(turn, alone=True)
    alone.is_at(turn.keywords["door"])
    assert alone.waits
    late = Visitor(turn, alone=False)
    assert late.waits and alone.waits
    first.leave()
    assert alone.is_in.wait(PATIENCE_SECONDS) and late.waits
    alone.leave()
    assert late.is_in.wait(PATIENCE_SECONDS)
    late.leave()


def test_a_turn_ends_with_its_error(turn):
    with pytest.raises(KeyError), turn(alone=True):
        raise KeyError
    with turn(alone=True):
        pass
