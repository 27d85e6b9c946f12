"""Promises of the way into tokens and back: whole characters, whole stop strings, refusals."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elastiformer.errors import InputError
from elastiformer.inputs import HALF_CHARACTER, Detokenizer, Offsets, StopMatcher, TextInputs
from tests.tiny import TURN_END, VOCAB

CONTEXT = 40
TEXT = "naïve → 日本語 🦊🏽‍🚀 ok"


@pytest.fixture
def inputs(tiny_tokenizer):
    return TextInputs(tiny_tokenizer, VOCAB, CONTEXT)


@pytest.fixture(scope="session")
def fallback_tokenizer():
    """Whole words with a leading mark, and single bytes for all else: as Llama 2's."""
    words = ["<unk>", "▁", "▁hello", "▁fox"]
    vocab = {word: place for place, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_text_goes_in_and_comes_back(inputs):
    ids = inputs.text(TEXT)
    assert len(ids) > len(TEXT) and inputs.decode(ids) == TEXT


def test_text_appears_one_whole_character_at_a_time(inputs):
    detokenizer = Detokenizer(inputs.tokenizer)
    parts = [detokenizer.push(token) for token in inputs.text(TEXT)]
    assert "".join(parts) == TEXT and detokenizer.flush() == ""
    assert all(part == "" or len(part) == 1 for part in parts)


def test_byte_fallback_text_appears_whole_too(fallback_tokenizer):
    ids = [2, *(4 + byte for byte in "é🦊".encode()), 3, *(4 + byte for byte in "語".encode()), 2]
    detokenizer = Detokenizer(fallback_tokenizer)
    parts = [detokenizer.push(token) for token in ids]
    assert "".join(parts) == "helloé🦊 fox語 hello" == fallback_tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert TextInputs(fallback_tokenizer, 260, 9).piece(4 + 0xE9).text == r"bytes:\xe9"


def test_the_parts_add_up_to_all_tokens_decoded_at_once(inputs):
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 40))]
        detokenizer = Detokenizer(inputs.tokenizer)
        parts = [detokenizer.push(token) for token in ids]
        assert "".join(parts) + detokenizer.flush() == inputs.decode(ids)


def test_bytes_that_are_no_characters_are_let_go(inputs, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "elastiformer.inputs.decoded", lambda _, ids, **__: decoded.append(len(ids)) or plain(ids)
    )

    def plain(ids):
        return inputs.tokenizer.decode(list(ids), skip_special_tokens=True)

    whole, start, stray = inputs.text("🦊")[0:4], *inputs.text("é")
    for ids in ([stray] * 300, [start] * 300, [*whole[:2], stray, start] * 80 + [*whole]):
        detokenizer, decoded[:] = Detokenizer(inputs.tokenizer), []
        parts = [detokenizer.push(token) for token in ids]
        assert "".join(parts) + detokenizer.flush() == plain(ids)
        assert max(decoded) < 30


def test_offsets_say_where_tokens_begin_in_the_text(inputs, fallback_tokenizer):
    def offsets(ids, of=inputs, start=0):
        found = Offsets(of.tokenizer, start)
        return [found.push(token, of.piece(token).text) for token in ids]

    fox = inputs.text("🦊")
    assert offsets([*inputs.text("é"), TURN_END, *fox, *inputs.text("ab")], start=5) == [
        *(5, 5), 6, *(6, 6, 6, 6), *(7, 8),
    ]  # fmt: skip
    # Half a character that nothing ends is one of its own.
    assert offsets([fox[0], *inputs.text("ab")]) == [0, 1, 2]
    of_words = TextInputs(fallback_tokenizer, 260, 9)
    ids = [2, *(4 + byte for byte in "🦊".encode()), 3]
    assert of_words.decode(ids) == "hello🦊 fox"
    assert offsets(ids, of_words) == [0, 5, 5, 5, 5, 6]

    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 40))]
        text, found = inputs.decode(ids), offsets(ids)
        assert found == sorted(found) and found[0] >= 0 and found[-1] <= len(text)
        for token, place in zip(ids, found, strict=True):
            piece = inputs.piece(token).text
            if token < TURN_END - 2 and not piece.startswith("bytes:"):
                assert text[place:].startswith((piece, HALF_CHARACTER))


def test_half_a_character_comes_out_at_the_end_only(inputs):
    detokenizer = Detokenizer(inputs.tokenizer)
    first, second = inputs.text("é")
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert inputs.piece(first).raw == b"\xc3" and inputs.piece(second).raw == b"\xa9"
    assert inputs.piece(TURN_END).text == "<|im_end|>"


def test_no_part_of_a_stop_string_gets_through():
    chance = random.Random(0)
    for _ in range(500):
        text = "".join(chance.choice("ab") for _ in range(30))
        stops = ["".join(chance.choice("ab") for _ in range(chance.randrange(2, 7)))]
        stops.append("abba")
        matcher, out, rest = StopMatcher(stops), "", text
        while rest and not matcher.stopped:
            size = chance.randrange(1, 5)
            out += matcher.push(rest[:size])
            rest = rest[size:]
            # What was let through so far never has to be taken back.
            assert text.startswith(out)
        if not matcher.stopped:
            out += matcher.flush()
        places = [text.find(stop) for stop in stops if stop in text]
        # Several stops may end in one piece of text: the earliest of that piece counts.
        assert matcher.stopped == bool(places)
        assert out == (text[: min(places)] if places else text) or (
            matcher.stopped and len(out) > min(places)
        )


def test_the_earliest_stop_string_ends_the_text():
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two E") == "\ntwo "
    assert matcher.push("N") == ""
    assert matcher.push("D\n\n") == "" and matcher.stopped


def test_a_conversation_follows_the_models_own_template(inputs):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids = inputs.chat([{"role": "user", "content": parts}])
    shown = inputs.tokenizer.decode(ids)
    assert shown == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_model_cannot_take_is_refused_with_the_numbers(inputs, fallback_tokenizer):
    with pytest.raises(InputError, match="no token"):
        inputs.text("")
    with pytest.raises(InputError, match=rf"{VOCAB} at place 1.*0 to {VOCAB - 1}"):
        inputs.ids([0, VOCAB])
    with pytest.raises(InputError, match=r"-1 at place 0"):
        inputs.ids([-1])
    with pytest.raises(InputError, match=rf"41 tokens.*{CONTEXT}"):
        inputs.room(41)
    with pytest.raises(InputError, match=rf"30 prompt tokens.*11 new.*{CONTEXT}"):
        inputs.checked_room(30, 11)
    assert inputs.room(30) == 10
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(InputError, match=r"messages\.0\.content\.0.*text only.*image_url"):
        inputs.chat([{"role": "user", "content": image}])
    with pytest.raises(InputError, match="chat template"):
        TextInputs(fallback_tokenizer, 260, 9).chat([{"role": "user", "content": "a"}])


def test_a_refusal_by_the_template_reaches_the_caller(tiny_tokenizer):
    own = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(InputError, match="roles must alternate"):
            TextInputs(tiny_tokenizer, VOCAB, CONTEXT).chat([{"role": "user", "content": "a"}])
    finally:
        tiny_tokenizer.chat_template = own
