"""Sets of image tokens drawn by a router's scores, and what is learnt from them."""

import math

import torch

from training.image_draws import drawn, lesson_of

TOKENS, KEPT = 12, 3


def chance(seed):
    return torch.Generator().manual_seed(seed)


def test_sets_are_drawn_as_often_as_the_scores_say():
    scores_P = torch.tensor([0.0, math.log(2), math.log(5)])
    draws = drawn(scores_P, 1, 4000, chance(0))
    assert (draws.chosen_MP.sum(1) == 1).all()
    share_P = draws.chosen_MP.float().mean(0)
    torch.testing.assert_close(share_P, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=0.03, rtol=0)
    # And each draw knows how likely it was.
    expected_M = scores_P.log_softmax(0)[draws.chosen_MP.int().argmax(1)]
    torch.testing.assert_close(draws.likely_M, expected_M)


def test_sets_are_of_the_asked_size_and_a_function_of_the_seed():
    scores_P = torch.randn(TOKENS, generator=chance(1))
    draws, again = (drawn(scores_P, KEPT, 5, chance(2)) for _ in range(2))
    assert (draws.chosen_MP.sum(1) == KEPT).all()
    assert torch.equal(draws.chosen_MP, again.chosen_MP)
    everything = drawn(scores_P, TOKENS, 2, chance(2))
    assert bool(everything.chosen_MP.all())


def test_scores_learn_which_tokens_must_stay():
    """Also of tokens that the best-scoring set of the beginning leaves out."""
    scores_P = torch.linspace(0.5, 0, TOKENS).requires_grad_()  # the needed ones score least
    optimizer = torch.optim.SGD([scores_P], lr=2.0)
    for step in range(150):
        draws = drawn(scores_P, KEPT, 4, chance(step))
        lost_M = KEPT - draws.chosen_MP[:, -KEPT:].sum(1).float()
        lesson = lesson_of(draws, lost_M)
        assert float(lesson.detach()) == 0
        optimizer.zero_grad()
        lesson.backward()
        optimizer.step()
    assert set(scores_P.topk(KEPT).indices.tolist()) == set(range(TOKENS - KEPT, TOKENS))


def test_draws_that_lose_alike_teach_nothing():
    scores_P = torch.zeros(TOKENS, requires_grad=True)
    lesson_of(drawn(scores_P, KEPT, 4, chance(0)), torch.full((4,), 0.7)).backward()
    torch.testing.assert_close(scores_P.grad, torch.zeros(TOKENS))
