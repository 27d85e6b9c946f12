"""Fashion-MNIST: 60,000 + 10,000 images of clothes, 28x28 grey levels, ten classes.

The images come in Debian's package `dataset-fashion-mnist` (Zalando SE, MIT licence), as IDX
files behind gzip. `augmented` turns a batch into what training sees: mirrored, shifted, erased.

Legend: N images, B batch, H rows, W columns. Grey levels are floats in [0, 1].
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.files import DataError
from training.packages import FASHION_MNIST, debian_files, fetched

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIDE = 28  # pixels
MEAN, STD = 0.2860, 0.3530  # of the training images' grey levels
FOLDER = "./usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, slots=True)
class Images:
    """Images and what they show; bytes, as they lie in the package."""

    pixels_NHW: Tensor  # uint8
    labels_N: Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels_N)


def fetch_images(folder: Path) -> dict[str, Images]:
    """`train` and `test`, from the package in `folder`, fetched if it is not there yet.

    Raises:
        DataError: the package cannot be had, or is not what it should be.
    """
    package = fetched(FASHION_MNIST, folder).read_bytes()
    with debian_files(package) as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"{FOLDER}/{name}.gz")
            assert file is not None, f"{name} is no file"
            return gzip.decompress(file.read())

        return {
            part: Images(
                read_idx(member(f"{name}-images-idx3-ubyte")),
                read_idx(member(f"{name}-labels-idx1-ubyte")).long(),
            )
            for part, name in FILES.items()
        }


def read_idx(content: bytes) -> Tensor:
    """The bytes of an IDX file in their shape.

    Raises:
        DataError: another element type than bytes, or another length than its shape says.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError("not an IDX file of bytes: it does not begin with 00 00 08")
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    flat = torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8)
    if flat.numel() != torch.Size(shape).numel():
        raise DataError(f"an IDX file of shape {shape} holds {flat.numel()} bytes")
    return flat.view(shape)


def normalized(grey_BHW: Tensor) -> Tensor:
    """Grey levels as the models take them: mean 0 and deviation 1 over the training images."""
    return (grey_BHW - MEAN) / STD


def augmented(
    grey_BHW: Tensor, generator: torch.Generator, shift: int = 2, erase: float = 0.25
) -> Tensor:
    """Each image mirrored half the time, moved by up to `shift` pixels, sometimes part erased.

    Args:
        erase: share of the images in which a box of 4 to 12 pixels a side turns to noise.
    """
    batch, side, _ = grey_BHW.shape
    moved = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    along = torch.arange(side)
    rows_BH = along + moved[0]
    columns_BW = torch.where(mirrored, side - 1 - along, along) + moved[1]
    wide = torch.nn.functional.pad(grey_BHW, (shift, shift, shift, shift))
    found = wide[torch.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]

    sides = torch.randint(4, 13, (2, batch, 1), generator=generator)
    corners = (torch.rand(2, batch, 1, generator=generator) * (side - sides)).long()
    inside = (along >= corners) & (along < corners + sides)
    chosen = torch.rand(batch, 1, 1, generator=generator) < erase
    erased_BHW = inside[0][:, :, None] & inside[1][:, None, :] & chosen
    noise = torch.rand(found.shape, generator=generator)
    return torch.where(erased_BHW, noise, found)
