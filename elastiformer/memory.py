"""What one step frees stays with the process, for the next step.

The results of a step over many rows are megabytes each. glibc gives such memory back to the
system when it is freed, and gets it page by page when it is next written to: a quarter of the
time of a batch of images. It knows nothing of models, and on another C library it does nothing.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT_BYTES = 256 << 20  # of what was freed, at most
_LARGEST_BYTES = 32 << 20  # of one result, that is kept; the most that glibc allows

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in malloc.h
_BY_OPERATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed() -> bool:
    """Ask the C library for it, once, unless the environment says otherwise; whether it agreed."""
    if any(name in os.environ for name in _BY_OPERATOR):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(
        set_option(_TRIM_THRESHOLD, KEPT_BYTES) and set_option(_MMAP_THRESHOLD, _LARGEST_BYTES)
    )
