"""What the routers learn from: pure functions of logits and routes, and their sum by name.

Shape letters:
    B rows of the batch   T tokens   N output tokens, over the whole batch   V vocabulary
    M things of one router: heads or experts   K the teacher's likeliest tokens, and the rest

Every loss is a sum over rows (or tokens) divided by a count that the caller gives: a batch then
has the same loss however it is cut into processes and passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elastiformer.plan_grid import Route
from elastiformer.routers import TOKEN_UNITS

TOKENS_AT_ONCE = 256  # of the vocabulary's width: bounds what the KL holds in memory


class Direction(StrEnum):
    """Which of the two weighs the difference: forward, the teacher; reverse, the student."""

    FORWARD = "forward"
    REVERSE = "reverse"


@dataclass(frozen=True, slots=True)
class Divergence:
    """The form of the distillation loss.

    With `top_k`, the teacher's likeliest tokens and one bin for all others; 0: every token.
    """

    direction: Direction = Direction.FORWARD
    top_k: int = 0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Weights:
    """What each part counts in the total; distillation counts 1."""

    balance: float = 0.1
    agreement: float = 0.1


@dataclass(frozen=True, slots=True)
class Losses:
    """The parts of one step's loss, unweighted scalars, and their weighted sum."""

    distil: Tensor
    balance: Tensor
    agreement: Tensor
    total: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.distil, self.balance, self.agreement, self.total

    def __add__(self, other: Losses) -> Losses:
        pairs = zip(self.parts, other.parts, strict=True)
        return Losses(*(ours + theirs for ours, theirs in pairs))


def kl_divergence(
    teacher_BTV: Tensor,
    student_BTV: Tensor,
    mask_BT: Tensor,
    form: Divergence | None = None,
    tokens: int | None = None,
) -> Tensor:
    """KL between teacher and student, in nats per unmasked token; 0 when the two agree.

    A temperature T softens both and multiplies by T squared, so that gradients keep their size.

    Args:
        teacher_BTV: logits, any float dtype. Carries no gradient.
        student_BTV: logits.
        mask_BT: bool, True on the tokens that count.
        form: by default forward, over the whole vocabulary, at temperature 1.
        tokens: the count to divide by; by default those unmasked here.

    Returns:
        A float32 scalar; 0 when nothing is unmasked.

    Source: ElastiFormer, self-distillation (arXiv:2411.15281); the remainder bin is of its code.
    """
    form = form or Divergence()
    teacher_NV, student_NV = teacher_BTV.detach()[mask_BT], student_BTV[mask_BT]
    total = student_BTV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student_NV), TOKENS_AT_ONCE):
        chunk = slice(start, start + TOKENS_AT_ONCE)
        teacher, student = teacher_NV[chunk], student_NV[chunk]
        if not student.requires_grad:
            part = _kl_sum(teacher, student, form)
        elif form.direction is Direction.FORWARD and not form.top_k:
            part = _Forward.apply(teacher, student, form.temperature)  # type: ignore[no-untyped-call]
        else:
            # Probabilities of a chunk are made again on the way back, not kept.
            part = checkpoint(_kl_sum, teacher, student, form, use_reentrant=False)
            assert isinstance(part, Tensor)
        total = total + part
    return total / max(1, len(student_NV) if tokens is None else tokens)


def kl_per_token(teacher_NV: Tensor, student_NV: Tensor, form: Divergence) -> Tensor:
    """KL of each token, in nats."""
    teacher = (teacher_NV.float() / form.temperature).log_softmax(-1)
    student = (student_NV.float() / form.temperature).log_softmax(-1)
    if 0 < form.top_k < teacher.shape[-1]:
        likeliest_NK = teacher.topk(form.top_k, dim=-1).indices
        teacher, student = _with_rest(teacher, likeliest_NK), _with_rest(student, likeliest_NK)
    if form.direction is Direction.REVERSE:
        teacher, student = student, teacher
    kl_N = (teacher.exp() * (teacher - student)).sum(-1)
    return kl_N * form.temperature**2


class _Forward(torch.autograd.Function):
    """The sum over the whole vocabulary; its gradient is made on the way, in one go."""

    @staticmethod
    def forward(ctx: Any, teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
        teacher = (teacher_NV.float() / temperature).log_softmax(-1)
        student = (student_NV.float() / temperature).log_softmax(-1)
        p_NV = teacher.exp()
        total = (p_NV * (teacher - student)).sum() * temperature**2
        slope_NV = student.exp_().sub_(p_NV).mul_(temperature)
        ctx.save_for_backward(slope_NV.to(student_NV.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (slope_NV,) = ctx.saved_tensors
        return None, slope_NV * slopes[0].to(slope_NV.dtype), None


def _kl_sum(teacher_NV: Tensor, student_NV: Tensor, form: Divergence) -> Tensor:
    return kl_per_token(teacher_NV, student_NV, form).sum()


def _with_rest(log_p_NV: Tensor, kept_NK: Tensor) -> Tensor:
    """The log-probabilities of the kept tokens and, last, of all others together."""
    # Summed from the others themselves: 1 minus the kept ones is rounding noise when they are all.
    log_rest_N1 = log_p_NV.scatter(-1, kept_NK, float("-inf")).logsumexp(-1, keepdim=True)
    log_rest_N1 = log_rest_N1.clamp_min(math.log(torch.finfo(torch.float32).tiny))
    return torch.cat([log_p_NV.gather(-1, kept_NK), log_rest_N1], -1)


def load_balance(scores_BTM: Tensor, kept_BTM: Tensor, active_BT: Tensor) -> Tensor:
    """How unevenly a router uses its heads or experts, per row; 0 when all alike.

    Switch's M x sum(f x p), f the share of a row's tokens that keep a thing and p the router's
    mean probability of it, less its value for a uniform router (the mean number kept). Per row,
    since rows run under shares of their own; a row without an active token has 0.
    """
    probability_BTM = scores_BTM.float().softmax(-1)
    here_BT1 = active_BT.unsqueeze(-1).float()
    tokens_B1 = here_BT1.sum(1).clamp_min(1)
    used_BM = (kept_BTM.float() * here_BT1).sum(1) / tokens_B1
    probable_BM = (probability_BTM * here_BT1).sum(1) / tokens_B1
    things = scores_BTM.shape[-1]
    return things * (used_BM * probable_BM).sum(-1) - used_BM.sum(-1)


def agreement(scores_BT: Tensor, kept_BT: Tensor, active_BT: Tensor) -> Tensor:
    """How badly a token's own score foretells that it is kept, in nats per token, per row.

    Cross-entropy of sigmoid(score) against the decision: a threshold on the score then does what
    the ranking did.
    """
    entropy_BT = F.binary_cross_entropy_with_logits(
        scores_BT.float(), kept_BT.float(), reduction="none"
    )
    here_BT = active_BT.float()
    return (entropy_BT * here_BT).sum(1) / here_BT.sum(1).clamp_min(1)


def router_losses(
    routes: Sequence[Route], rows: int, token_routers: int, part_routers: int
) -> tuple[Tensor, Tensor]:
    """Load balance and agreement, each the mean over rows and over the adapter's routers.

    Args:
        rows: rows of the whole batch, of which the routes may hold a part.
        token_routers: how many the adapter has; one that was not asked counts with 0.
        part_routers: how many routers of heads and experts.
    """
    balance, agree = torch.zeros(()), torch.zeros(())
    for route in routes:
        if route.unit in TOKEN_UNITS:
            agree = agree + agreement(route.scores, route.kept, route.active_BT).sum()
        else:
            balance = balance + load_balance(route.scores, route.kept, route.active_BT).sum()
    return balance / max(1, rows * part_routers), agree / max(1, rows * token_routers)
