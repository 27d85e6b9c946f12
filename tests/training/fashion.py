"""The 64 images that lie beside the tests, in a package as Debian would give it."""

from __future__ import annotations

import gzip
from pathlib import Path

from training.fashion_mnist import Images, read_idx

FOLDER = Path(__file__).parent / "fashion-mnist"


def sample() -> Images:
    images, labels = (
        read_idx(gzip.decompress((FOLDER / f"sample-{name}-ubyte.gz").read_bytes()))
        for name in ("images-idx3", "labels-idx1")
    )
    return Images(images, labels.long())
