"""What every test stands on: tiny real models, a tokenizer, one thread, a seed, no network."""

from __future__ import annotations

import os

# Before torch is loaded: spinning threads make everything slow for whoever shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may reach for the network, and a missing file must not cost a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels of GPUs run on a CPU, slowly, unless the tests run on a GPU.
if os.environ.get("ELASTI_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is loaded without a device goes to a GPU

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import FAMILIES, tiny, tiny_tokenizer
from tests.turns import taken

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # waiting is not part of what a test takes
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with taken(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the families in turn, by name."""
    return str(request.param)


@pytest.fixture(name="tiny")
def _tiny() -> Callable[..., PreTrainedModel]:
    """The function `tiny(family, seed, **config_changes)`; see tests/tiny.py."""
    return tiny


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="session", name="tiny_tokenizer")
def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with its tokenizer, as a model folder on disk."""
    folder = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The embedded SmolLM2-135M-Instruct as a model folder, converted once per machine."""
    from elastiformer.weights import resolve

    path = resolve("smollm2-135m-instruct").path
    assert path is not None
    return path
