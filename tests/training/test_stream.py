"""A stream of text: the windows of the whole, read as they are needed, and resumed anywhere."""

import json

import pytest
import torch

from training.data import Corpus, pack, read_corpus
from training.files import DataError
from training.stream import StreamedWindows

WINDOW, BLOCK = 6, 5
TEXTS = tuple(f"{number}. {'abcdefgh'[: number % 8 + 1] * (number % 5)}" for number in range(30))


def write(path, texts, *more):
    path.write_text("".join([json.dumps({"text": text}) + "\n" for text in texts]) + "".join(more))
    return str(path)


@pytest.fixture
def streamed(tmp_path, tiny_tokenizer):
    data = write(tmp_path / "a.jsonl", TEXTS)

    def make(data=data, **options):
        return StreamedWindows(data, tiny_tokenizer, WINDOW, 1, **{"block": BLOCK} | options)

    return make


def rows_of(windows):
    return sorted(map(tuple, windows.tolist()))


def test_an_epoch_of_a_stream_is_the_windows_of_the_whole(streamed, tiny_tokenizer):
    packed_WT = pack(Corpus("a", TEXTS), tiny_tokenizer, WINDOW)
    assert len(packed_WT) % BLOCK  # the last block is a shorter one

    first, second = streamed().take(2 * len(packed_WT)).split(len(packed_WT))

    assert rows_of(first) == rows_of(second) == rows_of(packed_WT)
    assert not torch.equal(first, packed_WT) and not torch.equal(first, second)
    assert torch.equal(streamed().first_block(), packed_WT[:BLOCK])


@pytest.mark.parametrize("before", range(1, 60, 7))
def test_a_stream_goes_on_from_anywhere_as_if_never_left(streamed, before):
    whole = streamed(held_out=0.3)
    whole.take(before)
    expected = whole.take(90)

    left = streamed(held_out=0.3)
    left.take(before)
    after = streamed(held_out=0.3)
    after.first_block()  # a run reads some of it before it is told where it stood
    after.go_on(json.loads(json.dumps(left.state())))

    assert torch.equal(after.take(90), expected)


def test_nothing_is_read_before_it_is_needed(tmp_path, streamed):
    stream = streamed(write(tmp_path / "late.jsonl", TEXTS, "{broken\n"))

    stream.take(2 * BLOCK)
    with pytest.raises(DataError, match=r"late\.jsonl, line 31: not JSON"):
        stream.take(100)


def test_what_is_held_out_is_never_trained_on(streamed, tiny_tokenizer):
    def text_of(windows_WT):
        return tiny_tokenizer.decode(windows_WT.flatten()).replace("<|im_end|>", "\n").splitlines()

    stream = streamed(held_out=0.4)
    trained, held = stream.take(40), stream.held_windows(4)

    assert len(held) == 4
    # Whole lines only: the first and the last are cut.
    assert not set(text_of(held)[1:-1]) & {line for row in trained for line in text_of(row)[1:-1]}
    assert torch.equal(held, streamed(held_out=0.4).held_windows(9)[:4])


def test_a_hub_data_set_streams_the_same(tmp_path, streamed):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", TEXTS)

    hub = streamed(f"hub:{folder}")
    assert torch.equal(hub.take(50), streamed().take(50))
    assert hub.sha256() == streamed().sha256()


def test_the_hash_of_a_short_stream_is_that_of_the_corpus(streamed, tmp_path, tiny_tokenizer):
    assert streamed().sha256() == read_corpus(str(tmp_path / "a.jsonl"), tiny_tokenizer).sha256


def test_too_little_text_is_refused(tmp_path, streamed):
    few = write(tmp_path / "few.jsonl", ["abc"])
    with pytest.raises(DataError, match="4 tokens, fewer than a window of 6"):
        streamed(few).take(1)
    with pytest.raises(DataError, match=r"held out.*0 tokens"):
        streamed(few, held_out=1e-9).held_windows(1)
    with pytest.raises(DataError, match="empty"):
        streamed(write(tmp_path / "none.jsonl", [])).take(1)
