"""From logits to the next token: each row under its own settings and its own generator.

Rows are drawn together but never look at each other: one uniform number per row comes from that
row's generator, and drawing.py reads the token off the row's own distribution. So what a row
draws does not depend on its batch-mates. Log-probabilities are those of the model, before any
penalty, temperature or filter.

Shape letters: R rows   V vocabulary   K likeliest tokens   N places, of all rows
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastiformer.drawing import Blocks, Pick, drawn, parts, some_rows
from elastiformer.errors import InputError

MOST_LOGPROBS = 20
_SEED_STEP = 0x9E3779B97F4A7C15  # spreads the choices of one request over the seeds
_UPPER_HALF = 0x9E3779B1
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

    def generator(self, choice: int = 0) -> Uniforms:
        """The numbers of one of a request's choices: of its seed, or of entropy without one."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            high, low = divmod((self.seed + choice * _SEED_STEP) % (2 * _SEEDS), 1 << 32)
            # PyTorch's generator of a CPU reads the lower half alone: the upper one is mixed in.
            generator.manual_seed((low + high * _UPPER_HALF) % (1 << 32))
        return Uniforms(generator)


_MILD = "in [-2, 2]"


def _mild(penalty: float) -> bool:
    return -2 <= penalty <= 2


def _fits_64_bits(seed: int | None) -> bool:
    return seed is None or -_SEEDS <= seed < _SEEDS


GREEDY = Sampling(temperature=0.0)


class BrokenLogits(ArithmeticError):
    """A model gave NaN, +inf, or no logit that may be drawn, in these rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"the model gave logits that are not numbers, in rows {list(rows)}")
        self.rows = tuple(rows)


class Uniforms:
    """One row's numbers in [0, 1), taken from its generator many at a time."""

    __slots__ = ("_generator", "_left")

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._left: list[float] = []

    def next(self) -> float:
        if not self._left:
            numbers = torch.rand(32, generator=self._generator, dtype=torch.float64)
            self._left = numbers.flip(0).tolist()
        return self._left.pop()


class Seen:
    """The tokens of a sequence, for its penalties: each once, with how often it was generated.

    Kept on the host, where a token is known first: one more costs the same at any length, and a
    draw sends those of all its rows to the device in one piece.
    """

    __slots__ = ("_places", "counts", "tokens")

    def __init__(self, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> None:
        self.tokens = array("q", dict.fromkeys(prompt))
        self.counts = array("q", [0]) * len(self.tokens)
        self._places = {token: place for place, token in enumerate(self.tokens)}
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """Count a token that was generated."""
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[place] += 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row brings to the draw: its settings, its generator, and the tokens so far.

    Only penalties look at `seen`. `banned` tokens are not drawn, whatever their logit.
    """

    sampling: Sampling
    generator: Uniforms
    seen: Seen | None = None
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

    Penalties and bans are written into the logits and taken back before this returns.

    Raises:
        BrokenLogits: a row has NaN, +inf, or no logit that may be drawn. No generator has moved.
    """
    rows, vocabulary = logits_RV.shape
    assert rows == len(draws), f"{rows} rows of logits for {len(draws)} draws"
    with _changed(logits_RV, draws) as changed_RV:
        blocks = Blocks(changed_RV)
        _refuse_broken(blocks.peak_R)
        token_R = blocks.best()
        picks = [_pick(row, draw) for row, draw in enumerate(draws) if not draw.sampling.is_greedy]
        if picks:
            places = torch.tensor([pick.row for pick in picks], device=token_R.device)
            token_R[places] = drawn(blocks, picks)
    tokens: list[int] = token_R.tolist()
    sampled = [Sampled(token) for token in tokens]
    asked = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    for part in parts(asked, vocabulary):
        tops = [draws[row].sampling.logprobs or 0 for row in part]
        reports = _reported(some_rows(logits_RV, part), [tokens[row] for row in part], tops)
        for row, report in zip(part, reports, strict=True):
            sampled[row] = report
    return sampled


@torch.inference_mode()
def score(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[Sampled]:
    """The log-probability of a given token in each row, beside the `top` likeliest ones.

    Raises:
        BrokenLogits: a row has NaN, +inf, or no finite logit.
    """
    rows, vocabulary = logits_RV.shape
    _refuse_broken(logits_RV.amax(dim=-1))
    scored: list[Sampled] = []
    for part in parts(range(rows), vocabulary):
        of_part = [tokens[row] for row in part]
        scored += _reported(some_rows(logits_RV, part), of_part, [top] * len(part))
    return scored


def side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Rows [V] as one tensor [R, V]; no copy where they lie one after another in memory."""
    first = rows[0]
    memory, start = first.untyped_storage().data_ptr(), first.data_ptr()
    if all(
        row.is_contiguous()
        and row.data_ptr() == start + place * first.nbytes
        and row.untyped_storage().data_ptr() == memory
        for place, row in enumerate(rows)
    ):
        return first.as_strided((len(rows), len(first)), (len(first), 1))
    return torch.stack(list(rows))


def _refuse_broken(peak_R: Tensor) -> None:
    broken = [row for row, peak in enumerate(peak_R.tolist()) if not math.isfinite(peak)]
    if broken:
        raise BrokenLogits(broken)


def _pick(row: int, draw: Draw) -> Pick:
    settings = draw.sampling
    return Pick(
        row,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        draw.generator.next(),
    )


@contextmanager
def _changed(logits_RV: Tensor, draws: Sequence[Draw]) -> Iterator[Tensor]:
    """The logits with each row's penalties and bans, for as long as this is open."""
    penalised = [
        (row, draw.sampling, draw.seen)
        for row, draw in enumerate(draws)
        if draw.seen is not None and draw.seen.tokens and draw.sampling.has_penalties
    ]
    vocabulary = logits_RV.shape[-1]
    banned = [row * vocabulary + token for row, draw in enumerate(draws) for token in draw.banned]
    if not penalised and not banned:
        yield logits_RV
        return
    # Few places change: putting them back costs less than a copy of all the others. Only rows
    # that share their memory, as expanded ones do, are copied.
    flat = logits_RV.contiguous().view(-1)
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        if penalised:
            undo.append(_penalise(flat, vocabulary, penalised))
        if banned:
            place_N = torch.tensor(banned, device=flat.device)
            old_N = flat[place_N]
            undo.append((place_N, old_N))
            # NaN and +inf stay: a ban must not hide that the model is broken.
            flat[place_N] = old_N.masked_fill(old_N < math.inf, -math.inf)
        yield flat.view_as(logits_RV)
    finally:
        for place_N, old_N in reversed(undo):
            flat[place_N] = old_N


def _penalise(
    flat: Tensor, vocabulary: int, penalised: Sequence[tuple[int, Sampling, Seen]]
) -> tuple[Tensor, Tensor]:
    """Lower what was seen, all rows at once; the places that changed, and what stood there."""
    tokens, counts = array("q"), array("q")
    for _, _, seen in penalised:
        tokens += seen.tokens
        counts += seen.counts
    table = torch.tensor(
        [
            (
                row * vocabulary,
                settings.repetition_penalty,
                settings.frequency_penalty,
                settings.presence_penalty,
            )
            for row, settings, _ in penalised
        ],
        dtype=torch.float64,
    )
    lengths = torch.tensor([len(seen.tokens) for _, _, seen in penalised])
    table_N = table.repeat_interleave(lengths, dim=0).to(flat.device)
    start_N, *penalties = table_N.unbind(dim=-1)
    # So small a factor, and any logit above 0 has all the weight already; a smaller one overflows.
    penalties[0] = penalties[0].clamp(min=1e3 / torch.finfo(flat.dtype).max)
    factor_N, frequency_N, presence_N = (each.to(flat.dtype) for each in penalties)
    place_N = torch.frombuffer(tokens, dtype=torch.int64).to(flat.device) + start_N.long()
    count_N = torch.frombuffer(counts, dtype=torch.int64).to(flat.device)

    old_N = flat[place_N]
    new_N = torch.where(old_N > 0, old_N / factor_N, old_N * factor_N)
    flat[place_N] = new_N - (frequency_N * count_N + presence_N * (count_N > 0))
    return place_N, old_N


def _reported(logits_RV: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Sampled]:
    """Tokens with their log-probabilities, each beside the likeliest ones of its row."""
    rows, vocabulary = logits_RV.shape
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    chosen_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
    own: list[float] = logprobs_RV.gather(-1, chosen_R1).squeeze(-1).tolist()
    if not any(tops):
        return [Sampled(token, value) for token, value in zip(tokens, own, strict=True)]
    # The same number of them for every row: then what a row shows is its own affair.
    row_R = torch.arange(rows, device=logits_RV.device)
    id_RK, value_RK = Blocks(logprobs_RV).likeliest(row_R, min(MOST_LOGPROBS, vocabulary))
    value_RK, order_RK = value_RK.sort(dim=-1, descending=True, stable=True)
    values, ids = value_RK.tolist(), id_RK.gather(-1, order_RK).tolist()
    return [
        Sampled(
            tokens[row],
            own[row],
            tuple(Likely(*pair) for pair in zip(ids[row][:top], values[row][:top], strict=True)),
        )
        for row, top in enumerate(tops)
    ]
