"""Loops are compiled by one process at a time, and found by those that waited for it."""

from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from elastiformer.kernels import compiled


@compiled()
def _twice(number):
    return number * 2


@compiled()
def _twice_and_one(number):
    return _twice(number) + 1


def test_who_compiles_a_loop_holds_its_lock_and_that_of_no_other(monkeypatch):
    compile_first, kept = _twice._compiler.compile, _twice._cache._cache_file
    monkeypatch.setattr(kept, "_load_index", dict)  # as in an empty folder
    places = [Path(each._cache._cache_file._index_path) for each in (_twice, _twice_and_one)]
    own, other = (FileLock(place.with_suffix(".lock"), timeout=0) for place in places)
    compilations = []

    def compile_under_lock(*signature):
        with pytest.raises(Timeout):
            own.acquire()
        with other:
            compilations.append(signature)
        return compile_first(*signature)

    monkeypatch.setattr(_twice._compiler, "compile", compile_under_lock)
    assert _twice(3) == 6
    assert len(compilations) == 1
    with own:  # it was let go
        pass


def test_a_loop_that_calls_another_compiles_both():
    assert _twice_and_one(2.5) == 6.0
