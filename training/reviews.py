"""Rated English texts: film and product reviews, tweets, editorials, and how people rated each.

The ratings, means from -4 to 4 of fifteen to twenty people, come with vaderSentiment's source
package (MIT licence; C. J. Hutto and E. Gilbert, ICWSM 2014). A document is wholly in one part:
its number decides which, so sentences of one review never stand on both sides.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from training.data import seed_of
from training.files import DataError
from training.packages import VADER, fetched

ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}
PARTS = {"test": 10, "heldout": 15, "train": 100}  # of a hundred documents, up to


@dataclass(frozen=True, slots=True)
class Review:
    """One text; `rating` above 0 is positive, below is negative."""

    source: str
    text: str
    rating: float
    part: str


def fetch_reviews(folder: Path) -> list[Review]:
    """All of them, from the package in `folder`, fetched if it is not there yet.

    Raises:
        DataError: the package cannot be had, or is not what it should be.
    """
    reviews: list[Review] = []
    for source in SOURCES:
        reviews += read_ratings(source, fetch_table(source, folder))
    return without_repetitions(reviews)


def fetch_table(source: str, folder: Path) -> str:
    """The table of one source: a line each of number, mean rating and text, between tabs.

    Raises:
        DataError: the package cannot be had, or is not what it should be.
    """
    with zipfile.ZipFile(fetched(VADER, folder)) as outer:
        inner = io.BytesIO(outer.read(ARCHIVE))
    with tarfile.open(fileobj=inner) as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{SOURCES[source]}_GroundTruth.txt")
        assert file is not None, f"{source} is no file"
        return file.read().decode("utf-8-sig")


def read_ratings(source: str, table: str) -> list[Review]:
    """The reviews of a table: a line each of number, mean rating and text, between tabs.

    Raises:
        DataError: naming the line that is something else.
    """
    reviews = []
    for number, line in enumerate(table.splitlines(), 1):
        try:
            document, rating, text = line.split("\t")
            document = document.partition("_")[0]
            reviews.append(Review(source, text.strip(), float(rating), part_of(source, document)))
        except ValueError as error:
            raise DataError(f"{source}, line {number}: number, rating and text; {error}") from None
    return reviews


def part_of(source: str, document: str) -> str:
    place = seed_of("part", source, document) % 100
    return next(part for part, end in PARTS.items() if place < end)


def without_repetitions(reviews: list[Review]) -> list[Review]:
    """Each text once: in the test rather than held out, and held out rather than trained on."""
    order = list(PARTS)
    first: dict[str, Review] = {}
    for review in reviews:
        key = review.text.casefold()
        if key not in first or order.index(review.part) < order.index(first[key].part):
            first[key] = review
    return list(first.values())
