"""The tower of the vision-language model: what stands in each patch of a canvas, and where.

It is the vision transformer of fashion-mnist, with its layers as they were trained there and a
table of positions for the canvas's grid. What is made of its patches is not this room's business.

Legend: B batch, T tokens, C colours, H rows, W columns, D width, P patches, K kinds and none,
Q quarters of the canvas and none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTModel

from elastiformer.weights import resolve
from training.canvases import CORNERS, KINDS, SIDE, Canvas, Question, compose, questions
from training.data import seed_of
from training.fashion_mnist import Images, normalized
from training.files import RunError
from training.fitting import Schedule, fit, optimizers_of
from training.mixed import autocast, mixed
from training.neighbours import PATCH, positions

PATCHES = (SIDE // PATCH) ** 2


@dataclass(frozen=True, slots=True)
class Canvases:
    """The canvases of a part, so many an epoch, made when they are asked for."""

    images: Images
    seed: int
    part: str
    count: int
    questions: int = 0  # on each; 0: one of each sort

    def canvas(self, number: int) -> Canvas:
        return compose(self.images, self.seed, self.part, number)

    def asked(self, number: int, canvas: Canvas) -> list[Question]:
        return questions(canvas, self.seed, self.part, number, self.questions)

    def order(self, epoch: int) -> list[int]:
        """The numbers of an epoch's canvases, which no other epoch has."""
        drawn = torch.Generator().manual_seed(seed_of("canvases", self.seed, epoch))
        order_N = torch.randperm(self.count, generator=drawn) + epoch * self.count
        return list(order_N.tolist())

    def rows(self, step: int, batch: int) -> list[int]:
        """The numbers of a step's canvases."""
        epoch, at = divmod(step, self.count // batch)
        return self.order(epoch)[at * batch : (at + 1) * batch]


def pixels(canvases: Sequence[Canvas]) -> Tensor:
    """As the tower takes them: normalized, three equal colours."""
    grey_BHW = torch.stack([canvas.grey_HW for canvas in canvases])
    return normalized(grey_BHW)[:, None].expand(-1, 3, -1, -1)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a tower says of each patch, as logits."""

    kinds_BPK: Tensor
    corners_BPQ: Tensor
    middles_BP2: Tensor


class Tower(nn.Module):
    """The vision transformer on the canvas's grid, and a head for each patch."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = mixed(vit)
        self.head = nn.Linear(vit.config.hidden_size, len(KINDS) + 1 + len(CORNERS) + 1 + 2)

    def hidden(self, x_BCHW: Tensor) -> Tensor:
        """As LLaVA takes it: the last of the hidden states, without the class token."""
        hidden_BPD: Tensor = self.vit(x_BCHW, output_hidden_states=True).hidden_states[-1][:, 1:]
        return hidden_BPD

    def forward(self, x_BCHW: Tensor) -> Sight:
        return self.told(self.hidden(x_BCHW))

    def told(self, hidden_BPD: Tensor) -> Sight:
        logits = self.head(hidden_BPD).float()
        return Sight(*logits.split([len(KINDS) + 1, len(CORNERS) + 1, 2], dim=2))


def begun_tower(folder: Path) -> Tower:
    """The classifier's layers, with a table of positions for the canvas's grid.

    Raises:
        RunError: its patches have another size.
    """
    small: Any = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32)
    if small.config.patch_size != PATCH:
        raise RunError(f"{folder}: patches of {small.config.patch_size} pixels, not {PATCH}")
    config = type(small.config).from_dict(small.config.to_dict() | {"image_size": SIDE})
    large: Any = ViTModel(config, add_pooling_layer=False)
    weights = {
        name.removeprefix("vit."): each
        for name, each in small.state_dict().items()
        if name.startswith("vit.")
    }
    name = "embeddings.position_embeddings"
    table_BTD = weights[name]
    patches_D = table_BTD[0, 1:].mean(0)
    places = positions(SIDE // PATCH, config.hidden_size // config.num_attention_heads)
    larger = patches_D.expand(PATCHES, -1).clone()
    larger[:, : places.shape[1]] = places
    weights[name] = torch.cat([table_BTD[0, :1], larger])[None]
    large.load_state_dict(weights)
    return Tower(large)


def train_tower(canvases: Canvases, runs: Path, options: dict[str, Any], device: str) -> Tower:
    """A tower that tells what stands in each patch.

    It learns over several epochs, each a run of its own whose learning rate rises and falls.

    Raises:
        Stopped, RunError, BaseModelError: see their messages.
    """
    torch.manual_seed(seed_of("tower", options["seed"]))
    tower = begun_tower(resolve(options["tower"]).path).to(device).train()
    for epoch in range(options["tower_epochs"]):
        _train_epoch(tower, canvases, epoch, runs / f"tower-{epoch}", options, device)
    return tower.eval()


def _train_epoch(
    tower: Tower,
    canvases: Canvases,
    epoch: int,
    folder: Path,
    options: dict[str, Any],
    device: str,
) -> None:
    rate, batch = options["tower_lr"], options["tower_batch"]
    optimizers = optimizers_of(dict(tower.named_parameters()), rate, rate / 3, decay=0.05)
    steps = canvases.count // batch

    def loss(step: int) -> dict[str, Tensor]:
        drawn = [canvases.canvas(number) for number in canvases.rows(epoch * steps + step, batch)]
        there = [canvas.patches(PATCH) for canvas in drawn]
        with autocast(device):
            seen: Sight = tower(pixels(drawn).to(device))
        kinds = _told(seen.kinds_BPK, [each.kinds_P for each in there])
        corners = _told(seen.corners_BPQ, [each.corners_P for each in there])
        middles = _told(seen.middles_BP2, [each.middles_P for each in there])
        parts = {"kinds": kinds, "corners": corners, "middles": middles}
        # Few patches hold a middle, so that its mean is small.
        return parts | {"total": kinds + corners + 4 * middles}

    fit(f"tower {epoch}", tower, optimizers, loss, Schedule(steps), folder, options)


def _told(said_BPK: Tensor, true: Sequence[Tensor]) -> Tensor:
    true_BP = torch.stack(list(true)).to(said_BPK.device)
    return F.cross_entropy(said_BPK.flatten(0, 1), true_BP.flatten())


@torch.inference_mode()
def patch_accuracy(tower: Tower, canvases: Canvases, device: str, batch: int = 50) -> float:
    """Share of the patches that an item covers whose kind is told rightly."""
    right = covered = 0
    for at in range(0, canvases.count, batch):
        numbers = range(at, min(at + batch, canvases.count))
        drawn = [canvases.canvas(number) for number in numbers]
        kinds_BP = torch.stack([canvas.patches(PATCH).kinds_P for canvas in drawn])
        said_BP = tower(pixels(drawn).to(device)).kinds_BPK.argmax(2).cpu()
        there = kinds_BP < len(KINDS)
        right += int(((said_BP == kinds_BP) & there).sum())
        covered += int(there.sum())
    return right / covered
