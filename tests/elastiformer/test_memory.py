"""What one step frees is there for the next one."""

from __future__ import annotations

import mmap
import resource

import pytest
import torch

from elastiformer import memory

TENSORS, BYTES = 8, 4 << 20


def test_memory_that_was_freed_is_not_fetched_from_the_system_again():
    if not memory.keep_freed():
        pytest.skip("another C library, or the environment says otherwise")
    written = [_written() for _ in range(4)]
    assert written[-1] < TENSORS * BYTES // mmap.PAGESIZE // 10


def _written() -> int:
    """The pages that the system had to give for some tensors, which are then freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(BYTES // 4) for _ in range(TENSORS)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
