"""Rated texts: which part a document is in, and that no text is in two."""

import pytest

from training.files import DataError
from training.reviews import Review, part_of, read_ratings, without_repetitions


def test_a_table_of_ratings_is_read_line_by_line():
    first, second = read_ratings("amazon", "1_1\t-0.9\tno picture.\r\n1_2\t2.5\tGreat!\r\n")
    assert (first.text, first.rating) == ("no picture.", -0.9)
    assert (second.text, second.rating) == ("Great!", 2.5)
    assert first.part == second.part  # both are sentences of document 1

    with pytest.raises(DataError, match="movie, line 2: number, rating and text"):
        read_ratings("movie", "1\t1.0\tfine\n2\tgood")
    with pytest.raises(DataError, match="movie, line 1"):
        read_ratings("movie", "1\tgood\tfine")


def test_about_a_tenth_of_the_documents_is_for_the_test_and_a_twentieth_held_out():
    parts = [part_of("movie", str(number)) for number in range(4000)]
    assert 0.08 < parts.count("test") / 4000 < 0.12
    assert 0.04 < parts.count("heldout") / 4000 < 0.06
    assert parts == [part_of("movie", str(number)) for number in range(4000)]


def test_a_text_that_stands_twice_is_kept_where_it_is_measured_on():
    train, test = Review("a", "Fine.", 1.0, "train"), Review("b", "fine.", 2.0, "test")
    other = Review("a", "Bad.", -1.0, "train")
    assert without_repetitions([train, other, test]) == [test, other]
