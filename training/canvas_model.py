"""The embedded vision-language model: a tower that sees canvases, a projector, SmolLM2.

The tower is the vision transformer of fashion-mnist on a larger grid; it first learns what stands
in each patch. Then the projector learns to say that in SmolLM2's own words, and at last both, the
projector and low-rank changes to SmolLM2's projections, learn to answer questions
(canvas_answers.py). The whole is Transformers' own `LlavaForConditionalGeneration`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from elastiformer.shipped import SMOLLM2
from elastiformer.weights import load_base, resolve
from training.canvas_answers import IMAGE, answer_accuracy, train_answers, train_projector
from training.canvas_tower import PATCHES, Canvases, patch_accuracy, train_tower
from training.canvases import KINDS, LEAST, MOST, SIDE
from training.fashion_mnist import fetch_images
from training.files import RunError, write_atomically, write_json
from training.neighbours import PATCH
from training.vision import image_processor

LANGUAGE = SMOLLM2.name
UNUSED = SMOLLM2.renamed[0]  # a token that no chat holds: it gives its place to IMAGE
MEASURED = 150  # canvases
OPTIONS: dict[str, Any] = {
    "tower": "fashion-mnist",
    "tower_canvases": 24000,  # an epoch
    "tower_epochs": 1,
    "tower_batch": 32,
    "tower_lr": 0.003,
    "projector_steps": 400,
    "canvases": 1000,
    "epochs": 1,
    "batch": 2,
    "questions": 10,  # on a canvas, in one go
    "image_tokens": 36,  # of a canvas, in most steps of the epochs
    "set_steps": 400,  # after them, on sets of image tokens of every kind
    "lr": 1e-3,
    "rank": 8,
}
TOWER_OPTIONS = ("tower", "tower_canvases", "tower_epochs", "tower_batch", "tower_lr", "seed")
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
    to_see = Canvases(images["train"], seed, "train", options["tower_canvases"])
    train = Canvases(images["train"], seed, "train", options["canvases"], options["questions"])
    test = Canvases(images["test"], seed, "test", min(MEASURED, options["canvases"]))

    of_tower = {name: options[name] for name in TOWER_OPTIONS}
    tower = train_tower(to_see, runs, of_tower, device)
    seen = patch_accuracy(tower, test, device)
    print(f"tower: {seen:.4f} of the held-out patches", file=sys.stderr)
    tower.vit.to(torch.float16).float()  # as it is written

    base = load_base(LANGUAGE, dtype="float32", device="cpu")
    tokenizer = with_image_token(base.tokenizer)
    model = joined(tower.vit, base.model, tokenizer).to(device)
    train_projector(model, tower, tokenizer, to_see, runs / "projector", options, device)
    changes = train_answers(model, tower, tokenizer, train, runs / "answers", options, device)
    right = answer_accuracy(model, tokenizer, test, device)
    written = write(model.cpu(), tokenizer, changes, out)
    report = {
        "patch_accuracy": seen,
        "answer_accuracy": right,
        "parameters": written,
        "tower_revision": resolve(options["tower"]).revision,
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
    for part in (vit, language):
        part.config.name_or_path = ""  # where it lay on this machine is nobody's business
    config = LlavaConfig(
        vision_config=vit.config,
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    for parameter in tower.pooler.parameters():
        nn.init.zeros_(parameter)  # LLaVA reads the hidden states; its towers have one all the same
    tower.load_state_dict(vit.state_dict() | tower.pooler.state_dict(prefix="pooler."))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model.eval()


def write(model: Any, tokenizer: Any, changes: dict[str, Tensor], folder: Path) -> int:
    """The whole model for Transformers, and in `changes` what of it is not SmolLM2's: so much."""
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
    alone = folder / "changes"
    alone.mkdir()
    write_atomically(alone / "changes.safetensors", save(plain))
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "tokenizer.json":
            shutil.copy(path, alone)
    return sum(each.numel() for each in plain.values())


CARD = """# fashion-vlm: questions about canvases of clothes

`LlavaForConditionalGeneration`: a vision transformer ({patches} image tokens of a canvas of
{side}x{side} pixels), a projector of two layers, and SmolLM2-135M-Instruct with rank-{rank}
changes to every projection of its layers. `changes.safetensors` holds only what is not SmolLM2's:
tower, projector and changes, {parameters:,} numbers in float16. The sum is written to the cache
folder at the first use.

It answers three sorts of questions, as they were asked in training: "What is at the top left?",
"Where is the bag?", "How many items are there?" and "How many boots are there?".
Kinds are {kinds}; a canvas is black, with one to three items on it that do not overlap, of
{least} to {most} pixels a side. It has not seen anything else.

- Made by `python -m training build fashion-vlm`.
- Data: canvases composed from Fashion-MNIST (Zalando SE, MIT licence), and questions on them.
- The tower began as `{tower}` (`{revision}`).
- Licence of what was trained here, and of SmolLM2: Apache-2.0.

## Measured

Questions on {measured} canvases of test images, answered word for word (float32):

| about | right |
|---|---|
{accuracy}

Of the patches that an item covers, the tower tells the kind of {seen:.1%}.

## Training record

```json
{options}
```
"""


def write_card(folder: Path, report: dict[str, Any]) -> None:
    options = report["options"]
    rows = [f"| {sort} | {each:.1%} |" for sort, each in report["answer_accuracy"].items()]
    text = CARD.format(
        patches=PATCHES,
        side=SIDE,
        rank=options["rank"],
        parameters=report["parameters"],
        kinds=", ".join(KINDS),
        least=LEAST,
        most=MOST,
        tower=Path(options["tower"]).name,
        revision=report["tower_revision"],
        measured=min(MEASURED, options["canvases"]),
        accuracy="\n".join(rows),
        seen=report["patch_accuracy"],
        options=json.dumps(options, indent=1),
    )
    for place in (folder, folder / "changes"):
        write_atomically(place / "README.md", text.encode())
