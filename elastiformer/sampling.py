"""From logits to the next token: each row under its own settings and its own generator.

Rows are drawn together but never look at each other: one uniform number per row comes from that
row's generator, and the token is read off the row's own distribution. So what a row draws does
not depend on its batch-mates. Log-probabilities are those of the model, before any penalty,
temperature or filter.

Shape letters: R rows   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastiformer.errors import InputError

MOST_LOGPROBS = 20
_SEED_STEP = 0x9E3779B97F4A7C15  # spreads the choices of one request over the seeds
_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from its logits.

    At temperature 0 the likeliest token is taken. `top_k` 0 keeps all. `logprobs` is how many
    alternatives are reported beside the chosen token; None reports nothing at all.

    Raises:
        InputError: naming every setting outside its bounds.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{name}: {bound}; got {value}"
            for name, value, inside, bound in (
                ("temperature", self.temperature, 0 <= self.temperature <= 2, "in [0, 2]"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
                ("seed", self.seed, _fits_64_bits(self.seed), "a 64-bit integer"),
                ("presence_penalty", self.presence_penalty, _mild(self.presence_penalty), _MILD),
                ("frequency_penalty", self.frequency_penalty, _mild(self.frequency_penalty), _MILD),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    0 < self.repetition_penalty <= 10,
                    "in (0, 10]",
                ),
                (
                    "logprobs",
                    self.logprobs,
                    self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                    f"in [0, {MOST_LOGPROBS}]",
                ),
            )
            if not inside
        ]
        if wrong:
            raise InputError("; ".join(wrong))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def generator(self, choice: int = 0) -> torch.Generator:
        """A generator for one of a request's choices: of its seed, or of entropy without one."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + choice * _SEED_STEP) % _SEEDS)
        return generator


_MILD = "in [-2, 2]"


def _mild(penalty: float) -> bool:
    return -2 <= penalty <= 2


def _fits_64_bits(seed: int | None) -> bool:
    return seed is None or -_SEEDS <= seed < _SEEDS


GREEDY = Sampling(temperature=0.0)


class BrokenLogits(ArithmeticError):
    """A model gave NaN, or no finite logit at all, in these rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"the model gave logits that are not numbers, in rows {list(rows)}")
        self.rows = tuple(rows)


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row brings to the draw: its settings, its generator, and the tokens so far.

    `banned` tokens are not drawn, whatever their logit.
    """

    sampling: Sampling
    generator: torch.Generator
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()
    banned: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Likely:
    """A token and the natural logarithm of its probability under the model."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token; `logprob` is None where none was asked for."""

    token: int
    logprob: float | None = None
    top: tuple[Likely, ...] = field(default=())


@torch.inference_mode()
def sample(logits_RV: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """Choose one token per row.

    Raises:
        BrokenLogits: a row has NaN or no finite logit.
    """
    rows, _ = logits_RV.shape
    assert rows == len(draws), f"{rows} rows of logits for {len(draws)} draws"
    _refuse_broken(logits_RV)
    changed_RV = _penalised(logits_RV, draws)
    tokens = changed_RV.argmax(dim=-1).tolist()
    drawn = [row for row, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if drawn:
        picked = _draw(changed_RV[drawn], [draws[row] for row in drawn])
        for row, token in zip(drawn, picked, strict=True):
            tokens[row] = token
    return _reported(logits_RV, tokens, [draw.sampling.logprobs for draw in draws])


@torch.inference_mode()
def score(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[Sampled]:
    """The log-probability of a given token in each row, beside the `top` likeliest ones.

    Raises:
        BrokenLogits: a row has NaN or no finite logit.
    """
    _refuse_broken(logits_RV)
    return _reported(logits_RV, list(tokens), [top] * len(tokens))


def _refuse_broken(logits_RV: Tensor) -> None:
    broken = (~logits_RV.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
    if broken:
        raise BrokenLogits(broken)


def _penalised(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits with each row's penalties and bans; the same tensor when there are none."""
    touched = [row for row, draw in enumerate(draws) if draw.sampling.has_penalties or draw.banned]
    if not touched:
        return logits_RV
    changed_RV = logits_RV.clone()
    for row in touched:
        draw, logits_V = draws[row], changed_RV[row]
        settings = draw.sampling
        if settings.repetition_penalty != 1:
            seen = torch.tensor(sorted({*draw.prompt, *draw.generated}), device=logits_V.device)
            old = logits_V[seen]
            factor = settings.repetition_penalty
            logits_V[seen] = torch.where(old > 0, old / factor, old * factor)
        if draw.generated and (settings.frequency_penalty or settings.presence_penalty):
            generated = torch.tensor(draw.generated, device=logits_V.device)
            seen, counts = torch.unique(generated, return_counts=True)
            logits_V[seen] -= settings.frequency_penalty * counts + settings.presence_penalty
        if draw.banned:
            logits_V[torch.tensor(list(draw.banned), device=logits_V.device)] = -math.inf
    return changed_RV


def _draw(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    settings = [draw.sampling for draw in draws]
    device = logits_RV.device
    logits_RV = logits_RV.double()  # its running sum over a large vocabulary stays exact
    # Shifted first: a tiny temperature must not overflow.
    logits_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
    logits_RV /= torch.tensor([[max(s.temperature, 1e-5)] for s in settings], device=device)
    logits_RV = _of_top_k(logits_RV, settings)
    probs_RV = _of_top_p(logits_RV.softmax(dim=-1), settings)
    floor_R1 = torch.tensor([[s.min_p] for s in settings], device=device)
    probs_RV = probs_RV.where(probs_RV >= floor_R1 * probs_RV.amax(dim=-1, keepdim=True), 0.0)

    sums_RV = probs_RV.cumsum(dim=-1)
    uniform_R1 = torch.stack(
        [torch.rand(1, generator=draw.generator, dtype=torch.float64) for draw in draws]
    ).to(device)
    # right=True: a token of probability 0 has no width, so it cannot be hit.
    picked_R1 = torch.searchsorted(sums_RV, uniform_R1 * sums_RV[:, -1:], right=True)
    last_R1 = probs_RV.shape[-1] - 1 - (probs_RV > 0).flip(-1).int().argmax(-1, keepdim=True)
    picked: list[int] = torch.minimum(picked_R1, last_R1).flatten().tolist()
    return picked


def _of_top_k(logits_RV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    vocabulary = logits_RV.shape[-1]
    sizes = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in settings]
    limited = [row for row, size in enumerate(sizes) if size < vocabulary]
    if not limited:
        return logits_RV
    best_RK = logits_RV[limited].topk(max(sizes[row] for row in limited), dim=-1).values
    for place, row in enumerate(limited):
        least = best_RK[place, sizes[row] - 1]
        logits_RV[row] = logits_RV[row].where(logits_RV[row] >= least, -math.inf)
    return logits_RV


def _of_top_p(probs_RV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    limited = [row for row, s in enumerate(settings) if s.top_p < 1]
    if not limited:
        return probs_RV
    sorted_RV, order_RV = probs_RV[limited].sort(dim=-1, descending=True, stable=True)
    top_p_R1 = torch.tensor([[settings[row].top_p] for row in limited], device=probs_RV.device)
    # The smallest set that reaches top_p: a token stays while the ones before it do not reach it.
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    kept_RV = sorted_RV.where(before_RV < top_p_R1, 0.0)
    probs_RV[limited] = torch.zeros_like(kept_RV).scatter(-1, order_RV, kept_RV)
    return probs_RV


def _reported(logits_RV: Tensor, tokens: list[int], tops: Sequence[int | None]) -> list[Sampled]:
    asked = [row for row, top in enumerate(tops) if top is not None]
    sampled = [Sampled(token) for token in tokens]
    if not asked:
        return sampled
    logprobs_RV = logits_RV[asked].float().log_softmax(dim=-1)
    chosen_R1 = torch.tensor([[tokens[row]] for row in asked], device=logits_RV.device)
    own = logprobs_RV.gather(-1, chosen_R1).flatten().tolist()
    most = min(max(tops[row] or 0 for row in asked), logprobs_RV.shape[-1])
    best = logprobs_RV.topk(most, dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    for place, row in enumerate(asked):
        top = tops[row] or 0
        pairs = zip(ids[place][:top], values[place][:top], strict=True)
        likely = tuple(Likely(token, value) for token, value in pairs)
        sampled[row] = Sampled(tokens[row], own[place], likely)
    return sampled
