"""A router of image tokens learns by trying: sets drawn by its scores, and what each of them lost.

Which tokens stay is no smooth function of the scores, so the answers' loss says nothing of those
that were left out. But a set that was drawn by the scores, and lost less than others drawn beside
it, can be made likelier: of that the gradient is known, for every token.

Shape letters: P image tokens   M draws
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-20  # a logarithm's least argument


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Sets of one image's tokens, all of one size, and how likely the router made them."""

    chosen_MP: Tensor  # bool
    likely_M: Tensor  # the mean log-probability of a next token given those before; has a gradient


def drawn(scores_P: Tensor, count: int, many: int, chance: torch.Generator) -> Draws:
    """Draw so many sets of `count` tokens, one token after another without putting any back.

    A token is the next one with the softmax of the scores of those that are left.

    Source: the Gumbel-top-k trick (arXiv:1903.06059).
    """
    scores_MP = scores_P.float().expand(many, -1)
    noise_MP = torch.rand(scores_MP.shape, generator=chance).clamp_min(TINY).to(scores_P.device)
    order_MP = (scores_MP.detach() - (-noise_MP.log()).clamp_min(TINY).log()).argsort(
        1, descending=True
    )
    ranked_MP = scores_MP.gather(1, order_MP)
    left_MP = ranked_MP.flip(1).logcumsumexp(1).flip(1)  # over a token and all that come after it
    likely_M = (ranked_MP - left_MP)[:, :count].mean(1)
    chosen_MP = torch.zeros_like(scores_MP, dtype=torch.bool)
    chosen_MP.scatter_(1, order_MP[:, :count], True)
    return Draws(chosen_MP, likely_M)


def lesson_of(draws: Draws, lost_M: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient makes sets that lost less than the others likelier.

    A set's loss, a divergence, counts by its root, which is a distance: else the few sets that
    lose everything are all that is heard.

    Source: REINFORCE, each draw's baseline being the mean of the others (arXiv:1906.04032, 3.1).
    """
    lost_M = lost_M.detach().clamp_min(0).sqrt()
    many = len(lost_M)
    worse_M = (lost_M - lost_M.mean()) * many / max(1, many - 1)
    told = (worse_M * draws.likely_M).mean()
    return told - told.detach()
