"""Products of some rows two inputs at a time, in bfloat16: against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastiformer import amx, kernels, pairs
from elastiformer.families import Projection
from elastiformer.products import Product
from elastiformer.readings import Reading, pick, reading_of
from elastiformer.thresholds import SEARCHED
from elastiformer.tiles import Tiles, Wanted
from tests.elastiformer.test_tiles import WEIGHTS

able = pytest.mark.skipif(not pairs.ABLE, reason="the processor has no products of bfloat16 pairs")
KINDS = ("bfloat16", "Q4_1", "Q4_0", "Q8_0")


@pytest.fixture(autouse=True, params=["vectors", "tile registers"])
def _way(request, monkeypatch):
    """On a processor with tile registers vectors are no longer used, but they must be right."""
    kernels.use_threads()
    if request.param == "vectors":
        monkeypatch.setattr(amx, "multiply_small", pairs._multiply_pairs)
    elif not amx.ABLE:
        pytest.skip("the processor has no tile registers")


@able
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 6, 17, 40])
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
    for rows in ([8], [3, 4], [8, 0, 5, 2, 1], 9 * [7, 8]):
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


@able
def test_known_thresholds_give_what_a_search_would():
    """Also where a group of inputs is not full, and of values that are no numbers."""
    for inputs in (576, 70):
        tiles = Tiles.of(WEIGHTS["Q4_1"](40, inputs))
        x_RI = np.random.default_rng(0).standard_normal((7, inputs), dtype=np.float32)
        norms_I = np.random.default_rng(1).random(inputs, dtype=np.float32)
        size_RI = np.abs(x_RI) * norms_I
        least_R = np.quantile(size_RI, 0.4, axis=1).astype(np.float32)
        kept_RI = size_RI >= least_R[:, None]
        start_S = np.concatenate([[0], np.cumsum(kept_RI.sum(1))])
        expected_RO = tiles.multiply_pairs(np.where(kept_RI, x_RI, np.float32(0)))
        for least in (least_R, np.full(7, SEARCHED)):
            found_RO = tiles.multiply_pairs(x_RI, Wanted(norms_I, start_S, least))
            assert np.array_equal(found_RO, expected_RO)
        x_RI[3, 5] = np.nan
        assert np.isnan(tiles.multiply_pairs(x_RI, Wanted(norms_I, start_S, least_R))[3]).all()


@pytest.mark.parametrize("inputs", [576, 70])
def test_picks_are_rounded_as_pytorch_rounds_them(inputs):
    torch.manual_seed(0)
    x_RI, norms_I = torch.randn(6, inputs), torch.rand(inputs)
    size_RI = x_RI.abs() * norms_I
    least_R = size_RI.median(1).values.numpy()
    start_S = np.concatenate([[0], np.cumsum((size_RI.numpy() >= least_R[:, None]).sum(1))])
    for reading in (
        pick(x_RI, norms_I, np.array([1, 5, inputs, inputs // 2, 7, 30])),
        reading_of(x_RI, norms_I, start_S, least_R, own=False),
        Reading(x_RI),
    ):
        assert torch.equal(reading.rounded(torch.bfloat16), reading.only_RI.bfloat16())


@able
def test_others_may_use_tile_registers_in_between():
    """PyTorch's own products set them up for themselves."""
    torch.manual_seed(0)
    weight_OI, x_RI = torch.randn(64, 96), torch.randn(40, 96)
    tiles = Tiles.of(weight_OI.bfloat16().float())
    first_RO, own_RO = tiles.multiply_pairs(x_RI.numpy()), x_RI.bfloat16() @ weight_OI.bfloat16().T
    for rows in (40, 3, 17):
        assert np.array_equal(tiles.multiply_pairs(x_RI[:rows].numpy()), first_RO[:rows])
        assert torch.equal(x_RI.bfloat16() @ weight_OI.bfloat16().T, own_RO)


def test_where_tile_registers_are_refused_others_multiply(monkeypatch):
    tiles = Tiles.of(WEIGHTS["bfloat16"](40, 64))
    assert tiles.takes_pairs == pairs.ABLE
    monkeypatch.setattr(amx, "KNOWN", True)
    monkeypatch.setattr(amx, "ABLE", False)
    assert not tiles.takes_pairs


@pytest.mark.parametrize(
    ("inputs", "dtype"), [(575, np.uint16), (576, np.float32), (576, np.int16)]
)
def test_what_has_no_pairs_of_bfloat16_is_left_to_others(inputs, dtype):
    assert not pairs.takes(inputs, np.dtype(dtype))
