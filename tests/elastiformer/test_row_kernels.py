"""What is compiled for rows on a CPU: against PyTorch, and a row alone against many."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from elastiformer import kernels, row_kernels
from elastiformer.pointwise import (
    CompiledGate,
    CompiledLayerNorm,
    CompiledNorm,
    Rotation,
    in_type,
    lean_norm,
)

ROWS = [1, 4, 5, 33]


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [8, 24, 577])
def test_a_norm_is_pytorchs_and_a_row_alone_gets_the_same_bits(rows, width):
    torch.manual_seed(width)
    x_ND, scale_D = 3 * torch.randn(rows, width), torch.rand(width)
    out_ND, alone_ND = torch.empty_like(x_ND), torch.empty(1, width)
    row_kernels.normalise(x_ND.numpy(), scale_D.numpy(), 1e-5, out_ND.numpy())
    torch.testing.assert_close(out_ND, F.rms_norm(x_ND, (width,), scale_D, 1e-5))
    row_kernels.normalise(x_ND[-1:].numpy(), scale_D.numpy(), 1e-5, alone_ND.numpy())
    assert torch.equal(alone_ND[0], out_ND[-1])
    norm = CompiledNorm(scale_D.numpy(), 1e-5)
    assert torch.equal(norm(x_ND, torch.bfloat16), norm(x_ND).bfloat16())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_is_pytorchs_of_both_types_and_the_same_bits_alone(rows, dtype):
    torch.manual_seed(rows)
    module = torch.nn.LayerNorm(57).to(torch.bfloat16).requires_grad_(False)
    module.weight.normal_()
    module.bias.normal_()
    norm, x_ND = lean_norm(module), (3 + 2 * torch.randn(rows, 57)).to(dtype)

    assert isinstance(norm, CompiledLayerNorm)
    expected_ND = module.float()(x_ND.float())
    torch.testing.assert_close(in_type(norm, x_ND, torch.float32), expected_ND)
    assert torch.equal(in_type(norm, x_ND, torch.bfloat16), norm(x_ND, torch.float32).bfloat16())
    assert norm(x_ND).dtype == dtype
    assert torch.equal(norm(x_ND[-1:]), norm(x_ND)[-1:])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("form", "activation"),
    [
        (row_kernels.SILU, F.silu),
        (row_kernels.GELU, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_a_gate_is_pytorchs_and_a_row_alone_gets_the_same_bits(rows, form, activation):
    torch.manual_seed(rows)
    both_N2I = 8 * torch.randn(rows, 2 * 57)
    both_N2I[0, :4] = torch.tensor([-1000.0, 1000.0, 0.0, -88.5])
    out_NI, alone_NI = torch.empty(rows, 57), torch.empty(1, 57)
    row_kernels.gate(form, both_N2I.numpy(), out_NI.numpy())
    expected_NI = activation(both_N2I[:, :57]) * both_N2I[:, 57:]
    torch.testing.assert_close(out_NI, expected_NI, rtol=2e-5, atol=2e-6)
    row_kernels.gate(form, both_N2I[-1:].numpy(), alone_NI.numpy())
    assert torch.equal(alone_NI[0], out_NI[-1])
    small_N2I = both_N2I.bfloat16()
    wide_NI = CompiledGate(form)(small_N2I.float())
    assert torch.equal(CompiledGate(form)(small_N2I), wide_NI)
    assert torch.equal(CompiledGate(form)(small_N2I, torch.bfloat16), wide_NI.bfloat16())


@pytest.mark.parametrize("rows", ROWS)
def test_a_rotation_is_the_one_in_operators_and_spares_the_heads_after(rows):
    torch.manual_seed(rows)
    x_NMH, angle_NR = torch.randn(rows, 5, 12), torch.randn(rows, 8)
    rotation = Rotation(angle_NR.cos(), angle_NR.sin())
    expected_NMH = x_NMH.double()  # which no kernel is for
    Rotation(angle_NR.cos().double(), angle_NR.sin().double()).turn(expected_NMH, 3)
    turned_NMH = x_NMH.clone()
    rotation.turn(turned_NMH, 3)
    torch.testing.assert_close(turned_NMH, expected_NMH.float())
    assert torch.equal(turned_NMH[:, 3:], x_NMH[:, 3:])
    alone_NMH = x_NMH[-1:].clone()
    rotation.of(slice(rows - 1, rows)).turn(alone_NMH, 3)
    assert torch.equal(alone_NMH[0], turned_NMH[-1])
    small_NMH = x_NMH.bfloat16()
    widened_NMH = small_NMH.float()
    rotation.turn(widened_NMH, 3)
    rotation.turn(small_NMH, 3)
    assert torch.equal(small_NMH, widened_NMH.bfloat16())


@pytest.mark.parametrize("dtype", row_kernels.SUMMED)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (33, 24), (2000, 300)])
def test_a_sum_over_some_rows_is_pytorchs_and_spares_what_stands_beside(dtype, rows, width):
    torch.manual_seed(rows)
    wide_NO, x_RD = torch.randn(rows + 7, 3 * width).to(dtype), torch.randn(rows, width).to(dtype)
    index_R = torch.randperm(rows + 7)[:rows].sort().values
    expected_NO = wide_NO.clone()
    expected_NO[:, width : 2 * width].index_add_(0, index_R, x_RD)
    row_kernels.add(wide_NO[:, width : 2 * width], index_R.numpy(), x_RD)
    assert torch.equal(wide_NO, expected_NO)
    whole_ND = torch.zeros(rows + 7, width, dtype=dtype)
    row_kernels.add(whole_ND, index_R.numpy(), x_RD)
    assert torch.equal(whole_ND[index_R], x_RD)


def test_what_is_not_a_number_stays_none():
    both_N2I = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]])
    out_NI = torch.empty(1, 2)
    row_kernels.gate(row_kernels.SILU, both_N2I.numpy(), out_NI.numpy())
    assert out_NI.isnan().tolist() == [[True, False]]
