"""Training data: every form is read, every fault is named, and the order can be resumed."""

import json

import pytest
import torch

from training.data import Corpus, Position, Windows, pack, read_corpus, shard
from training.files import DataError


@pytest.fixture
def write(tmp_path):
    def write_lines(name, *lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write_lines


def test_every_form_of_text_is_read(write, tiny_tokenizer):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    text = write("a.txt", "One document,", "two lines.")
    lines = write(
        "b.jsonl",
        json.dumps({"text": "First."}),
        "",
        json.dumps({"text": "Second.", "label": "good"}),
        json.dumps({"messages": turns}),
    )

    assert read_corpus(text, tiny_tokenizer).documents == ("One document,\ntwo lines.\n",)
    first, second, chat = read_corpus(lines, tiny_tokenizer).documents
    assert (first, second) == ("First.", "Second.")
    assert chat == tiny_tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_folder_is_all_its_files_in_order(write, tmp_path, tiny_tokenizer):
    write("data/2.txt", "two")
    write("data/1.jsonl", json.dumps({"text": "one"}))
    write("data/notes.md", "not data")

    assert read_corpus(str(tmp_path / "data"), tiny_tokenizer).documents == ("one", "two\n")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{not json", "not JSON"),
        ("[1]", "an object"),
        ('{"txt": "misspelt"}', '"text" is a string'),
        ('{"text": ""}', "not empty"),
        ('{"messages": [{"role": "user"}]}', '"messages" is a list'),
        ('{"messages": []}', '"messages" is a list'),
        ('{"image": "a.png", "text": "A cat."}', "not supported by this version"),
    ],
)
def test_a_malformed_line_is_named(write, tiny_tokenizer, line, fault):
    path = write("bad.jsonl", '{"text": "good"}', line)

    with pytest.raises(DataError) as refused:
        read_corpus(path, tiny_tokenizer)

    assert "bad.jsonl, line 2" in str(refused.value)
    assert fault in str(refused.value)


def test_what_is_missing_or_empty_is_named(write, tmp_path, tiny_tokenizer):
    write("empty/nothing.md", "no data")
    write("images/cat/1.png", "a picture")
    cases = {
        str(tmp_path / "absent.txt"): "no such file",
        write("blank.txt", "  "): "empty",
        write("table.csv", "a,b"): ".txt or .jsonl",
        str(tmp_path / "empty"): "no .txt or .jsonl file inside",
        str(tmp_path / "images"): "image data is not supported",
        "hub:": "written hub:NAME",
    }
    for data, fault in cases.items():
        with pytest.raises(DataError, match=fault):
            read_corpus(data, tiny_tokenizer)


def test_messages_need_a_chat_template(write, tiny_tokenizer):
    plain = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    path = write("chat.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi."}]}))

    with pytest.raises(DataError, match="no chat template"):
        read_corpus(path, plain)


def test_a_hub_data_set_is_read_like_lines(write, tmp_path, tiny_tokenizer):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    # A folder of files is a data set to `datasets`, under the same call as one of the Hub.
    assert read_corpus(f"hub:{folder}", tiny_tokenizer).documents == ("one", "two")
    with pytest.raises(DataError, match="hub:"):
        read_corpus(f"hub:{folder}:absent", tiny_tokenizer)


def test_the_hash_tells_texts_apart_and_not_their_file():
    one = Corpus("a", ("ab", "c"))

    assert one.sha256 == Corpus("b", ("ab", "c")).sha256
    assert one.sha256 != Corpus("a", ("a", "bc")).sha256


def test_a_split_parts_documents_and_adding_one_moves_none():
    texts = tuple(f"document {number}" for number in range(200))

    train, held = Corpus("a", texts).split(0.1)
    _, held_of_more = Corpus("a", (*texts, "one more")).split(0.1)

    assert set(train.documents) | set(held.documents) == set(texts)
    assert not set(train.documents) & set(held.documents)
    assert 8 <= len(held.documents) <= 32
    assert set(held.documents) <= set(held_of_more.documents)


@pytest.mark.parametrize("texts", [("0123456789",), ("first", "second")])
def test_something_is_always_held_out_and_something_kept(texts):
    train, held = Corpus("a", texts).split(0.01 if len(texts) > 1 else 0.2)

    assert train.documents and held.documents
    assert "".join(sorted([*train.documents, *held.documents])) == "".join(texts)


def test_packing_keeps_every_token_and_parts_documents(tiny_tokenizer):
    ids_WT = pack(Corpus("a", ("abcd", "efg")), tiny_tokenizer, window=3)

    end = tiny_tokenizer.eos_token_id
    a, b, c, d, e, f, g = tiny_tokenizer("abcdefg")["input_ids"]
    assert ids_WT.tolist() == [[a, b, c], [d, end, e], [f, g, end]]


def test_too_little_text_for_a_window_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="5 tokens, fewer than a window of 6"):
        pack(Corpus("a", ("abcd",)), tiny_tokenizer, window=6)


def test_the_same_seed_gives_the_same_order_and_another_another():
    ids_WT = torch.arange(20)[:, None]

    def order(seed):
        return torch.cat([Windows(ids_WT, seed).take(20)]).flatten().tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert sorted(order(3)) == list(range(20))


def test_a_run_resumed_in_mid_epoch_sees_what_it_would_have_seen():
    ids_WT = torch.arange(7)[:, None]
    whole = Windows(ids_WT, seed=1)
    expected = [whole.take(3).flatten().tolist() for _ in range(9)]

    before = Windows(ids_WT, seed=1)
    for _ in range(4):
        before.take(3)
    after = Windows(ids_WT, seed=1, position=Position(before.position.epoch, before.position.taken))

    assert [after.take(3).flatten().tolist() for _ in range(5)] == expected[4:]
    seen = [each for batch in expected for each in batch]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))  # epoch after epoch


def test_processes_share_a_batch_without_overlap():
    assert [shard(range(6), rank, 3) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
