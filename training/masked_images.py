"""A masked autoencoder of clothes: sees a quarter of an image's patches, draws the others.

Transformers' own `ViTMAEForPreTraining`, trained from nothing. Its encoder is what is made
elastic; its decoder shows what an encoder that leaves things out still knows of an image.

Shape letters: B batch   P patches   H rows   W columns
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from training.data import seed_of
from training.fashion_mnist import MEAN, SIDE, STD, Images, augmented, fetch_images, normalized
from training.files import write_atomically, write_json
from training.fitting import Schedule, fit, optimizers_of
from training.mixed import autocast, mixed
from training.packages import FASHION_MNIST

PATCH = 4  # pixels a side
PATCHES = (SIDE // PATCH) ** 2

OPTIONS: dict[str, Any] = {"batch": 125, "epochs": 4, "lr": 0.005}


@dataclass(frozen=True, slots=True)
class Size:
    """Of encoder and decoder."""

    width: int = 96
    layers: int = 6
    heads: int = 4
    inner: int = 384
    decoder_width: int = 64
    decoder_layers: int = 2

    def config(self) -> ViTMAEConfig:
        return ViTMAEConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            decoder_hidden_size=self.decoder_width,
            decoder_num_hidden_layers=self.decoder_layers,
            decoder_num_attention_heads=self.heads,
            decoder_intermediate_size=4 * self.decoder_width,
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            mask_ratio=0.75,
        )


def build(out: Path, runs: Path, packages: Path, options: dict[str, Any]) -> dict[str, Any]:
    """From the package to a folder that Transformers reads; what was measured.

    Raises:
        Stopped, DataError, RunError: see their messages.
    """
    parts = fetch_images(packages)
    model = train(parts["train"], Size(), runs / "autoencoder", options)
    write_autoencoder(model, out)
    found = ViTMAEForPreTraining.from_pretrained(out, dtype=torch.float32).eval()
    report = {
        "test_squares": squares(found, parts["test"], options["seed"]),
        "test_squares_of_the_mean": spread(parts["test"]),
        "parameters": sum(each.numel() for each in found.parameters()),
        "encoder_parameters": sum(each.numel() for each in found.vit.parameters()),
        "bytes": (out / "model.safetensors").stat().st_size,
        "options": options,
    }
    write_card(out, report)
    return report


def train(images: Images, size: Size, folder: Path, options: dict[str, Any]) -> Any:
    """The autoencoder, trained to draw what it did not see.

    Raises:
        Stopped: before the last step.
    """
    seed, batch = options["seed"], options["batch"]
    torch.manual_seed(seed_of("autoencoder", seed))
    model: Any = mixed(placed(ViTMAEForPreTraining(size.config()))).train()
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizers = optimizers_of(named, options["lr"], options["lr"] / 3, decay=0.05)
    per_epoch = len(images) // batch

    def loss(step: int) -> dict[str, Tensor]:
        epoch, at = divmod(step, per_epoch)
        order = torch.Generator().manual_seed(seed_of("order", seed, epoch))
        rows = torch.randperm(len(images), generator=order)[at * batch :][:batch]
        change = torch.Generator().manual_seed(seed_of("augment", seed, step))
        grey_BHW = augmented(images.pixels_NHW[rows].float() / 255, change, erase=0)
        noise_BP = torch.rand(len(rows), PATCHES, generator=change)
        with autocast():
            done = model(normalized(grey_BHW)[:, None], noise=noise_BP)
        return {"total": done.loss.float()}

    steps = round(per_epoch * options["epochs"])
    schedule = Schedule(steps, warmup=0.08, checkpoint_every=100)
    fit("autoencoder", model, optimizers, loss, schedule, folder, options)
    return model.eval()


def placed(model: Any) -> Any:
    """A fresh model with its fixed tables of positions, which Transformers 5 leaves at zero."""
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    for table in (embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert bool(table[:, 1:].any(-1).all()), "a patch without a place"
    return model


@torch.inference_mode()
def squares(model: Any, images: Images, seed: int, batch: int = 500) -> float:
    """The mean square by which hidden pixels are missed; 1 is the images' own variance, about."""
    chance = torch.Generator().manual_seed(seed_of("masks", seed))
    total = 0.0
    for at in range(0, len(images), batch):
        x_BHW = normalized(images.pixels_NHW[at : at + batch].float() / 255)
        noise_BP = torch.rand(len(x_BHW), PATCHES, generator=chance)
        total += float(model(x_BHW[:, None], noise=noise_BP).loss) * len(x_BHW)
    return total / len(images)


def spread(images: Images) -> float:
    """What a drawing would miss by that shows the mean image every time."""
    return float(normalized(images.pixels_NHW.float() / 255).var(0).mean())


def write_autoencoder(model: Any, folder: Path) -> None:
    """Config, weights (as float16) and the image processor's settings, for Transformers."""
    plain = ViTMAEForPreTraining(ViTMAEConfig.from_dict(model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.float16).save_pretrained(folder)
    settings: dict[str, object] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [MEAN],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [STD],
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    write_json(folder / "preprocessor_config.json", settings)


CARD = """# fashion-mae: a masked autoencoder of clothes

`ViTMAEForPreTraining`, {parameters:,} parameters, {encoder_parameters:,} of them the encoder's;
grey images of 28x28 pixels, 49 patches, of which three quarters are hidden. float16.

- Made by `python -m training build fashion-mae`, from nothing.
- Data: Fashion-MNIST (Zalando SE, MIT licence), 60,000 images without their labels, from Debian's
  package `{package}`. Nothing else was used.
- Licence of these weights: Apache-2.0.

## Measured

On the 10,000 test images, hidden pixels are missed by {test_squares:.4f} in the mean square; the
mean image would miss them by {test_squares_of_the_mean:.4f} (1 is the variance of all pixels).

## Training record

```json
{options}
```
"""


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    filled = {**report, "options": json.dumps(report["options"], indent=1)}
    text = CARD.format(package=FASHION_MNIST.requirement, **filled)
    write_atomically(folder / "README.md", text.encode())
