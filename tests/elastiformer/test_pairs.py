"""Products of some rows two inputs at a time, in bfloat16: against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastiformer import kernels, pairs
from elastiformer.families import Projection
from elastiformer.products import Product
from elastiformer.readings import Reading, pick
from elastiformer.tiles import Tiles
from tests.elastiformer.test_tiles import WEIGHTS

able = pytest.mark.skipif(not pairs.ABLE, reason="the processor has no products of bfloat16 pairs")
KINDS = ("bfloat16", "Q4_1", "Q4_0", "Q8_0")


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


@able
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize(("outputs", "inputs"), [(200, 576), (96, 64), (5, 70)])
def test_a_product_rounds_the_values_and_nothing_else(kind, rows, outputs, inputs):
    weight_OI = WEIGHTS[kind](outputs, inputs)
    tiles = Tiles.of(weight_OI)
    assert tiles.takes_pairs
    x_RI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    found_RO = torch.from_numpy(tiles.multiply_pairs(x_RI.numpy()))
    expected_RO = x_RI.bfloat16().double() @ weight_OI.double().T
    bound_RO = x_RI.abs().double() @ weight_OI.abs().double().T
    assert ((found_RO - expected_RO).abs() <= 3e-6 * bound_RO).all()


@able
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_whatever_other_rows_there_are(kind):
    tiles = Tiles.of(WEIGHTS[kind](300, 1536))
    x_RI = np.random.default_rng(0).standard_normal((9, 1536), dtype=np.float32)
    whole_RO = tiles.multiply_pairs(x_RI)
    for rows in ([8], [3, 4], [8, 0, 5, 2, 1]):
        assert np.array_equal(tiles.multiply_pairs(x_RI[rows]), whole_RO[rows])


@able
def test_what_rows_leave_out_counts_as_zero():
    torch.manual_seed(0)
    layer = torch.nn.Linear(576, 200).to(torch.bfloat16)
    product = Product((Projection("x", layer, "", 0, 200),))
    assert product.pairs
    x_RI, norms_I = torch.randn(5, 576), torch.rand(576)
    reading = pick(x_RI, norms_I, np.array([576, 300, 576, 17, 300]))
    only_RI = reading.only_RI.clone()
    assert (only_RI == 0).sum() == 5 * 576 - 1769
    assert torch.equal(product.by_row(reading), product.by_row(Reading(only_RI)))
    assert torch.allclose(product.by_row(reading), product.at_once(reading), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("inputs", "dtype"), [(575, np.uint16), (576, np.float32), (576, np.int16)]
)
def test_what_has_no_pairs_of_bfloat16_is_left_to_others(inputs, dtype):
    assert not pairs.takes(inputs, np.dtype(dtype))
