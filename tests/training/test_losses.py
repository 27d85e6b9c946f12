"""Losses: zero where they should be, and the numbers of a hand count elsewhere."""

import math

import pytest
import torch

from elastiformer import Route, Unit
from training.losses import (
    Direction,
    Divergence,
    agreement,
    kl_divergence,
    kl_per_token,
    load_balance,
    router_losses,
)

BATCH, TOKENS, VOCAB, THINGS = 2, 5, 11, 4

FORMS = [
    Divergence(),
    Divergence(Direction.REVERSE),
    Divergence(top_k=3),
    Divergence(Direction.REVERSE, top_k=3, temperature=2.0),
    Divergence(top_k=VOCAB, temperature=0.5),
]


def logits():
    return 3 * torch.randn(BATCH, TOKENS, VOCAB)


@pytest.fixture
def everywhere():
    return torch.ones(BATCH, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize("form", FORMS)
def test_kl_is_zero_when_student_and_teacher_agree(everywhere, form):
    teacher = logits()

    # A constant added to a token's logits changes no probability.
    student = teacher + torch.randn(BATCH, TOKENS, 1)

    assert kl_divergence(teacher, student, everywhere, form).abs() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_kl_is_positive_when_they_differ(everywhere, form):
    assert kl_divergence(logits(), logits(), everywhere, form) > 0.1


def test_kl_has_the_numbers_of_a_hand_count():
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    double = torch.tensor([[0.8, 0.1, 0.1]]).log()
    log2 = math.log(2)

    assert kl_per_token(teacher, student, Divergence()).item() == pytest.approx(0.25 * log2)
    # The likeliest token, and the two others together: 1/2 against 1/4, 1/2 against 3/4.
    top = kl_per_token(teacher, student, Divergence(top_k=1)).item()
    assert top == pytest.approx(0.5 * log2 + 0.5 * math.log(2 / 3))
    forward = kl_per_token(teacher, double, Divergence()).item()
    reverse = kl_per_token(teacher, double, Divergence(Direction.REVERSE)).item()
    assert forward == pytest.approx(0.5 * math.log(5 / 8) + 0.5 * math.log(2.5))
    assert reverse == pytest.approx(0.8 * math.log(8 / 5) + 0.2 * math.log(0.4))


def test_temperature_softens_and_keeps_the_size_of_gradients():
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()

    softened = kl_per_token(teacher, student, Divergence(temperature=2.0))
    by_hand = kl_per_token(teacher / 2, student / 2, Divergence()) * 4

    torch.testing.assert_close(softened, by_hand)


@pytest.mark.parametrize("top_k", [1, 2, 5, 10])
def test_binning_the_rest_never_adds_to_kl(top_k):
    teacher, student = logits().view(-1, VOCAB), logits().view(-1, VOCAB)

    whole = kl_per_token(teacher, student, Divergence())
    binned = kl_per_token(teacher, student, Divergence(top_k=top_k))

    assert (binned <= whole + 1e-5).all()
    assert (binned >= -1e-5).all()


def test_a_teacher_that_is_sure_gives_finite_losses_and_gradients():
    teacher = torch.zeros(1, VOCAB)
    teacher[0, 0] = 500.0  # the others' probability is 0 in float32
    for form in FORMS:
        student = torch.randn(1, VOCAB, requires_grad=True)
        kl_per_token(teacher, student, form).sum().backward()
        assert student.grad.isfinite().all()


def test_masked_tokens_count_for_nothing_and_carry_no_gradient():
    teacher, student = logits(), logits().requires_grad_()
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True

    loss = kl_divergence(teacher, student, mask)
    loss.backward()

    both = torch.stack([teacher[mask], student[mask]])
    torch.testing.assert_close(loss, kl_per_token(*both, Divergence()).mean())
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask] != 0).any(-1).all()
    assert kl_divergence(teacher, student, torch.zeros_like(mask)) == 0


def test_the_kl_of_parts_adds_up_whatever_the_chunks(monkeypatch, everywhere):
    teacher, student = logits(), logits()
    whole = kl_divergence(teacher, student, everywhere)

    monkeypatch.setattr("training.losses.TOKENS_AT_ONCE", 3)
    parts = sum(
        kl_divergence(teacher[[row]], student[[row]], everywhere[[row]], tokens=BATCH * TOKENS)
        for row in range(BATCH)
    )

    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_that_is_made_on_the_way_is_that_of_the_formula(everywhere, temperature):
    teacher, student = logits(), logits().requires_grad_()
    form = Divergence(temperature=temperature)

    (3 * kl_divergence(teacher, student, everywhere, form)).backward()

    again = student.detach().clone().requires_grad_()
    (3 * kl_per_token(teacher.view(-1, VOCAB), again.view(-1, VOCAB), form).mean()).backward()
    torch.testing.assert_close(student.grad, again.grad)


def keep_two(*pairs):
    kept = torch.zeros(1, len(pairs), THINGS, dtype=torch.bool)
    for token, pair in enumerate(pairs):
        kept[0, token, list(pair)] = True
    return kept


def test_balance_is_zero_for_a_uniform_router_whatever_it_keeps():
    scores = torch.zeros(1, 2, THINGS)
    here = torch.ones(1, 2, dtype=torch.bool)

    assert load_balance(scores, keep_two((0, 1), (0, 1)), here).item() == pytest.approx(0)
    assert load_balance(scores, keep_two((0, 1), (2, 3)), here).item() == pytest.approx(0)


def test_balance_has_the_number_of_a_hand_count():
    # Both tokens give probabilities .4 .4 .1 .1 and keep the first two: f = 1 1 0 0, k = 2.
    scores = torch.tensor([0.4, 0.4, 0.1, 0.1]).log().expand(1, 2, THINGS)
    here = torch.ones(1, 2, dtype=torch.bool)

    assert load_balance(scores, keep_two((0, 1), (0, 1)), here).item() == pytest.approx(4 * 0.8 - 2)


def test_only_tokens_that_a_router_decided_count_in_its_losses():
    scores = torch.randn(1, 2, THINGS)
    first = torch.tensor([[True, False]])

    both = load_balance(scores, keep_two((0, 1), (2, 3)), first)
    alone = load_balance(scores[:, :1], keep_two((0, 1)), first[:, :1])
    none = load_balance(scores, keep_two((0, 1), (2, 3)), torch.zeros_like(first))

    torch.testing.assert_close(both, alone)
    assert none.item() == 0


def test_agreement_is_the_cross_entropy_of_the_decision():
    scores = torch.tensor([[0.0, 2.0, -9.0]])
    kept = torch.tensor([[True, False, False]])
    here = torch.tensor([[True, True, False]])

    by_hand = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert agreement(scores, kept, here).item() == pytest.approx(by_hand)


def test_a_router_that_is_sure_and_right_has_no_agreement_loss():
    scores = torch.tensor([[30.0, -30.0]])

    loss = agreement(scores, scores > 0, torch.ones(1, 2, dtype=torch.bool))

    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_router_losses_of_parts_of_a_batch_add_up_to_those_of_the_whole():
    rows, routers = 2, (3, 2)  # of tokens, of heads and experts
    tokens = Route(
        0,
        Unit.MLP_TOKENS,
        torch.randn(rows, TOKENS),
        torch.rand(rows, TOKENS) > 0.5,
        torch.rand(rows, TOKENS) > 0.2,
    )
    heads = Route(
        1,
        Unit.HEADS,
        torch.randn(rows, TOKENS, THINGS),
        torch.rand(rows, TOKENS, THINGS) > 0.5,
        torch.rand(rows, TOKENS) > 0.2,
    )

    def row(route, at):
        one = slice(at, at + 1)
        return Route(
            route.layer, route.unit, route.scores[one], route.kept[one], route.active_BT[one]
        )

    whole = router_losses([tokens, heads], rows, *routers)
    parts = [router_losses([row(tokens, at), row(heads, at)], rows, *routers) for at in range(rows)]

    for name in (0, 1):
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts))
