"""The tiny models that the other tests stand on are what they are taken for."""

from __future__ import annotations

import torch

from tests.tiny import SPECIAL_TOKENS, TURN_END, VOCAB, tiny


def test_a_tiny_model_is_the_same_each_time_and_leaves_the_seed_alone(family):
    before = torch.get_rng_state()
    first, second = tiny(family), tiny(family)
    assert torch.equal(torch.get_rng_state(), before)

    ids = torch.randint(VOCAB, (2, 7))
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, second(ids).logits)
        assert not torch.equal(first(ids).logits, tiny(family, seed=1)(ids).logits)


def test_a_tiny_model_really_looks_back(family):
    ids = torch.randint(VOCAB, (1, 7))
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % VOCAB
    model = tiny(family)
    with torch.inference_mode():
        change_T = (model(ids).logits - model(other).logits).abs().amax(-1)[0]

    assert torch.equal(change_T > 1e-3, torch.arange(7) >= 3)


def test_the_tiny_tokenizer_returns_any_text_and_knows_its_special_tokens(tiny_tokenizer):
    text = "héllo wörld\n 🙂 <|im_end|>"
    ids = tiny_tokenizer(text).input_ids

    assert tiny_tokenizer.decode(ids) == text
    assert ids[-1] == TURN_END == tiny_tokenizer.eos_token_id
    assert len(tiny_tokenizer) == VOCAB
    assert tiny_tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [256, 257, 258]
