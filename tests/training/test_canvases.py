"""Canvases of clothes: what stands on them, and that answers are true."""

from collections import Counter

import torch

from tests.training.fashion import sample
from training.canvases import (
    CORNERS,
    KINDS,
    LEAST,
    MOST,
    NAMED,
    NUMBERS,
    SIDE,
    compose,
    questions,
)
from training.fashion_mnist import LABELS

IMAGES = sample()
CANVASES = [compose(IMAGES, 0, "train", number) for number in range(120)]


def test_a_kind_says_in_a_word_what_its_label_says():
    assert set(NAMED) == set(range(len(LABELS))) - {LABELS.index("Coat"), LABELS.index("Shirt")}
    for label, kind in NAMED.items():
        assert kind.split("-")[0] in LABELS[label].lower().replace("/", "-")
    seen = {item.kind for canvas in CANVASES for item in canvas.items}
    assert seen == set(range(len(KINDS)))


def test_items_do_not_overlap_and_the_rest_is_empty():
    for canvas in CANVASES:
        covered = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for item in canvas.items:
            assert LEAST <= item.side <= MOST
            covered[item.top : item.top + item.side, item.left : item.left + item.side] += 1
        assert covered.max() == 1
        assert covered.sum() == sum(item.side**2 for item in canvas.items)
        assert (canvas.grey_HW[covered == 0] == 0).all()
        assert canvas.grey_HW[covered == 1].mean() > 0.05
    counts = Counter(len(canvas.items) for canvas in CANVASES)
    assert set(counts) == {1, 2, 3}


def test_a_canvas_hangs_on_its_seed_its_part_and_its_number_alone():
    assert torch.equal(compose(IMAGES, 0, "train", 5).grey_HW, CANVASES[5].grey_HW)
    others = [compose(IMAGES, 0, "test", 5), compose(IMAGES, 1, "train", 5), CANVASES[6]]
    assert all(other.items != CANVASES[5].items for other in others)
    assert questions(CANVASES[5], 0, "train", 5) == questions(CANVASES[5], 0, "train", 5)


def corner_of(item) -> str:
    row = "top" if item.top + item.side / 2 < SIDE / 2 else "bottom"
    column = "left" if item.left + item.side / 2 < SIDE / 2 else "right"
    return f"{row} {column}"


def test_every_answer_is_true():
    seen: Counter[str] = Counter()
    for number, canvas in enumerate(CANVASES):
        kinds = [KINDS[item.kind] for item in canvas.items]
        for question in questions(canvas, 0, "train", number):
            seen[question.about] += 1
            named = next((kind for kind in KINDS if f" {kind}" in question.text), None)
            if question.about == "number":
                counted = len(kinds) if named is None else kinds.count(named)
                assert question.answer == NUMBERS[counted]
            elif question.about == "where":
                assert kinds.count(named) == 1
                assert question.answer == corner_of(canvas.items[kinds.index(named)])
            else:
                corner = next(corner for corner in CORNERS if corner in question.text)
                here = [
                    k
                    for k, item in zip(kinds, canvas.items, strict=True)
                    if corner_of(item) == corner
                ]
                assert [question.answer] == (here or ["nothing"])
    assert set(seen) == {"number", "what", "where"}
    assert min(seen.values()) > 60


def test_patches_are_of_the_item_that_covers_their_middle():
    canvas = CANVASES[3]
    patches = canvas.patches(4)
    grid = SIDE // 4
    kinds, corners = (each.view(grid, grid) for each in (patches.kinds_P, patches.corners_P))
    for row in range(grid):
        for column in range(grid):
            middle = (4 * row + 2, 4 * column + 2)
            covering = [
                (item.kind, CORNERS.index(item.corner))
                for item in canvas.items
                if item.top <= middle[0] < item.top + item.side
                and item.left <= middle[1] < item.left + item.side
            ]
            found = (int(kinds[row, column]), int(corners[row, column]))
            assert [found] == (covering or [(len(KINDS), len(CORNERS))])


def test_each_item_has_its_middle_in_one_patch_which_it_covers():
    for canvas in CANVASES:
        patches = canvas.patches(4)
        middles = patches.middles_P.nonzero()[:, 0]
        assert len(middles) == len(canvas.items)
        kinds = sorted(patches.kinds_P[middles].tolist())
        assert kinds == sorted(item.kind for item in canvas.items)


def test_as_many_questions_as_are_asked_for_and_none_twice():
    few = questions(CANVASES[0], 0, "train", 0)
    assert len({each.about for each in few}) == len(few)
    many = questions(CANVASES[0], 0, "train", 0, most=9)
    assert set(few) < set(many) and len(set(many)) == len(many) == 9
