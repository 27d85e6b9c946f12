"""The vision-language model learns to answer: questions on canvases, and what the projector says.

Several questions on a canvas share its image tokens in one row: each sees the image and itself,
and stands where it would stand alone, so a row says of each what it would say by itself. Most
steps see few of the image's tokens (canvas_sets.py).

Legend: B batch, T tokens, S tokens of one question, P image tokens, D width, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastiformer.shipped import SMOLLM2
from training.canvas_sets import middle_sets, mixed_sets
from training.canvas_tower import PATCHES, Canvases, Sight, Tower, pixels
from training.canvases import CORNERS, KINDS, Question
from training.data import seed_of
from training.fitting import Schedule, fit
from training.mixed import autocast, mixed
from training.neighbours import PATCH
from training.sentiment import Changed, Kept

IMAGE = SMOLLM2.renamed[1]
BEFORE, AFTER = "<|im_start|>user\n", "\n"  # the image
IGNORED = -100
SET_OPTIONS = ("set_steps",)
NOTHING, MIDDLE = "nothing", "one"  # how the projector begins to say it


@dataclass(frozen=True, slots=True)
class Rows:
    """Canvases with their questions, padded, as the language model takes them."""

    ids_BT: Tensor
    place_BT: Tensor
    seen_B1TT: Tensor  # bool
    labels_BT: Tensor  # of the token at hand, not the next one


def prompt_of(question: Question) -> str:
    """What stands before the answer, the image's tokens among it."""
    return f"{BEFORE}{IMAGE * PATCHES}{AFTER}{asked(question)}"


def asked(question: Question) -> str:
    return f"{question.text}<|im_end|>\n<|im_start|>assistant\n"


def rows_of(
    tokenizer: Any, asked_of: Sequence[Sequence[Question]], kept_BP: Tensor, device: str
) -> Rows:
    """Each canvas's questions behind one image, of which the tokens `kept_BP` are there."""

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return encoded

    before, image, after = ids(BEFORE), ids(IMAGE), ids(AFTER)
    first = len(before) + PATCHES
    every = []
    for questions, kept_P in zip(asked_of, kept_BP.tolist(), strict=True):
        row = [*before, *image * len(kept_P), *after]
        places = [*range(len(before)), *(len(before) + at for at in kept_P)]
        places += range(first, first + len(after))
        labels, owner = [IGNORED] * len(row), [-1] * len(row)
        for number, question in enumerate(questions):
            prompt, answer = ids(asked(question)), ids(f"{question.answer}<|im_end|>")
            row += prompt + answer
            start = first + len(after)
            places += range(start, start + len(prompt) + len(answer))
            labels += [IGNORED] * len(prompt) + answer
            owner += [number] * (len(prompt) + len(answer))
        every.append((row, places, labels, owner))
    longest = max(len(row) for row, *_ in every)

    def padded(which: int, filler: int) -> Tensor:
        lines = [each[which] + [filler] * (longest - len(each[which])) for each in every]
        return torch.tensor(lines, device=device)

    owner_BT = padded(3, -2)
    back_TT = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    shared_B1T = (owner_BT == -1)[:, None]
    same_BTT = owner_BT[:, :, None] == owner_BT[:, None]
    seen_B1TT = (back_TT & (shared_B1T | same_BTT))[:, None]
    return Rows(padded(0, 0), padded(1, 0), seen_B1TT, padded(2, IGNORED))


def answer_logits(model: Any, rows: Rows, features_BPD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits before each answer token [A, V], and the token [A]."""
    inner = model.model
    embedded_BTD = inner.language_model.embed_tokens(rows.ids_BT)
    image_BT1 = (rows.ids_BT == model.config.image_token_index)[..., None]
    embedded_BTD = embedded_BTD.masked_scatter(image_BT1, features_BPD.to(embedded_BTD.dtype))
    hidden_BTD = inner.language_model(
        inputs_embeds=embedded_BTD,
        attention_mask=rows.seen_B1TT,
        position_ids=rows.place_BT,
        use_cache=False,
    ).last_hidden_state
    said_BT = rows.labels_BT[:, 1:] != IGNORED
    logits_AV: Tensor = model.lm_head(hidden_BTD[:, :-1][said_BT])
    return logits_AV, rows.labels_BT[:, 1:][said_BT]


def train_projector(
    model: Any,
    tower: Tower,
    tokenizer: Any,
    canvases: Canvases,
    folder: Path,
    options: dict[str, Any],
    device: str,
) -> None:
    """Let the projector begin by saying what the tower sees in the language model's words.

    Raises:
        Stopped, RunError: see their messages.
    """
    torch.manual_seed(seed_of("projector", options["seed"]))
    projector = model.model.multi_modal_projector
    words = _words(model, tokenizer)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)

    def loss(step: int) -> dict[str, Tensor]:
        numbers = canvases.rows(step, options["tower_batch"])
        drawn = [canvases.canvas(number) for number in numbers]
        there = [canvas.patches(PATCH) for canvas in drawn]
        with torch.no_grad(), autocast(device):
            hidden_BPD = tower.hidden(pixels(drawn).to(device)).float()
        kinds = torch.stack([each.kinds_P for each in there]).to(device)
        corners = torch.stack([each.corners_P for each in there]).to(device)
        middles = torch.stack([each.middles_P for each in there]).to(device)
        wanted_BPD = words.kinds[kinds] + words.corners[corners] + words.middles[middles]
        said_BPD = projector(hidden_BPD)
        return {"total": F.mse_loss(said_BPD, wanted_BPD) / wanted_BPD.var()}

    projector.requires_grad_(True)
    schedule = Schedule(options["projector_steps"])
    of_projector = {**_before_sets(options), "answers": None}
    fit("projector", projector, [optimizer], loss, schedule, folder, of_projector)


@dataclass(frozen=True, slots=True)
class _Words:
    """The language model's embeddings of what a patch may show."""

    kinds: Tensor
    corners: Tensor
    middles: Tensor


def _words(model: Any, tokenizer: Any) -> _Words:
    table = model.model.language_model.embed_tokens.weight.detach().float()

    def mean(text: str) -> Tensor:
        embedded: Tensor = table[tokenizer.encode(text, add_special_tokens=False)].mean(0)
        return embedded

    none = torch.zeros_like(table[0])
    return _Words(
        kinds=torch.stack([mean(kind) for kind in (*KINDS, NOTHING)]),
        corners=torch.stack([*(mean(corner) for corner in CORNERS), none]),
        middles=torch.stack([none, mean(MIDDLE)]),
    )


def train_answers(
    model: Any,
    tower: Tower,
    tokenizer: PreTrainedTokenizerBase,
    canvases: Canvases,
    folder: Path,
    options: dict[str, Any],
    device: str,
) -> dict[str, Tensor]:
    """Fit projector and low-rank changes, then add the changes to the weights; both by name.

    First from few image tokens that are easily learnt from, in `folder`; then, on other canvases,
    from sets of every kind, in the folder `sets` beside it.

    Raises:
        Stopped, RunError: see their messages.
    """
    torch.manual_seed(seed_of("answers", options["seed"]))
    batch = options["batch"]
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    mixed(model.model.language_model)
    thin = with_changes(model.model.language_model, options["rank"], device)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def loss(step: int, sets: _Sets) -> dict[str, Tensor]:
        numbers = canvases.rows(step, batch)
        drawn = [canvases.canvas(number) for number in numbers]
        every = [canvases.asked(*pair) for pair in zip(numbers, drawn, strict=True)]
        chance = torch.Generator().manual_seed(seed_of("kept", options["seed"], step))
        with autocast(device):
            with torch.no_grad():
                hidden_BPD = tower.hidden(pixels(drawn).to(device))
                kept_BP = sets(tower.told(hidden_BPD), step, chance).to(device)
            rows = rows_of(tokenizer, every, kept_BP, device)
            features_BPD = projector(hidden_BPD.gather(1, _wide(kept_BP, hidden_BPD)))
            logits_AV, answer_A = answer_logits(model, rows, features_BPD)
        right = (logits_AV.detach().argmax(1) == answer_A).float().mean()
        return {"right": right, "total": F.cross_entropy(logits_AV.float(), answer_A)}

    def learn(place: Path, first: int, steps: int, sets: _Sets, said: dict[str, Any]) -> None:
        optimizer = torch.optim.AdamW(trained.values(), lr=options["lr"], weight_decay=0.01)
        schedule = Schedule(steps, warmup=0.05, checkpoint_every=25)
        label, kept = place.name, Kept(trained)
        fit(label, kept, [optimizer], lambda step: loss(first + step, sets), schedule, place, said)

    few, steps = options["image_tokens"], round(canvases.count // batch * options["epochs"])
    learn(folder, 0, steps, lambda *drawn: middle_sets(few, *drawn), _before_sets(options))
    learn(folder.with_name("sets"), steps, options["set_steps"], mixed_sets, options)
    with torch.no_grad():
        for each in trained.values():
            each.copy_(each.to(torch.float16))  # as they are written
    changes = {name: each.detach().cpu().clone() for name, each in trained.items()}
    merge_changes(thin)
    return changes


def _before_sets(options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide what is learnt before the sets of every kind."""
    return {name: each for name, each in options.items() if name not in SET_OPTIONS}


_Sets = Callable[[Sight, int, torch.Generator], Tensor]  # of a step: the tokens that are seen


def _wide(at_BP: Tensor, x_BPD: Tensor) -> Tensor:
    return at_BP[..., None].expand(-1, -1, x_BPD.shape[2])


def with_changes(language: Any, rank: int, device: str) -> list[tuple[nn.Module, str]]:
    """Put a low-rank change beside every projection of the layers; where they stand now."""
    places = []
    for layer in language.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, own = name.rpartition(".")
                holder = layer.get_submodule(parent)
                setattr(holder, own, Changed(linear, rank).to(device))
                places.append((holder, own))
    return places


@torch.no_grad()
def merge_changes(places: Sequence[tuple[nn.Module, str]]) -> None:
    """The plain layers again, with the changes added to their weights."""
    for holder, own in places:
        changed: Any = getattr(holder, own)
        changed.linear.weight += changed.up_GR @ changed.down_RF
        setattr(holder, own, changed.linear)


@torch.inference_mode()
def answer_accuracy(
    model: Any, tokenizer: Any, canvases: Canvases, device: str, batch: int = 8
) -> dict[str, float]:
    """Share of the questions answered word for word by greedy decoding, all and by sort.

    Whether the likeliest token is right at every place of the answer is read off one pass: just
    then greedy decoding writes the answer and stops.
    """
    right: dict[str, list[bool]] = {}
    for at in range(0, canvases.count, batch):
        numbers = range(at, min(at + batch, canvases.count))
        drawn = [canvases.canvas(number) for number in numbers]
        every = [canvases.asked(*pair) for pair in zip(numbers, drawn, strict=True)]
        kept_BP = torch.arange(PATCHES, device=device).expand(len(drawn), -1)
        rows = rows_of(tokenizer, every, kept_BP, device)
        features = model.get_image_features(
            pixels(drawn).to(device),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).pooler_output
        logits_AV, answer_A = answer_logits(model, rows, torch.stack(list(features)))
        good = (logits_AV.argmax(1) == answer_A).tolist()
        for questions in every:
            for question in questions:
                tokens = len(tokenizer.encode(question.answer, add_special_tokens=False)) + 1
                whole, good = all(good[:tokens]), good[tokens:]
                for sort in ("all", question.about):
                    right.setdefault(sort, []).append(whole)
        assert not good, "an answer's tokens are counted once"
    return {sort: sum(each) / len(each) for sort, each in sorted(right.items())}
