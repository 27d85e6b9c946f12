"""Fashion-MNIST: its files, and what training sees of an image."""

import pytest
import torch

from tests.training.fashion import sample
from training.fashion_mnist import LABELS, SIDE, augmented, normalized, read_idx
from training.files import DataError


def test_images_and_labels_are_read_in_their_shape():
    images = sample()

    assert images.pixels_NHW.shape == (64, SIDE, SIDE)
    assert len(images) == 64
    assert LABELS[int(images.labels_N[0])] == "Ankle boot"  # the first test image is known
    # Clothes are light on black ground: the corners of nearly all images are empty.
    assert (images.pixels_NHW[:, 0, 0] < 10).float().mean() > 0.9
    assert images.pixels_NHW.float().mean() > 30


def test_an_idx_file_that_is_cut_off_or_no_idx_file_is_refused():
    assert read_idx(b"\0\0\x08\x02" + bytes([0, 0, 0, 2, 0, 0, 0, 3]) + b"abcdef").shape == (2, 3)
    with pytest.raises(DataError, match=r"shape \(2, 3\) holds 5 bytes"):
        read_idx(b"\0\0\x08\x02" + bytes([0, 0, 0, 2, 0, 0, 0, 3]) + b"abcde")
    with pytest.raises(DataError, match="does not begin with 00 00 08"):
        read_idx(b"\x1f\x8b\x08")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_augmented_image_is_the_image_moved_or_mirrored():
    grey = sample().pixels_NHW[:, 4:-4, :].float() / 255
    grey = torch.nn.functional.pad(grey, (0, 0, 4, 4))

    same = augmented(grey, generator(0), shift=0, erase=0)
    mirrored = (same == grey.flip(2)).flatten(1).all(1)
    assert (mirrored | (same == grey).flatten(1).all(1)).all()
    assert 0 < mirrored.sum() < len(grey)

    moved = augmented(grey, generator(1), shift=2, erase=0)
    pixels = moved.flatten(1).sort(1).values
    shifted = [
        torch.roll(grey, (down, right), (1, 2)) for down in range(-2, 3) for right in (-1, 2)
    ]
    assert moved.shape == grey.shape and not torch.equal(moved, grey)
    assert any((moved == each).flatten(1).all(1).any() for each in shifted)
    assert (pixels[:, -1] <= 1).all()


def test_erasing_touches_a_box_in_the_share_of_images_that_was_asked():
    grey = torch.zeros(400, SIDE, SIDE)
    touched = augmented(grey, generator(2), shift=0, erase=0.25) > 0

    share = touched.flatten(1).any(1).float().mean()
    assert 0.18 < share < 0.32
    sides = touched.any(1).sum(1)[touched.flatten(1).any(1)]
    assert sides.min() >= 4 and sides.max() <= 12


def test_the_same_seed_gives_the_same_images_and_normalizing_has_the_known_numbers():
    grey = sample().pixels_NHW.float() / 255
    assert torch.equal(augmented(grey, generator(3)), augmented(grey, generator(3)))
    assert not torch.equal(augmented(grey, generator(3)), augmented(grey, generator(4)))
    assert abs(float(normalized(grey).mean())) < 0.15
    assert abs(float(normalized(grey).std()) - 1) < 0.15
