"""The embedded vision-language model: a tower that sees canvases, a projector, SmolLM2.

The tower is the vision transformer of fashion-mnist on a larger grid; it first learns which kind
of item stands in each patch. Then a projector and low-rank changes to SmolLM2's projections learn
to answer questions. The whole is Transformers' own `LlavaForConditionalGeneration`.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from elastiformer.weights import load_base
from training.canvas_tower import PATCHES, Canvases, patch_accuracy, pixels, train_tower
from training.canvases import SIDE, Question
from training.data import seed_of
from training.fashion_mnist import fetch_images
from training.files import RunError, write_atomically, write_json
from training.fitting import Schedule, fit
from training.mixed import autocast
from training.sentiment import Changed, Kept
from training.vision import PATCH, image_processor

LANGUAGE = "smollm2-135m-instruct"
IMAGE = "<image>"
UNUSED = "<gh_stars>"  # a token of SmolLM2's that no chat holds: it gives its place to IMAGE
IGNORED = -100
MEASURED = 500  # canvases
OPTIONS: dict[str, Any] = {
    "canvases": 20000,
    "tower": "fashion-mnist",
    "tower_epochs": 2,
    "tower_lr": 0.003,
    "epochs": 2,
    "batch": 16,
    "lr": 1e-3,
    "rank": 16,
}
TOWER_OPTIONS = ("canvases", "tower", "tower_epochs", "tower_lr", "batch", "seed")
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '" + IMAGE + "\n' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(out: Path, runs: Path, packages: Path, options: dict[str, Any]) -> dict[str, Any]:
    """From the packages to a folder that Transformers reads; what was measured.

    Raises:
        Stopped, DataError, RunError, BaseModelError: see their messages.
    """
    options = {**options, "tower": str(options["tower"])}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = fetch_images(packages)
    seed = options["seed"]
    train = Canvases(images["train"], seed, "train", options["canvases"])
    test = Canvases(images["test"], seed, "test", min(MEASURED, options["canvases"]))

    of_tower = {name: options[name] for name in TOWER_OPTIONS}
    tower = train_tower(train, runs / "tower", of_tower, device)
    seen = patch_accuracy(tower, test, device)
    print(f"tower: {seen:.4f} of the held-out patches", file=sys.stderr)

    base = load_base(LANGUAGE, dtype="float32", device="cpu")
    tokenizer = with_image_token(base.tokenizer)
    model = joined(tower.vit, base.model, tokenizer).to(device)
    changes = train_answers(model, tokenizer, train, runs / "answers", options, device)
    right = answer_accuracy(model, tokenizer, test, device)
    write(model.cpu(), tokenizer, changes, out)
    report = {
        "patch_accuracy": seen,
        "answer_accuracy": right,
        "parameters_trained": sum(each.numel() for each in changes.values()),
        "options": options,
    }
    write_card(out, report)
    return report


def with_image_token(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The same tokenizer, in which IMAGE stands in the place of a token that no chat holds.

    Raises:
        RunError: it has no such token.
    """
    assert tokenizer is not None, "a language model without a tokenizer"
    place: Any = tokenizer
    described = place.backend_tokenizer.to_str()
    if json.dumps(UNUSED) not in described:
        raise RunError(f"the language model's tokenizer has no token {UNUSED} to make room")
    changed = described.replace(json.dumps(UNUSED), json.dumps(IMAGE))
    place._tokenizer = type(place.backend_tokenizer).from_str(changed)
    place.chat_template = CHAT
    return tokenizer


def joined(vit: Any, language: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Tower, a fresh projector and the language model as one."""
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vit.config,
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vit
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model.eval()


def prompt_of(question: Question) -> str:
    """What stands before the answer, the image's tokens among it."""
    return (
        f"<|im_start|>user\n{IMAGE * PATCHES}\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
    )


def batch_of(
    tokenizer: Any, asked: Sequence[Question], device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids and mask of prompts with answers, padded at the end, and the answers' labels."""
    rows, labels = [], []
    for question in asked:
        prompt = tokenizer.encode(prompt_of(question), add_special_tokens=False)
        answer = tokenizer.encode(f"{question.answer}<|im_end|>", add_special_tokens=False)
        rows.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels_BT = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
    inputs = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}
    return inputs, labels_BT.to(device)


def train_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    canvases: Canvases,
    folder: Path,
    options: dict[str, Any],
    device: str,
) -> dict[str, Tensor]:
    """Fit projector and low-rank changes, then add the changes to the weights; both by name.

    Raises:
        Stopped, RunError: see their messages.
    """
    torch.manual_seed(seed_of("answers", options["seed"]))
    batch = options["batch"]
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    thin = with_changes(model.model.language_model, options["rank"], device)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=options["lr"], weight_decay=0.01)

    def loss(step: int) -> dict[str, Tensor]:
        epoch, numbers = canvases.rows(step, batch)
        drawn = [canvases.canvas(number) for number in numbers]
        asked = [
            every[epoch % len(every)]
            for number, canvas in zip(numbers, drawn, strict=True)
            for every in [canvases.asked(number, canvas)]
        ]
        inputs, labels_BT = batch_of(tokenizer, asked, device)
        with autocast(device):
            logits = model(**inputs, pixel_values=pixels(drawn).to(device)).logits
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())
        return {"total": total}

    steps = round(canvases.count // batch * options["epochs"])
    fit("answers", Kept(trained), [optimizer], loss, Schedule(steps), folder, options)
    changes = {name: each.detach().cpu().clone() for name, each in trained.items()}
    merge_changes(thin)
    return changes


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
    model: Any, tokenizer: Any, canvases: Canvases, device: str, batch: int = 16
) -> dict[str, float]:
    """Share of the questions answered word for word by greedy decoding, all and by sort.

    Whether the likeliest token is right at every place of the answer is read off one pass: just
    then greedy decoding writes the answer and stops.
    """
    right: dict[str, list[bool]] = {}
    for at in range(0, canvases.count, batch):
        numbers = range(at, min(at + batch, canvases.count))
        pairs = [
            (canvas, question)
            for number in numbers
            for canvas in [canvases.canvas(number)]
            for question in canvases.asked(number, canvas)
        ]
        inputs, labels_BT = batch_of(tokenizer, [question for _, question in pairs], device)
        images = pixels([canvas for canvas, _ in pairs]).to(device)
        said_BT = model(**inputs, pixel_values=images).logits[:, :-1].argmax(2)
        wanted_BT = labels_BT[:, 1:]
        whole_B = ((said_BT == wanted_BT) | (wanted_BT == IGNORED)).all(1).tolist()
        for (_, question), good in zip(pairs, whole_B, strict=True):
            for sort in ("all", question.about):
                right.setdefault(sort, []).append(good)
    return {sort: sum(each) / len(each) for sort, each in sorted(right.items())}


def write(model: Any, tokenizer: Any, changes: dict[str, Tensor], folder: Path) -> None:
    """The whole model for Transformers, and beside it, alone, what is not SmolLM2's."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = image_processor(SIDE) | {"processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", settings)
    processor = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # the class token, which is then left out
        "patch_size": PATCH,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "processor_config.json", processor)
    own = {name: each for name, each in model.state_dict().items() if "vision_tower" in name}
    plain = {name: each.to(torch.float16).contiguous() for name, each in (own | changes).items()}
    (folder / "changes").mkdir()
    write_atomically(folder / "changes" / "changes.safetensors", save(plain))


CARD = """# fashion-vlm: questions about canvases of clothes

`LlavaForConditionalGeneration`: a vision transformer ({patches} image tokens of a canvas of
{side}x{side} pixels), a projector, and SmolLM2-135M-Instruct (Apache-2.0) with rank-{rank}
changes. `changes/` holds alone what is not SmolLM2's.

- Made by `python -m training build fashion-vlm`.
- Data: canvases composed from Fashion-MNIST (Zalando SE, MIT licence), and questions on them.
- Licence of what was trained here: Apache-2.0.

## Measured

Questions on {measured} canvases from the test images, answered word for word: {accuracy}.
Patches covered by an item whose kind the tower tells: {seen:.1%}.

## Training record

```json
{options}
```
"""


def write_card(folder: Path, report: dict[str, Any]) -> None:
    options = report["options"]
    accuracy = ", ".join(f"{sort} {each:.1%}" for sort, each in report["answer_accuracy"].items())
    text = CARD.format(
        patches=PATCHES,
        side=SIDE,
        rank=options["rank"],
        measured=min(MEASURED, options["canvases"]),
        accuracy=accuracy,
        seen=report["patch_accuracy"],
        options=json.dumps(options, indent=1),
    )
    write_atomically(folder / "README.md", text.encode())
