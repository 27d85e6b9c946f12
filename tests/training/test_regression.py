"""Least squares from second moments: as good as from the inputs themselves, and never worse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from elastiformer import ElasticModel
from elastiformer.capacity import Site
from tests.tiny import tiny
from training.regression import second_moments, skip_path, told_by_kept

INPUTS, TOKENS = 9, 4000


@pytest.fixture
def x_NI() -> torch.Tensor:
    """Inputs that know of each other, with means."""
    generator = torch.Generator().manual_seed(3)
    few_NR = torch.randn(TOKENS, 4, generator=generator)
    mixed_NI = few_NR @ torch.randn(4, INPUTS, generator=generator)
    return mixed_NI + 0.3 * torch.randn(TOKENS, INPUTS, generator=generator) + 2


def sums(x_NI: torch.Tensor) -> torch.Tensor:
    x_NJ = F.pad(x_NI, (0, 1), value=1.0)
    return x_NJ.T @ x_NJ


def guessed(x_NI: torch.Tensor, map_IJ: torch.Tensor) -> torch.Tensor:
    return F.linear(x_NI, map_IJ[:, :-1], map_IJ[:, -1])


def test_what_is_left_out_is_guessed_as_least_squares_would(x_NI):
    chance_I = (torch.arange(INPUTS) < 5).float()
    map_IJ = told_by_kept(sums(x_NI), chance_I, ridge=1e-9)
    read_NJ = F.pad(x_NI[:, :5], (0, 1), value=1.0)
    expected_NI = read_NJ @ torch.linalg.lstsq(read_NJ, x_NI).solution

    assert torch.equal(map_IJ[:5, :5], torch.eye(5)) and not map_IJ[:, 5:INPUTS].any()
    torch.testing.assert_close(guessed(x_NI * chance_I, map_IJ), expected_NI, atol=2e-3, rtol=1e-3)


def test_of_what_chance_keeps_the_map_is_the_best_over_all_draws(x_NI):
    chance_I = torch.full((INPUTS,), 0.6)
    kept_NI = torch.rand(x_NI.shape, generator=torch.Generator().manual_seed(5)) < chance_I
    read_NJ = F.pad(x_NI * kept_NI, (0, 1), value=1.0)
    drawn_IJ = torch.linalg.lstsq(read_NJ, x_NI).solution.T
    map_IJ = told_by_kept(sums(x_NI), chance_I, ridge=1e-9)

    def error(map_IJ: torch.Tensor) -> float:
        return float((guessed(x_NI * kept_NI, map_IJ) - x_NI).pow(2).mean())

    assert error(drawn_IJ) <= error(map_IJ) < 1.03 * error(drawn_IJ)
    assert error(map_IJ) < 0.5 * float((x_NI * kept_NI - x_NI).pow(2).mean())


def test_a_skip_path_comes_nearer_the_higher_its_rank_and_knows_the_mean(x_NI):
    y_ND = x_NI @ torch.randn(INPUTS, 7, generator=torch.Generator().manual_seed(1)) + 5
    branch_DJ = y_ND.T @ F.pad(x_NI, (0, 1), value=1.0)
    errors = [
        float((skip_path(sums(x_NI), branch_DJ, rank, 1e-6)(x_NI) - y_ND).pow(2).mean())
        for rank in (1, 2, 4, 7)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0] < float(y_ND.var(0, correction=0).mean())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
def test_moments_are_those_of_every_sites_inputs(family):

    model = ElasticModel(tiny(family))
    ids_WT = torch.randint(90, (5, 12), generator=torch.Generator().manual_seed(2))
    found = second_moments(model, ids_WT)

    assert len(found.inputs) == len(Site) * len(model.layout.layers)
    assert len(found.branches) == 2 * len(model.layout.layers)
    assert all(float(each[-1, -1]) == 5 * 11 for each in found.inputs.values())  # not position 0
    for (layer, site), size_I in found.sizes().items():
        assert len(size_I) == len(model.layout.column_norms(model.layout.layers[layer], site))
