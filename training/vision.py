"""The embedded image model: a plain vision transformer, taught by a convolutional network.

49 patches of 4x4 pixels and a class token, in Transformers' own `ViTForImageClassification`. What
the teacher answers, and what it sees at each of the 49 places, is learnt from the same augmented
image. At first, heads look at neighbouring patches (neighbours.py), as convolutions do. In most
steps the patches pass through the first few layers alone, and only the class token through all:
that costs less, and is how a request of low capacity will run.

Legend: B batch, P patches, T tokens (class token first), D width, C the teacher's channels,
K classes, H rows, W columns.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from training.convolutions import Convolutions, Seen
from training.data import seed_of
from training.fashion_mnist import (
    LABELS,
    MEAN,
    SIDE,
    STD,
    Images,
    augmented,
    fetch_images,
    normalized,
)
from training.files import write_atomically, write_json
from training.fitting import Schedule, fit, optimizers_of
from training.mixed import autocast, mixed
from training.neighbours import PATCH, neighbourly
from training.packages import FASHION_MNIST

FIRST_LAYERS = 2  # after which a patch knows what the teacher knows halfway


OPTIONS: dict[str, Any] = {
    "batch": 125,
    "epochs": 12,
    "lr": 0.005,  # of matrices; of the rest, a third
    "teacher_batch": 250,
    "teacher_epochs": 8,
    "teacher_width": 32,
    "leaving_share": 0.7,  # of the steps, in which patches leave early,
    "earliest": 2,  # after so many layers at least
}
TEACHER_OPTIONS = ("seed", "teacher_batch", "teacher_epochs", "teacher_width")


@dataclass(frozen=True, slots=True)
class Size:
    """Of a vision transformer."""

    width: int = 128
    layers: int = 8
    heads: int = 4
    inner: int = 512

    def config(self) -> ViTConfig:
        return ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.05,
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )


def build(out: Path, runs: Path, packages: Path, options: dict[str, Any]) -> dict[str, Any]:
    """From the packages to a folder that Transformers reads; what was measured.

    Raises:
        Stopped, DataError, RunError: see their messages.
    """
    parts = fetch_images(packages)
    train, test = parts["train"], parts["test"]
    of_teacher = {name: options[name] for name in TEACHER_OPTIONS}
    teacher = train_teacher(train, runs / "teacher", of_teacher)
    taught = accuracy(lambda x_BHW: teacher(x_BHW).logits_BK, test)
    print(f"teacher: {taught:.4f} of the test images", file=sys.stderr)
    vit = train_student(teacher, train, Size(), runs / "student", options)
    write_vision(vit, out)
    found: Any = ViTForImageClassification.from_pretrained(out, dtype=torch.float32).eval()

    def coloured(x_BHW: Tensor) -> Tensor:
        logits_BK: Tensor = found(x_BHW[:, None].expand(-1, 3, -1, -1)).logits
        return logits_BK

    report = {
        "test_accuracy": accuracy(coloured, test),
        "test_accuracy_before_rounding": accuracy(lambda x: vit(x[:, None]).logits, test),
        "teacher_test_accuracy": taught,
        "parameters": sum(each.numel() for each in found.parameters()),
        "bytes": (out / "model.safetensors").stat().st_size,
        "options": options,
    }
    write_card(out, report)
    return report


class Views(NamedTuple):
    """What a student makes of a batch."""

    parts_BPC: Tensor  # what it sees at each patch after its first layers,
    places_BPC: Tensor  # and when the patches leave
    logits_BK: Tensor


class Student(nn.Module):
    """The transformer, and views on it that are compared with what the teacher sees."""

    def __init__(self, size: Size, teacher: Convolutions) -> None:
        super().__init__()
        self.vit: Any = mixed(ViTForImageClassification(size.config()))
        self.parts_head = nn.Linear(size.width, teacher.parts_width)
        self.view_head = nn.Linear(size.width, teacher.width)
        neighbourly(self.vit)

    def forward(self, x_BHW: Tensor, stay: int) -> Views:
        """What it sees, and its answer.

        Args:
            stay: so many layers change the patches; all but the last are the whole model, as
                nobody reads what the last makes of them.
        """
        inner = self.vit.vit
        x_BTD = inner.embeddings(x_BHW[:, None])
        parts_BTD = x_BTD
        for number, layer in enumerate(inner.layers[:stay]):
            x_BTD = layer(x_BTD)
            parts_BTD = x_BTD if number < FIRST_LAYERS else parts_BTD
        class_B1D, patches_BPD = x_BTD[:, :1], x_BTD[:, 1:]
        for layer in inner.layers[stay:]:
            class_B1D = _of_class(layer, class_B1D, patches_BPD)
        class_BD = inner.layernorm(class_B1D[:, 0])
        parts_BPC = self.parts_head(parts_BTD[:, 1:])
        return Views(parts_BPC, self.view_head(patches_BPD), self.vit.classifier(class_BD))


def _of_class(layer: Any, class_B1D: Tensor, patches_BPD: Tensor) -> Tensor:
    """What a layer makes of the class token, if the patches give no more than keys and values."""
    attention = layer.attention
    x_BTD = layer.layernorm_before(torch.cat([class_B1D, patches_BPD], 1))
    projected = (attention.q_proj(x_BTD[:, :1]), attention.k_proj(x_BTD), attention.v_proj(x_BTD))
    heads = [each.float().unflatten(2, (-1, attention.head_dim)) for each in projected]
    seen_BA1H = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in heads))
    class_B1D = class_B1D + attention.o_proj(seen_BA1H.transpose(1, 2).flatten(2))
    done: Tensor = class_B1D + layer.mlp(layer.layernorm_after(class_B1D))
    return done


@dataclass(frozen=True, slots=True)
class Course:
    """The batches of a run: which images, how they are changed."""

    images: Images
    batch: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return len(self.images) // self.batch

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented, normalized images of the step, and their labels."""
        epoch, at = divmod(step, self.per_epoch)
        order = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        rows = torch.randperm(len(self.images), generator=order)[at * self.batch :][: self.batch]
        change = torch.Generator().manual_seed(seed_of("augment", self.seed, step))
        grey_BHW = self.images.pixels_NHW[rows].float() / 255
        return normalized(augmented(grey_BHW, change)), self.images.labels_N[rows]


def train_teacher(images: Images, folder: Path, options: dict[str, Any]) -> Convolutions:
    """The convolutional network, trained on the labels.

    Raises:
        Stopped: before the last step.
    """
    torch.manual_seed(seed_of("teacher", options["seed"]))
    teacher = Convolutions(options["teacher_width"], len(LABELS)).train()
    course = Course(images, options["teacher_batch"], options["seed"])
    optimizers = optimizers_of(dict(teacher.named_parameters()), 0.02, 0.005, decay=0.05)

    def loss(step: int) -> dict[str, Tensor]:
        x_BHW, labels_B = course.take(step)
        with autocast():
            seen = teacher(x_BHW)
        logits_BK = seen.logits_BK.float()
        return {"total": F.cross_entropy(logits_BK, labels_B, label_smoothing=0.1)}

    schedule = Schedule(round(course.per_epoch * options["teacher_epochs"]), checkpoint_every=200)
    fit("teacher", teacher, optimizers, loss, schedule, folder, options)
    return teacher.eval()


def train_student(
    teacher: Convolutions, images: Images, size: Size, folder: Path, options: dict[str, Any]
) -> Any:
    """The vision transformer, taught.

    Raises:
        Stopped: before the last step.
    """
    seed = options["seed"]
    torch.manual_seed(seed_of("student", seed))
    student = Student(size, teacher).train()
    course = Course(images, options["batch"], seed)
    scales = spread(teacher, course)
    optimizers = optimizers_of(
        dict(student.named_parameters()), options["lr"], options["lr"] / 3, decay=0.05
    )
    steps = round(course.per_epoch * options["epochs"])

    def loss(step: int) -> dict[str, Tensor]:
        x_BHW, labels_B = course.take(step)
        with autocast():
            with torch.no_grad():
                seen: Seen = teacher(x_BHW)
            views = student(x_BHW, stay_in(step, size.layers, options))
        return lessons(seen, scales, Views(*(each.float() for each in views)), labels_B)

    schedule = Schedule(steps, warmup=0.08, checkpoint_every=100)
    fit("student", student, optimizers, loss, schedule, folder, options)
    return student.vit.eval()


def stay_in(step: int, layers: int, options: Mapping[str, Any]) -> int:
    """How many layers change the patches in a step."""
    whole = layers - 1
    chance = random.Random(seed_of("stay", options["seed"], step))
    if options["earliest"] < whole and chance.random() < options["leaving_share"]:
        return chance.randrange(options["earliest"], whole)
    return whole


class Scales(NamedTuple):
    """Mean and deviation of each channel of what a teacher sees."""

    parts_2C: Tensor
    places_2C: Tensor


@torch.no_grad()
def spread(teacher: Convolutions, course: Course) -> Scales:
    """Over the places of one batch."""
    seen: Seen = teacher(course.take(0)[0])

    def of(seen_BCHW: Tensor) -> Tensor:
        wide_BCHW = seen_BCHW.float()
        return torch.stack([wide_BCHW.mean((0, 2, 3)), wide_BCHW.std((0, 2, 3)) + 1e-3])

    return Scales(of(seen.parts_BCHW), of(seen.places_BCHW))


def lessons(seen: Seen, scales: Scales, views: Views, labels_B: Tensor) -> dict[str, Tensor]:
    """KL to the teacher's answer, squared distances to what it sees, and the labels themselves."""
    taught = F.log_softmax(seen.logits_BK.float(), 1)
    said = F.log_softmax(views.logits_BK, 1)
    answers = F.kl_div(said, taught, log_target=True, reduction="batchmean")
    parts = _distance(views.parts_BPC, seen.parts_BCHW, scales.parts_2C)
    places = _distance(views.places_BPC, seen.places_BCHW, scales.places_2C)
    labels = F.nll_loss(said, labels_B)
    return {
        "answers": answers.detach(),
        "parts": parts.detach(),
        "places": places.detach(),
        "labels": labels.detach(),
        "total": answers + 0.25 * parts + 0.5 * places + 0.2 * labels,
    }


def _distance(view_BPC: Tensor, seen_BCHW: Tensor, scale_2C: Tensor) -> Tensor:
    seen_BPC = seen_BCHW.float().flatten(2).transpose(1, 2)
    return F.mse_loss(view_BPC, (seen_BPC - scale_2C[0]) / scale_2C[1])


@torch.inference_mode()
def accuracy(logits: Callable[[Tensor], Tensor], images: Images, batch: int = 500) -> float:
    """Share of the images whose likeliest class is the right one."""
    right = 0
    for at in range(0, len(images), batch):
        x_BHW = normalized(images.pixels_NHW[at : at + batch].float() / 255)
        right += int((logits(x_BHW).argmax(1) == images.labels_N[at : at + batch]).sum())
    return right / len(images)


def in_colour(vit: Any) -> ViTForImageClassification:
    """The same model for images of three channels: on grey ones it says the same.

    Whoever sends an image sends colours; each channel carries a third of what grey carried.
    """
    config = ViTConfig.from_dict(vit.config.to_dict() | {"num_channels": 3})
    coloured = ViTForImageClassification(config)
    weights = dict(vit.state_dict())
    key = "vit.embeddings.patch_embeddings.projection.weight"
    weights[key] = weights[key].expand(-1, 3, -1, -1) / 3
    coloured.load_state_dict(weights)
    return coloured.eval()


def write_vision(vit: Any, folder: Path) -> None:
    """Config, weights (as float16) and the image processor's settings, for Transformers."""
    in_colour(vit).to(torch.float16).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", image_processor(SIDE))


def image_processor(side: int) -> dict[str, object]:
    """Settings of the image processor for square images of `side` pixels."""
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [MEAN] * 3,
        "image_processor_type": "ViTImageProcessor",
        "image_std": [STD] * 3,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


CARD = """# fashion-mnist: a vision transformer for ten kinds of clothes

`ViTForImageClassification`, {parameters:,} parameters, 49 patches of 4x4 pixels and a class
token; images of 28x28 pixels, light clothes on black ground, grey in all three channels. float16.

- Made by `python -m training build fashion-mnist`, from nothing.
- Data: Fashion-MNIST (Zalando SE, MIT licence), 60,000 images, from Debian's package
  `{package}`. Nothing else was used.
- Licence of these weights: Apache-2.0.
- Taught by a convolutional network that was trained for it ({teacher:.2%} on the test images).

## Measured

{accuracy:.2%} of the 10,000 test images ({before:.2%} before the weights were rounded to float16).

## Training record

```json
{options}
```
"""


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    text = CARD.format(
        parameters=report["parameters"],
        package=FASHION_MNIST.requirement,
        teacher=report["teacher_test_accuracy"],
        accuracy=report["test_accuracy"],
        before=report["test_accuracy_before_rounding"],
        options=json.dumps(report["options"], indent=1),
    )
    write_atomically(folder / "README.md", text.encode())
