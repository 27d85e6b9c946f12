"""Canvases: several Fashion-MNIST items on an empty ground, and questions on what is where.

A canvas is a function of a seed and its number, and so are its questions: two runs see the same
ones, and those held out are never trained on. Items vary in number, size and place and do not
overlap; on a canvas each kind may stand more than once.

Legend: H rows, W columns of pixels; P patches; grey levels in [0, 1].
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import seed_of
from training.fashion_mnist import Images

SIDE = 48  # pixels of a canvas
LEAST, MOST = 16, 24  # pixels a side of an item
ITEMS = (1, 2, 3)
TRIES = 40  # at finding room for an item, or another question

# How a question names what Fashion-MNIST's labels mean. Coats and shirts are left out: drawn this
# small, nobody tells them from pullovers and t-shirts.
NAMED = {
    0: "t-shirt",
    1: "trouser",
    2: "pullover",
    3: "dress",
    5: "sandal",
    7: "sneaker",
    8: "bag",
    9: "boot",
}
KINDS = tuple(NAMED.values())
_KIND_OF = {label: KINDS.index(kind) for label, kind in NAMED.items()}
NUMBERS = ("none", "one", "two", "three")
CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True, slots=True)
class Item:
    """One item on a canvas: its kind, and the square of pixels it covers."""

    kind: int
    top: int
    left: int
    side: int

    @property
    def middle(self) -> tuple[float, float]:
        return self.top + self.side / 2, self.left + self.side / 2

    @property
    def corner(self) -> str:
        """The quarter of the canvas that holds its middle."""
        row, column = self.middle
        return CORNERS[2 * (row >= SIDE / 2) + (column >= SIDE / 2)]

    def meets(self, other: Item) -> bool:
        return not (
            self.top >= other.top + other.side
            or other.top >= self.top + self.side
            or self.left >= other.left + other.side
            or other.left >= self.left + self.side
        )


@dataclass(frozen=True, slots=True)
class Patches:
    """What stands in each patch of a canvas, row by row."""

    kinds_P: Tensor  # of the item that covers the patch's middle; len(KINDS) where there is none
    corners_P: Tensor  # the quarter in which that item stands; 4 where there is none
    middles_P: Tensor  # 1 where an item has its middle, else 0


@dataclass(frozen=True, slots=True)
class Canvas:
    """What is seen, and what stands where."""

    grey_HW: Tensor
    items: tuple[Item, ...]

    def patches(self, patch: int) -> Patches:
        """What is in each square of `patch` pixels a side."""
        grid = SIDE // patch
        kinds = torch.full((grid, grid), len(KINDS))
        corners = torch.full((grid, grid), len(CORNERS))
        middles = torch.zeros(grid, grid, dtype=torch.long)
        places = torch.arange(grid) * patch + patch / 2
        for item in self.items:
            rows = (places >= item.top) & (places < item.top + item.side)
            columns = (places >= item.left) & (places < item.left + item.side)
            covered = rows[:, None] & columns
            kinds[covered] = item.kind
            corners[covered] = CORNERS.index(item.corner)
            row, column = (int(at) // patch for at in item.middle)
            middles[row, column] = 1
        return Patches(kinds.flatten(), corners.flatten(), middles.flatten())


@dataclass(frozen=True, slots=True)
class Question:
    """Asked of a canvas; the answer is one of a few words."""

    about: str  # what, where or number
    text: str
    answer: str


def compose(images: Images, seed: int, part: str, number: int) -> Canvas:
    """Canvas `number` of a part (train, heldout, test), from the images given."""
    chance = random.Random(seed_of("canvas", seed, part, number))
    grey_HW = torch.zeros(SIDE, SIDE)
    items: list[Item] = []
    for _ in range(chance.choice(ITEMS)):
        row, kind = _drawn(chance, images)
        item = _placed(chance, kind, items)
        if item is None:
            continue  # no room left: one item fewer
        pixels = images.pixels_NHW[row].float()[None, None] / 255
        size = (item.side, item.side)
        drawn = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        grey_HW[item.top : item.top + item.side, item.left : item.left + item.side] = drawn[0, 0]
        items.append(item)
    return Canvas(grey_HW.clamp(0, 1), tuple(items))


def _drawn(chance: random.Random, images: Images) -> tuple[int, int]:
    """An image that questions have a word for, and its kind."""
    while True:
        row = chance.randrange(len(images))
        kind = _KIND_OF.get(int(images.labels_N[row]))
        if kind is not None:
            return row, kind


def _placed(chance: random.Random, kind: int, others: list[Item]) -> Item | None:
    for _ in range(TRIES):
        side = chance.randint(LEAST, MOST)
        top, left = (chance.randint(0, SIDE - side) for _ in range(2))
        item = Item(kind, top, left, side)
        if not any(item.meets(other) for other in others):
            return item
    return None


def questions(canvas: Canvas, seed: int, part: str, number: int, most: int = 0) -> list[Question]:
    """One question of each sort that the canvas allows, in an order drawn for it.

    Args:
        most: where it is given, so many of them, drawn again and again; none is asked twice.
    """
    chance = random.Random(seed_of("questions", seed, part, number))
    every: dict[Question, None] = {}
    for _ in range(TRIES if most else 1):
        drawn = [_how_many(canvas, chance), _what(canvas, chance), _where(canvas, chance)]
        asked = [question for question in drawn if question is not None]
        chance.shuffle(asked)
        every |= dict.fromkeys(asked)
        if len(every) >= most > 0:
            return list(every)[:most]
    return list(every)


def _how_many(canvas: Canvas, chance: random.Random) -> Question:
    """Of all items, or of one kind; half of these questions are about what is there."""
    if chance.random() < 0.5:
        return Question("number", "How many items are there?", NUMBERS[len(canvas.items)])
    there = chance.random() < 0.5
    kind = chance.choice(canvas.items).kind if there else chance.randrange(len(KINDS))
    count = sum(item.kind == kind for item in canvas.items)
    plural = KINDS[kind] + ("es" if KINDS[kind].endswith("s") else "s")
    return Question("number", f"How many {plural} are there?", NUMBERS[count])


def _what(canvas: Canvas, chance: random.Random) -> Question | None:
    """Of a quarter that holds one item, or none."""
    alone = {
        corner: held[0].kind if held else None
        for corner in CORNERS
        if len(held := [item for item in canvas.items if item.corner == corner]) <= 1
    }
    filled = [corner for corner, kind in alone.items() if kind is not None]
    if not filled:
        return None
    # One question in five is about an empty quarter.
    empty = [corner for corner in alone if corner not in filled]
    corner = chance.choice(empty if empty and chance.random() < 0.2 else filled)
    kind = alone[corner]
    answer = "nothing" if kind is None else KINDS[kind]
    return Question("what", f"What is at the {corner}?", answer)


def _where(canvas: Canvas, chance: random.Random) -> Question | None:
    """Of a kind that stands there once."""
    kinds = [item.kind for item in canvas.items]
    single = [item for item in canvas.items if kinds.count(item.kind) == 1]
    if not single:
        return None
    item = chance.choice(single)
    return Question("where", f"Where is the {KINDS[item.kind]}?", item.corner)
