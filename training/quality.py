"""What a capacity loses and spends, measured through the sparse form: the one that is served.

A window of held-out text is a prompt and its continuation. The pretrained model's logits on it
are made once; then each capacity runs the same tokens, with a cache, and is compared.

Shape letters: T tokens of a window   N tokens compared   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import stdev

import torch
from torch import Tensor

from elastiformer import Calibration, Capacity, Chunk, ElasticModel, Phase, dense_plan
from elastiformer.elastic import Elastic
from training.losses import Divergence, kl_per_token

ROWS_AT_ONCE = 256  # of the vocabulary's width: bounds what a comparison holds in memory


class Setting(StrEnum):
    """Which tokens of a window are routed, and which are compared."""

    PROMPT = "prompt"  # the prompt is routed, the continuation is whole; compared on it
    BOTH = "both"  # prompt and continuation are routed: what a user gets
    SCORED = "scored"  # every token is an output token, routed and compared


@dataclass(frozen=True, slots=True)
class Window:
    """One held-out text, and what the pretrained model makes of it."""

    ids_T: Tensor
    prompt_tokens: int
    teacher_TV: Tensor  # logits, in float32
    words: tuple[range, ...] = ()  # where each whole word of letters stands, from its space on

    def first_output(self, setting: Setting) -> int:
        """The first token of phase output."""
        return 0 if setting is Setting.SCORED else self.prompt_tokens - 1

    def cloze(self, setting: Setting) -> list[range]:
        """The words to guess, each the last one of the passage before it; places in `compared`."""
        at = self.compared(setting)
        return [
            range(word.start - 1 - at.start, word.stop - 1 - at.start)
            for word in self.words
            if word.start > at.start
        ]

    def compared(self, setting: Setting) -> slice:
        """The tokens whose next-token distribution is judged: each has a next token to judge by."""
        return slice(self.first_output(setting), len(self.ids_T) - 1)


@dataclass(frozen=True, slots=True)
class Quality:
    """One capacity in one setting over a set of windows; KL in nats per token."""

    capacity: float
    setting: Setting
    tokens: int
    kl: float
    kl_error: float | None  # the standard error of it over windows; None of one window
    kl_p95: float
    same_top: float  # share of tokens whose likeliest next token is the pretrained model's
    perplexity: float
    perplexity_ratio: float  # over the pretrained model's on the same tokens
    cloze: float | None  # of the words that end a passage, the share whose tokens are likeliest
    cloze_whole: float | None  # the pretrained model's own; None where no word is in sight
    spent: float  # the mean over requests of their spent share
    spent_least: float
    spent_most: float


def recalibrate(model: Elastic, calibration: Calibration | None) -> None:
    """From now on the model runs under this calibration."""
    assert model.adapter is not None
    model.adapter.calibration = calibration
    model.attach(model.adapter)  # which forgets the schedules of the one before


@torch.inference_mode()
def windows_of(model: ElasticModel, ids_WT: Tensor, prompt_tokens: int) -> list[Window]:
    """Run the pretrained model on each window."""
    return [
        Window(
            ids_T.cpu(),
            prompt_tokens,
            model.teacher(ids_T[None].to(model.device))[0].float(),
            words_of(model, ids_T),
        )
        for ids_T in ids_WT
    ]


def copied(ids_WT: Tensor, prompt_tokens: int) -> Tensor:
    """The same prompts, each followed by its own first tokens, again and again if need be."""
    tokens = ids_WT.shape[1]
    places_T = torch.arange(tokens)
    return ids_WT[:, torch.where(places_T < prompt_tokens, places_T, places_T % prompt_tokens)]


def words_of(model: ElasticModel, ids_T: Tensor) -> tuple[range, ...]:
    """Where words of letters stand that are whole: a space before, no letter after."""
    if model.tokenizer is None:
        return ()
    pieces = [model.tokenizer.decode([token]) for token in ids_T.tolist()]
    found: list[range] = []
    first = None
    for at, piece in enumerate(pieces):
        if first is not None and piece.isalpha():
            continue
        if first is not None and "".join(pieces[first:at]) != " ":
            found.append(range(first, at))
        first = at if piece == " " or (piece[:1] == " " and piece[1:].isalpha()) else None
    return tuple(found)  # without a word that the window's end cuts off


@torch.inference_mode()
def measure(
    model: ElasticModel, windows: Sequence[Window], capacity: float, setting: Setting
) -> Quality:
    """Run every window at a capacity and compare with the pretrained model.

    Raises:
        CapacityError: when the adapter cannot be run at this capacity.
    """
    asked = asked_of(capacity, setting)
    found = (routed(model, window, asked, setting) for window in windows)
    return compare(windows, found, capacity, setting)


def compare(
    windows: Sequence[Window],
    found: Iterable[tuple[Tensor, float]],
    capacity: float,
    setting: Setting,
) -> Quality:
    """Sum up (logits of the compared tokens, share spent), one of each for every window."""
    kls: list[Tensor] = []
    spent: list[float] = []
    same, loss, teacher_loss = 0, 0.0, 0.0
    guessed: list[bool] = []
    guessed_whole: list[bool] = []
    means: list[float] = []
    for window, (student_NV, share) in zip(windows, found, strict=True):
        spent.append(share)
        before = len(kls)
        at = window.compared(setting)
        teacher_NV = window.teacher_TV[at]
        next_N = window.ids_T[at.start + 1 : at.stop + 1].to(student_NV.device)
        words = window.cloze(setting)
        guessed += _guessed(student_NV, next_N, words)
        guessed_whole += _guessed(teacher_NV, next_N, words)
        for teacher, student, following in zip(
            torch.split(teacher_NV, ROWS_AT_ONCE),
            torch.split(student_NV, ROWS_AT_ONCE),
            torch.split(next_N, ROWS_AT_ONCE),
            strict=True,
        ):
            kls.append(kl_per_token(teacher, student, Divergence()).cpu())
            same += int((teacher.argmax(-1) == student.argmax(-1)).sum())
            loss += _loss_sum(student, following)
            teacher_loss += _loss_sum(teacher, following)
        means.append(float(torch.cat(kls[before:]).mean()))
    kl_N = torch.cat(kls)
    return Quality(
        capacity=capacity,
        setting=setting,
        tokens=len(kl_N),
        kl=float(kl_N.mean()),
        kl_error=stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        kl_p95=float(kl_N.quantile(0.95)),
        same_top=same / len(kl_N),
        perplexity=math.exp(loss / len(kl_N)),
        perplexity_ratio=math.exp((loss - teacher_loss) / len(kl_N)),
        cloze=sum(guessed) / len(guessed) if guessed else None,
        cloze_whole=sum(guessed_whole) / len(guessed_whole) if guessed_whole else None,
        spent=sum(spent) / len(spent),
        spent_least=min(spent),
        spent_most=max(spent),
    )


def asked_of(capacity: float, setting: Setting) -> Capacity:
    return Capacity(capacity, 1.0 if setting is Setting.PROMPT else capacity)


def routed(
    model: ElasticModel, window: Window, asked: Capacity, setting: Setting
) -> tuple[Tensor, float]:
    """The logits of the compared tokens, [N, V], and the share of the block FLOPs spent."""
    ids = window.ids_T.tolist()
    scored = setting is Setting.SCORED
    sequence = model.sequence(asked, window.prompt_tokens, len(ids), scored=scored)
    try:
        (first,) = model.step([Chunk(sequence, ids[: window.prompt_tokens])])
        (then,) = model.step([Chunk(sequence, ids[window.prompt_tokens :])])
        return torch.cat([first, then])[:-1], sequence.usage.capacity_spent
    finally:
        sequence.release()


def _guessed(logits_NV: Tensor, next_N: Tensor, words: Sequence[range]) -> list[bool]:
    """Of each word, whether all of its tokens are the likeliest."""
    hit_N = (logits_NV.argmax(-1) == next_N).tolist()
    return [all(hit_N[at] for at in word) for word in words]


def _loss_sum(logits_NV: Tensor, next_N: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_NV.float(), next_N, reduction="sum"))


def prompt_share(model: ElasticModel, context: int) -> float:
    """What a prompt token spends at capacity 1.0: less than 1, as nobody reads its last layer."""
    plan = dense_plan(len(model.layout.layers))
    return model.shape.of_phase(Phase.PROMPT).planned_share(plan, context)


def miss(capacity: float, least: float, most: float, whole: float, prompt: float) -> float:
    """By how much requests missed their capacity: above it, or below what can be spent.

    Args:
        least, most: shares that requests of this capacity spent.
        whole: what they spend at capacity 1.0.
        prompt: what their prompt tokens spend at capacity 1.0, and so at most.
    """
    prompts_part = (1 - whole) / (1 - prompt)
    unspendable = prompts_part * max(0.0, capacity - prompt)
    return max(most - capacity, capacity - unspendable - least, 0.0)
