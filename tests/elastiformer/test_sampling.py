"""Promises of sampling: each row under its own settings, as if it were alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastiformer.errors import InputError
from elastiformer.sampling import (
    GREEDY,
    MOST_LOGPROBS,
    BrokenLogits,
    Draw,
    Sampling,
    Seen,
    sample,
    score,
    side_by_side,
)
from tests.examples import examples

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
    seen = Seen((1, 2, 2), (3, 3, 4))
    for _ in range(5):
        together = tokens(logits_RV, [draw(each, seen=seen) for each in settings])
        alone = [
            tokens(logits_RV[row : row + 1], [draw(each, seen=seen)])[0]
            for row, each in enumerate(settings)
        ]
        assert together == alone
        logits_RV = 3 * torch.randn(ROWS, VOCAB)


def by_definition(logits_V, each: Draw, uniform: float) -> int:
    """The token of one row, in the plainest way there is."""
    wanted, logits_V = each.sampling, logits_V.clone()
    for token, count in zip(each.seen.tokens, each.seen.counts, strict=True):
        old = logits_V[token]
        factor = wanted.repetition_penalty
        logits_V[token] = old / factor if old > 0 else old * factor
        if count:
            penalty = wanted.frequency_penalty * torch.tensor(count) + wanted.presence_penalty
            logits_V[token] -= penalty
    logits_V[list(each.banned)] = -math.inf
    if wanted.is_greedy:
        return logits_V.argmax().item()
    weights_V = ((logits_V.double() - logits_V.max()) / max(wanted.temperature, 1e-5)).exp()
    if 0 < wanted.top_k < len(logits_V):
        weights_V[logits_V < logits_V.sort(descending=True).values[wanted.top_k - 1]] = 0
    falling, order = weights_V.sort(descending=True, stable=True)
    reached = falling.cumsum(0) - falling >= wanted.top_p * weights_V.sum()
    if wanted.top_p < 1:
        weights_V[order[reached]] = 0
    weights_V[weights_V < wanted.min_p] = 0
    sums_V = weights_V.cumsum(0)
    return int((sums_V > uniform * sums_V[-1]).int().argmax())


def made_logits(kind: str, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    logits_V = torch.randn(vocabulary, generator=generator)
    if kind == "peaked":
        likely = torch.randint(vocabulary, (5,), generator=generator)
        logits_V[likely] += 6
    elif kind == "tied":
        logits_V = (2 * logits_V).round() / 2
    elif kind == "masked":
        logits_V[1:][torch.rand(vocabulary - 1, generator=generator) < 0.8] = -math.inf
    return logits_V


filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
        "top_k": st.sampled_from([0, 0, 1, 5, 63, 64, 65, 700, 10**6]),
        "min_p": st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, -0.5, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, -0.25, 0.75]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.8, 1.3]),
        "seed": st.integers(-(1 << 63), (1 << 63) - 1),
        "logprobs": st.sampled_from([None, None, 0, 3, MOST_LOGPROBS]),
    }
)


@examples(60)
@given(
    asked=st.lists(
        st.tuples(filters, st.sampled_from(["flat", "peaked", "tied", "masked"]), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    vocabulary=st.sampled_from([2, 53, 64, 65, 1000, 5000, 16450]),
    seed=st.integers(0, 1 << 30),
)
def test_any_mix_draws_what_the_definition_says_and_each_row_as_if_alone(asked, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.stack([made_logits(kind, vocabulary, generator) for _, kind, _ in asked])
    before_RV = logits_RV.clone()

    def drawn_with() -> list[Draw]:
        draws = []
        for row, (wanted, _, bans) in enumerate(asked):
            said = torch.randint(vocabulary, (8,), generator=torch.Generator().manual_seed(row))
            seen = Seen(said[:5].tolist(), said[3:].tolist())
            banned = (vocabulary - 1,) if bans else ()
            draws.append(draw(Sampling(**wanted), seen=seen, banned=banned))
        return draws

    together = sample(logits_RV, drawn_with())
    assert torch.equal(logits_RV, before_RV)
    for row, (each, found) in enumerate(zip(drawn_with(), together, strict=True)):
        uniform = each.sampling.generator().next()
        assert found.token == by_definition(logits_RV[row], each, uniform)
        assert [found] == sample(logits_RV[row : row + 1], [each])


def test_a_seed_gives_the_same_draws_and_each_choice_its_own():
    logits_RV = torch.zeros(64, VOCAB)

    def drawn(sampling, choice):
        generator = sampling.generator(choice)
        return tokens(logits_RV, [Draw(sampling, generator)] * 64)

    assert drawn(Sampling(seed=-5), 0) == drawn(Sampling(seed=-5), 0)
    assert drawn(Sampling(seed=5), 0) != drawn(Sampling(seed=5), 1)
    assert drawn(Sampling(seed=5), 0) != drawn(Sampling(seed=6), 0)
    assert drawn(Sampling(), 0) != drawn(Sampling(), 0)


def test_every_bit_of_a_seed_counts():
    seeds = [0, 7, 7 + (1 << 32), 7 + (1 << 62), -1, 1 - (1 << 63), (1 << 63) - 1, -(1 << 63)]
    first = {Sampling(seed=seed).generator().next() for seed in seeds}
    assert len(first) == len(seeds)


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


def test_a_tie_at_the_last_place_of_top_k_keeps_and_weighs_all_that_tie():
    logits_V = torch.tensor([1.0] * 10 + [0.0] * 90)  # more tie than a filter looks at first
    assert support(Sampling(seed=0, top_k=30), logits_V, tries=2000) == set(range(100))
    # A tenth of 10e + 90 is reached with the fifth token.
    assert support(Sampling(seed=0, top_k=30, top_p=0.1), logits_V) == set(range(5))


def test_the_last_token_of_a_vocabulary_counts_once():
    logits_V = torch.zeros(16_450)  # no whole number of blocks
    logits_V[-1], logits_V[7] = 5.0, 4.5
    assert support(Sampling(seed=0, top_k=2), logits_V, tries=40) == {7, 16_449}
    assert support(Sampling(seed=0, top_k=1), logits_V, tries=40) == {16_449}
    assert support(Sampling(seed=0, min_p=0.5), logits_V, tries=40) == {7, 16_449}


def test_penalties_and_bans_move_away_from_what_was_said():
    logits_V = torch.tensor([2.0, 1.9, -1.0])
    rows = logits_V[None]
    assert tokens(rows, [draw(GREEDY)]) == [0]
    assert tokens(rows, [draw(Sampling(0.0, presence_penalty=1), seen=Seen((), (0,)))]) == [1]
    assert tokens(rows, [draw(Sampling(0.0, frequency_penalty=1), seen=Seen((), (0, 1, 1)))]) == [0]
    assert tokens(rows, [draw(Sampling(0.0, repetition_penalty=2), seen=Seen((0,)))]) == [1]
    assert tokens(rows, [draw(Sampling(0.0, presence_penalty=1), seen=Seen((0,)))]) == [0]
    assert tokens(rows, [draw(GREEDY, banned=(0, 1))]) == [2]
    assert support(Sampling(seed=0), torch.tensor([0.0, -math.inf])) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_least_repetition_penalty_breaks_no_row(dtype):
    logits_RV = torch.tensor([[2.0, 0.0, -1.0, 30.0]]).to(dtype)
    least = Sampling(0.0, repetition_penalty=5e-324)
    for seen, said in ((Seen((0,)), 0), (Seen((0, 1, 2, 3)), 3), (Seen((1, 2)), 3)):
        assert tokens(logits_RV, [draw(least, seen=seen)]) == [said]
    drawn = Sampling(seed=0, repetition_penalty=5e-324)
    assert tokens(logits_RV, [draw(drawn, seen=Seen((0,)))]) == [0]


def test_what_was_seen_is_counted_one_token_at_a_time():
    grown = Seen((7, 7, 3))
    for token in (3, 9, 9):
        grown.add(token)
    assert (list(grown.tokens), list(grown.counts)) == ([7, 3, 9], [0, 1, 2])
    whole = Seen((7, 7, 3), (3, 9, 9))
    assert (whole.tokens, whole.counts) == (grown.tokens, grown.counts)


def test_log_probabilities_are_the_models_own_whatever_the_settings():
    logits_RV = torch.randn(2, VOCAB)
    expected_RV = logits_RV.log_softmax(-1)
    sampling = Sampling(seed=0, temperature=0.3, top_k=3, presence_penalty=2, logprobs=4)
    first, second = sample(logits_RV, [draw(sampling, seen=Seen((), (1,))), draw(GREEDY)])
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


def test_a_ban_hides_no_broken_row_and_leaves_something_to_draw():
    logits_RV = torch.zeros(3, VOCAB)
    logits_RV[0, 5] = math.nan
    logits_RV[1, 5] = math.inf
    logits_RV[2, :] = -math.inf
    logits_RV[2, 5] = 1.0
    before_RV = logits_RV.clone()
    with pytest.raises(BrokenLogits) as caught:
        sample(logits_RV, [draw(GREEDY, banned=(5,))] * 3)
    assert caught.value.rows == (0, 1, 2)
    assert torch.equal(logits_RV.nan_to_num(nan=2.0), before_RV.nan_to_num(nan=2.0))


def test_a_broken_batch_mate_uses_up_no_random_number():
    logits_RV = torch.randn(2, VOCAB)
    logits_RV[1, 0] = math.nan
    again, fresh = draw(Sampling(seed=3)), draw(Sampling(seed=3))
    with pytest.raises(BrokenLogits):
        sample(logits_RV, [again, draw(GREEDY)])
    assert tokens(logits_RV[:1], [again]) == tokens(logits_RV[:1], [fresh])


def test_many_scored_rows_are_the_same_as_each_of_them_alone():
    logits_RV = torch.randn(90, 20_001)  # more than fit one part
    known = torch.randint(20_001, (90,)).tolist()
    together = score(logits_RV, known, top=3)
    assert together == [
        score(logits_RV[row : row + 1], [token], top=3)[0] for row, token in enumerate(known)
    ]


def test_rows_that_lie_side_by_side_are_not_copied():
    logits_RV = torch.randn(ROWS, VOCAB)
    rows = [of_one[-1] for of_one in logits_RV.split(1)]
    assert side_by_side(rows).data_ptr() == logits_RV.data_ptr()
    assert torch.equal(side_by_side(rows), logits_RV)
    for apart in (rows[::-1], rows[::2], [rows[0], rows[1].clone()]):
        assert torch.equal(side_by_side(apart), torch.stack(apart))


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
