"""Where the tiny models of the tests live: on the CPU, or on the device of ELASTI_TEST_DEVICE.

`ELASTI_TEST_DEVICE=cuda pytest tests/elastiformer` runs the same promises on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("ELASTI_TEST_DEVICE", "cpu"))
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into what only a CPU runs")
