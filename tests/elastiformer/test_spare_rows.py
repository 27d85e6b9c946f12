"""Products in bfloat16 meet few numbers of rows, and nobody sees the spare ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import elastiformer
from elastiformer import DENSE, Capacity, products, spare_rows
from elastiformer.encoder import ElasticEncoder
from elastiformer.packed import Rows
from elastiformer.spare_rows import empty, rounded, widened, with_room
from tests.devices import cpu_only

CPU = torch.device("cpu")
ADAPTERS = Path(elastiformer.__file__).parent / "adapters"
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN knows no bfloat16 here"
)


def test_numbers_of_rows_are_few_and_little_is_added():
    numbers = range(1, 1025)
    assert len({rounded(rows) for rows in numbers}) <= 64
    assert all(rows <= rounded(rows) < rows + 32 for rows in numbers)
    assert all(rounded(rounded(rows)) == rounded(rows) for rows in numbers)


def test_rows_with_room_are_widened_in_place_and_others_are_copied():
    roomy_ND = empty((37, 5), torch.bfloat16, CPU)
    assert roomy_ND.shape == (37, 5)
    wide_PD = widened(roomy_ND)
    assert wide_PD.shape == (48, 5)
    assert wide_PD.data_ptr() == roomy_ND.data_ptr()
    assert not wide_PD[37:].any()
    for tight_ND in (torch.randn(37, 5).bfloat16(), torch.randn(5, 37).bfloat16().T):
        copy_PD = widened(tight_ND)
        assert copy_PD.shape == (48, 5)
        assert torch.equal(copy_PD[:37], tight_ND)
        assert not copy_PD[37:].any()
    twice_ND = with_room(lambda x_PD: 2 * x_PD, tight_ND)
    assert torch.equal(twice_ND, 2 * tight_ND)
    assert widened(twice_ND).data_ptr() == twice_ND.data_ptr()


def test_float32_and_rounded_numbers_stay_as_they_are():
    for x_ND in (torch.randn(37, 5), torch.randn(64, 5).bfloat16(), torch.randn(3, 5).bfloat16()):
        assert widened(x_ND) is x_ND


def test_gathered_rows_come_with_room_and_are_added_where_they_came_from():
    torch.manual_seed(0)
    x_ND = torch.randn(90, 12).bfloat16()
    rows = Rows(torch.randperm(90)[:50].sort().values.numpy(), 90, CPU)
    some_RD = rows.of(x_ND)
    assert torch.equal(some_RD, x_ND[rows.rows_R])
    assert widened(some_RD).data_ptr() == some_RD.data_ptr()
    into_ND = torch.randn(90, 36).bfloat16()
    expected_ND = into_ND.clone()
    expected_ND[rows.rows_R, 12:24] += some_RD
    rows.add(into_ND[:, 12:24], some_RD)
    assert torch.equal(into_ND, expected_ND)


@cpu_only  # where it is oneDNN that products of bfloat16 are asked of
@needs_bfloat16
def test_texts_of_any_length_meet_few_numbers_of_rows_and_nothing_is_copied(monkeypatch):
    model = ElasticEncoder.load("sentiment", ADAPTERS / "sentiment", dtype="bfloat16")
    met, copied = set(), []

    def noting(x_ND):
        wide_PD = spare_rows.widened(x_ND)
        met.add(len(wide_PD))
        if wide_PD.data_ptr() != x_ND.data_ptr():
            copied.append(tuple(x_ND.shape))
        return wide_PD

    monkeypatch.setattr(products, "widened", noting)
    saying = "no more and no less , and at that price one can hardly complain about it ."
    words = saying.split()
    for more in range(6):
        texts = [" ".join((words * 3)[: 7 + more + 4 * place]) for place in range(8)]
        items = [model.inputs.prepare(text).item for text in texts]
        for capacity in (DENSE, Capacity(0.8, 0.8), Capacity(0.5, 0.5)):
            model.encode(items, [capacity] * len(items))
    assert met <= {rounded(rows) for rows in range(1, 1025)}
    assert not copied
