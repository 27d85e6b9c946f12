"""Weights in tiles, the search for channels, and the product over picks: against PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elastiformer import kernels, largest
from elastiformer.families import Projection
from elastiformer.products import Product
from elastiformer.readings import Reading, pick
from elastiformer.tiles import (
    Picks,
    Tiles,
    Wanted,
    all_searched,
    even_starts,
    everything,
    search,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


def grid(outputs: int, inputs: int, levels: int, centre: int) -> torch.Tensor:
    """A weight as GGUF dequantises it: float16 steps times whole numbers, per 32 inputs."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    groups = -(-inputs // 32)
    codes = torch.randint(0, levels, (outputs, groups, 32), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, levels - 1
    step = (torch.rand(outputs, groups, 1, generator=generator) * 0.1).half().float()
    low = -centre * step if centre else -torch.rand(step.shape, generator=generator).half().float()
    return (step * codes + low).reshape(outputs, -1)[:, :inputs].contiguous()


WEIGHTS = {
    "float32": lambda o, i: torch.randn(o, i),
    "bfloat16": lambda o, i: torch.randn(o, i).bfloat16().float(),
    "float16": lambda o, i: torch.randn(o, i).half().float(),
    "Q4_1": lambda o, i: grid(o, i, 16, 0),
    "Q4_0": lambda o, i: grid(o, i, 16, 8),
    "Q8_0": lambda o, i: grid(o, i, 255, 127),
}
FORMS = {"Q4_1": "grid of 16", "Q4_0": "grid of 16", "Q8_0": "grid of 256"}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (200, 96), (5, 2080)])
def test_a_weight_is_stored_in_the_smallest_form_that_gives_it_back(kind, outputs, inputs):
    weight_OI = WEIGHTS[kind](outputs, inputs)
    tiles = Tiles.of(weight_OI)
    assert tiles.form == FORMS.get(kind, kind)
    unit = np.eye(inputs, dtype=np.float32)
    assert torch.equal(torch.from_numpy(tiles.multiply(everything(unit))), weight_OI.T)
    assert torch.equal(torch.from_numpy(tiles.multiply(everything(unit[3:4])))[0], weight_OI[:, 3])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1, 0.0])
@pytest.mark.parametrize("inputs", [576, 2080])  # blocks of sums differ in size, too
def test_row_by_row_and_at_once_give_the_same_bits(kind, rows, share, inputs):
    torch.manual_seed(0)
    outputs = 200  # two tiles, and some
    linear = torch.nn.Linear(inputs, outputs)
    linear.weight.data = WEIGHTS[kind](outputs, inputs)
    product = Product((Projection("up", linear, "", 0, outputs),))
    x_RI, norms_I = torch.randn(rows, inputs), torch.rand(inputs)
    with torch.inference_mode():
        reading = pick(x_RI, norms_I, round(share * inputs))
        by_row_RO, at_once_RO = product.by_row(reading), product.at_once(reading)
        assert torch.equal(by_row_RO, at_once_RO)
        torch.testing.assert_close(by_row_RO, linear(reading.only_RI), rtol=1e-4, atol=1e-3)
        # Whoever else is there.
        alone = pick(x_RI[-1:], norms_I, round(share * inputs))
        assert torch.equal(product.by_row(alone), by_row_RO[-1:])


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("values", ["any", "few", "zeros", "infinite", "heavy", "tiny"])
def test_the_search_finds_what_a_stable_sort_finds(rows, values):
    generator = np.random.default_rng(rows)
    x_RI = generator.standard_normal((rows, 150), dtype=np.float32)
    if values == "few":
        x_RI = np.round(x_RI)
    elif values == "zeros":
        x_RI[:, 20:] *= 0
    elif values == "infinite":
        x_RI[:, ::7] = np.inf
    elif values == "heavy":
        x_RI *= np.exp(9 * generator.standard_normal((rows, 150), dtype=np.float32))
    elif values == "tiny":
        x_RI *= np.float32(1e-38)  # with less than all bits
    norms_I = np.ones(150, dtype=np.float32) if values != "any" else np.abs(x_RI[0]) + 1
    counts_R = generator.integers(0, 151, rows)
    start_S = np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64)
    unknown_R = all_searched(rows)
    picks = search(x_RI, Wanted(norms_I, start_S, unknown_R))
    for row, count in enumerate(counts_R):
        order = np.argsort(-np.abs(x_RI[row]) * norms_I, kind="stable")
        own = slice(start_S[row], start_S[row + 1])
        assert picks.index_P[own].tolist() == sorted(order[:count])
        assert (picks.value_P[own] == x_RI[row, picks.index_P[own]]).all()
    only_RI = np.zeros_like(x_RI)
    only_RI[np.repeat(np.arange(rows), counts_R), picks.index_P] = picks.value_P
    largest.keep_largest(x_RI, norms_I, start_S, unknown_R)
    assert (x_RI == only_RI).all()


def test_rows_that_pick_and_rows_that_do_not_share_a_product():
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 32)
    product = Product((Projection("up", linear, "", 0, 32),))
    x_RI = torch.randn(3, 64)
    with torch.inference_mode():
        reading = pick(x_RI, torch.ones(64), np.array([64, 10, 64]))
        assert reading.count == 138
        only_RI = x_RI.clone()
        only_RI[1, x_RI[1].abs().argsort()[:54]] = 0
        before_RI = x_RI.clone()
        assert torch.equal(reading.only_RI, only_RI) and torch.equal(x_RI, before_RI)
        own = pick(before_RI, torch.ones(64), np.array([64, 10, 64]), own=True)
        assert own.only_RI.data_ptr() == before_RI.data_ptr() and torch.equal(before_RI, only_RI)
        for out_RO in (product.by_row(reading), product.at_once(reading)):
            torch.testing.assert_close(out_RO, linear(only_RI))


def test_kernels_use_no_more_threads_than_they_are_told():
    # Numba is told by its first call of a process alone.
    code = """
import numba, torch
from elastiformer import kernels
from elastiformer.tiles import Tiles

Tiles.of(torch.randn(200, 64))
kernels.use_threads()
print(torch.get_num_threads(), numba.get_num_threads())
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"},
    )
    assert found.stdout.split() == ["1", "1"]


def test_where_there_are_no_tiles_both_ways_agree():
    torch.manual_seed(2)
    linear = torch.nn.Linear(300, 40, dtype=torch.float64)
    product = Product((Projection("up", linear, "", 0, 40),))
    assert not product.has_tiles
    x_RI, norms_I = torch.randn(3, 300, dtype=torch.float64), torch.rand(300)
    with torch.inference_mode():
        even = pick(x_RI, norms_I, 100)
        assert even.has_picks
        expected_RO = linear(even.only_RI)
        for out_RO in (product.by_row(even), product.at_once(even), product.run(even)):
            torch.testing.assert_close(out_RO, expected_RO)
        uneven = pick(x_RI, norms_I, np.array([100, 300, 7]))
        assert not uneven.has_picks and uneven.only_RI[2].count_nonzero() == 7
        torch.testing.assert_close(product.run(uneven), linear(uneven.only_RI))
        for out_RO in (product.dense(x_RI), product.by_row(Reading(x_RI))):
            torch.testing.assert_close(out_RO, linear(x_RI))


def test_few_threads_or_many_the_bits_are_the_same():
    tiles = Tiles.of(torch.randn(500, 128))
    x_RI = np.random.default_rng(0).standard_normal((9, 128), dtype=np.float32)
    picks = search(
        x_RI, Wanted(np.ones(128, dtype=np.float32), even_starts(9, 50), all_searched(9))
    )
    many, threads = tiles.multiply(picks), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        kernels.use_threads()
        assert (tiles.multiply(Picks(*picks)) == many).all()
    finally:
        torch.set_num_threads(threads)
        kernels.use_threads()
