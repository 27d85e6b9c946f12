"""Promises of sampling: each row under its own settings, as if it were alone."""

import math

import pytest
import torch

from elastiformer.errors import InputError
from elastiformer.sampling import (
    GREEDY,
    BrokenLogits,
    Draw,
    Sampling,
    sample,
    score,
)

ROWS, VOCAB = 7, 53


def draw(sampling: Sampling, choice: int = 0, **rest) -> Draw:
    return Draw(sampling, sampling.generator(choice), **rest)


def tokens(logits_RV, draws) -> list[int]:
    return [each.token for each in sample(logits_RV, draws)]


def support(sampling: Sampling, logits_V, tries: int = 400) -> set[int]:
    """The tokens that a row ever draws."""
    generator = sampling.generator()
    rows = logits_V.expand(tries, -1)
    return set(tokens(rows, [Draw(sampling, generator)] * tries))


def test_at_temperature_zero_the_likeliest_token_is_taken():
    logits_RV = torch.randn(ROWS, VOCAB)
    assert tokens(logits_RV, [draw(GREEDY)] * ROWS) == logits_RV.argmax(-1).tolist()


def test_a_row_draws_the_same_alone_and_among_others():
    settings = [
        Sampling(seed=1),
        GREEDY,
        Sampling(seed=2, top_p=0.8),
        Sampling(seed=3, top_k=5, temperature=0.7),
        Sampling(seed=4, min_p=0.1),
        Sampling(seed=5, presence_penalty=1.5, frequency_penalty=-0.5),
        Sampling(seed=6, repetition_penalty=1.3, top_p=0.9, top_k=9),
    ]
    logits_RV = 3 * torch.randn(ROWS, VOCAB)
    history = {"prompt": (1, 2, 2), "generated": (3, 3, 4)}
    for _ in range(5):
        together = tokens(logits_RV, [draw(each, **history) for each in settings])
        alone = [
            tokens(logits_RV[row : row + 1], [draw(each, **history)])[0]
            for row, each in enumerate(settings)
        ]
        assert together == alone
        logits_RV = 3 * torch.randn(ROWS, VOCAB)


def test_a_seed_gives_the_same_draws_and_each_choice_its_own():
    logits_RV = torch.zeros(64, VOCAB)

    def drawn(sampling, choice):
        generator = sampling.generator(choice)
        return tokens(logits_RV, [Draw(sampling, generator)] * 64)

    assert drawn(Sampling(seed=-5), 0) == drawn(Sampling(seed=-5), 0)
    assert drawn(Sampling(seed=5), 0) != drawn(Sampling(seed=5), 1)
    assert drawn(Sampling(seed=5), 0) != drawn(Sampling(seed=6), 0)
    assert drawn(Sampling(), 0) != drawn(Sampling(), 0)


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    sampling = Sampling(seed=0)
    generator = sampling.generator()
    drawn = tokens(logits_V.expand(20_000, -1), [Draw(sampling, generator)] * 20_000)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02)


def test_filters_keep_exactly_the_tokens_they_name():
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]).log()
    assert support(Sampling(seed=0, top_k=2), logits_V) == {0, 1}
    assert support(Sampling(seed=0, top_p=0.65), logits_V) == {0, 1}
    assert support(Sampling(seed=0, top_p=0.71), logits_V) == {0, 1, 2}
    assert support(Sampling(seed=0, top_p=1e-6), logits_V) == {0}
    assert support(Sampling(seed=0, min_p=0.4), logits_V) == {0, 1, 2}
    assert support(Sampling(seed=0, min_p=1.0), logits_V) == {0}
    assert support(Sampling(seed=0, temperature=1e-9), logits_V) == {0}
    assert support(Sampling(seed=0, top_k=99), logits_V) == {0, 1, 2, 3, 4}


def test_penalties_and_bans_move_away_from_what_was_said():
    logits_V = torch.tensor([2.0, 1.9, -1.0])
    rows = logits_V[None]
    assert tokens(rows, [draw(GREEDY)]) == [0]
    assert tokens(rows, [draw(Sampling(0.0, presence_penalty=1), generated=(0,))]) == [1]
    assert tokens(rows, [draw(Sampling(0.0, frequency_penalty=1), generated=(0, 1, 1))]) == [0]
    assert tokens(rows, [draw(Sampling(0.0, repetition_penalty=2), prompt=(0,))]) == [1]
    assert tokens(rows, [draw(Sampling(0.0, presence_penalty=1), prompt=(0,))]) == [0]
    assert tokens(rows, [draw(GREEDY, banned=(0, 1))]) == [2]
    assert support(Sampling(seed=0), torch.tensor([0.0, -math.inf])) == {0}


def test_log_probabilities_are_the_models_own_whatever_the_settings():
    logits_RV = torch.randn(2, VOCAB)
    expected_RV = logits_RV.log_softmax(-1)
    sampling = Sampling(seed=0, temperature=0.3, top_k=3, presence_penalty=2, logprobs=4)
    first, second = sample(logits_RV, [draw(sampling, generated=(1,)), draw(GREEDY)])
    assert first.logprob == pytest.approx(expected_RV[0, first.token].item(), abs=1e-6)
    assert [each.token for each in first.top] == expected_RV[0].topk(4).indices.tolist()
    assert second.logprob is None and second.top == ()
    scored = score(logits_RV, [3, 5], top=0)
    assert [each.logprob for each in scored] == pytest.approx(
        [expected_RV[0, 3].item(), expected_RV[1, 5].item()]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named_by_row(value):
    logits_RV = torch.randn(ROWS, VOCAB)
    logits_RV[2, 5] = value
    logits_RV[4] = -math.inf
    with pytest.raises(BrokenLogits) as caught:
        sample(logits_RV, [draw(GREEDY)] * ROWS)
    assert caught.value.rows == (2, 4)
    with pytest.raises(BrokenLogits):
        score(logits_RV, [0] * ROWS, top=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.1},
        {"seed": 1 << 63},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"logprobs": 21},
    ],
)
def test_a_setting_out_of_bounds_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(InputError, match=r"temperature.*top_p"):
        Sampling(temperature=3, top_p=2)
