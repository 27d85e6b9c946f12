"""What is refused before it is tokenized would be refused after it; what may fit never is."""

from __future__ import annotations

import random
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elastiformer.encoder_inputs import TextItems
from elastiformer.errors import InputError
from elastiformer.inputs import TextInputs
from elastiformer.text_bounds import TextBound
from tests.tiny import VOCAB

CONTEXT = 10
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = (Regex(r"\s+"), "isolated")


def byte_level(normalizer=None, steps=(), letters=LETTERS, added=("<|end|>",)):
    """Byte-level BPE that knows `the`, with a space before it or without."""
    words = ["th", "the", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}the"]
    vocab = {word: place for place, word in enumerate([*letters, *words])}
    merges = [("t", "h"), ("th", "e"), ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "the")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [each if isinstance(each, AddedToken) else AddedToken(each) for each in added]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def is_refused(tokenizer, text):
    try:
        TextBound(tokenizer, CONTEXT).check(text, "prompt")
    except InputError:
        return True
    return False


KNOWN = {
    "plain": byte_level(),
    "split": byte_level(steps=[pre_tokenizers.Split(*SPLIT), pre_tokenizers.Digits(True)]),
    "composed": byte_level(normalizers.NFC()),
    "few letters": byte_level(letters=[each for each in LETTERS if each not in "Ąñ"]),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_refused_could_fit_in_no_case(kind):
    tokenizer, chance, refused = KNOWN[kind], random.Random(0), 0
    parts = ["the", " the", "<|end|>", "e\N{COMBINING ACUTE ACCENT}", "\N{KELVIN SIGN}", "🦊"]
    parts += [
        " ",
        "\x04",
        "\N{GREEK PROSGEGRAMMENI}\N{COMBINING DIAERESIS}\N{COMBINING ACUTE TONE MARK}",
    ]
    for _ in range(3000):
        some = chance.choices(parts, k=chance.choice((1, 2, 9)))
        text = "".join(chance.choices(some, k=chance.randrange(1, 8 * CONTEXT)))
        if is_refused(tokenizer, text):
            assert len(tokenizer.encode(text)) > CONTEXT
            refused += 1
    assert refused > 100
    assert is_refused(tokenizer, "<|end|>" * 10 * (CONTEXT + 1))


def test_the_longest_tokens_may_fill_the_context():
    tokenizer = KNOWN["plain"]
    fits = "<|end|>" * CONTEXT
    assert len(tokenizer.encode(fits)) == CONTEXT
    assert not is_refused(tokenizer, fits)
    assert is_refused(tokenizer, fits + "a")
    # Nothing stands for this character, so a text of it has no tokens, however long it is.
    text = "\x04" * 1000
    assert not tokenizer.encode("") and not KNOWN["few letters"].encode(text)
    assert is_refused(tokenizer, text) and not is_refused(KNOWN["few letters"], text)


def test_composing_makes_one_byte_of_four_at_the_most():
    def size(text):
        return len(text.encode())

    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    apart = {each: unicodedata.normalize("NFD", each) for each in every}
    most: dict[str, int] = {}  # bytes that one character of a text taken apart can come from
    for whole, parts in apart.items():
        if len(parts) == 1:
            most[parts] = max(most.get(parts, 0), size(whole))
    for whole, parts in apart.items():
        assert size(whole) <= sum(most.get(each, size(each)) for each in parts)
        if unicodedata.normalize("NFC", whole) == whole:
            assert sum(most.get(each, size(each)) for each in parts) <= 4 * size(whole)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


UNKNOWN = {
    "words": (word_piece(), "x" * 5000),
    "stripping": (byte_level(added=[AddedToken("<m>", lstrip=True)]), " " * 5000 + "<m>"),
    "removing": (
        byte_level(steps=[pre_tokenizers.Split(Regex(r"\s+"), "removed")]),
        " " * 5000 + "the",
    ),
    "normalizing": (byte_level(normalizers.Strip()), " " * 5000 + "the"),
    "few letters, composed": (byte_level(normalizers.NFC(), letters=LETTERS[:-30]), "ñ" * 5000),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_of_other_tokenizers_nothing_is_refused_unread(kind):
    tokenizer, text = UNKNOWN[kind]
    assert not is_refused(tokenizer, text)


def test_a_text_that_is_refused_unread_is_read_where_it_is_to_be_cut(tiny_tokenizer):
    inputs, items = TextInputs(tiny_tokenizer, VOCAB, CONTEXT), TextItems(tiny_tokenizer, CONTEXT)
    text = "x" * 5000
    says = r"input: a text of 5000 bytes is more than the context of 10 tokens, none .* than 13"
    with pytest.raises(InputError, match=says):
        inputs.text(text, name="input")
    with pytest.raises(InputError, match=f"{says}; truncate: true cuts it"):
        items.prepare("a", text, name="input")
    assert len(inputs.text(text, any_length=True)) == 5000
    assert len(items.prepare(text, truncate=True).item.ids) == CONTEXT
