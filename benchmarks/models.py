"""What is measured: the served model, layers of bigger models' shapes, and text to run through.

The layers of a shape have random weights and a made-up calibration: for how long a product takes,
it does not matter what is in it. Nothing of it is written to disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import elastiformer
from benchmarks.results import FOLDER
from elastiformer import (
    Calibration,
    Capacity,
    ElasticModel,
    Phase,
    Site,
    Step,
    Unit,
)
from elastiformer.accounting import KVPolicy
from elastiformer.errors import CapacityError, InputError
from elastiformer.weights import DTYPES, comes_along
from training.channel_sizes import channel_quantiles
from training.options import whole

ROOT = Path(elastiformer.__file__).parent.parent
DEFAULT_BASE = "smollm2-135m-instruct"
NO_ADAPTER = "none"
_TEXT = ROOT / "LICENSE"  # plain English, and never longer than it was
_LOWEST = 0.35
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer of a Llama, and how many of them are made."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    layers: int


# More than two layers where memory allows: of a prompt, the last one is nearly free at any
# capacity, so with few layers it weighs more than it does in a whole model.
SHAPES = {
    "smollm2": Shape(576, 9, 3, 64, 1536, layers=6),
    "llama-1.5b": Shape(2048, 32, 8, 64, 8192, layers=4),
    "llama-8b": Shape(4096, 32, 8, 128, 14336, layers=2),
}


def add_model_arguments(parser: argparse.ArgumentParser, shapes: bool = False) -> None:
    """Which model, on what, and where the results go."""
    parser.add_argument("--base", default=DEFAULT_BASE, help="folder, Hub id or embedded name")
    parser.add_argument(
        "--adapter",
        help=f"adapter's folder; '{NO_ADAPTER}': none; unset: the one embedded for the base",
    )
    if shapes:
        parser.add_argument(
            "--shape",
            choices=SHAPES,
            help="a few random layers of this shape instead of --base, where overhead hides less",
        )
        parser.add_argument("--layers", type=whole(2), help="layers of --shape, instead of its own")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--threads", type=whole(0), default=0, help="0: as PyTorch chooses")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")


def load(args: argparse.Namespace) -> ElasticModel:
    """The model that the options name, prepared as a server does it; its threads are set too."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if getattr(args, "shape", None):
        model = shaped(args.shape, args.layers, args.dtype, args.device)
    else:
        model = ElasticModel.load(args.base, adapter_of(args), args.dtype, args.device)
    print(model.measure_costs(), file=sys.stderr)
    return model


def name_of(args: argparse.Namespace) -> str:
    """What is measured, for titles."""
    if getattr(args, "shape", None):
        layers = args.layers or SHAPES[args.shape].layers
        return f"{layers} random layers of {args.shape}'s shape"
    return str(args.base) if comes_along(args.base) else Path(args.base).name


def adapter_of(args: argparse.Namespace) -> str | None:
    if args.adapter == NO_ADAPTER:
        return None
    if args.adapter:
        return str(args.adapter)
    embedded = ROOT / "elastiformer" / "adapters" / args.base
    return str(embedded) if comes_along(args.base) and embedded.is_dir() else None


def shaped(name: str, layers: int | None, dtype: str, device: str) -> ElasticModel:
    """Random layers of a shape: prompts leave out whole sub-layers, outputs pick channels."""
    shape = SHAPES[name]
    layers = layers or shape.layers
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_width,
        vocab_size=256,  # tiny, so that the layers are what is measured
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with torch.random.fork_rng(), torch.device(place):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=_dtype(dtype, torch.device(place)))
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(weight.bfloat16())  # as nearly every checkpoint holds them
    model = ElasticModel(base.to(place))
    adapter = model.blank_adapter((Unit.CHANNELS,), lora_rank=0)
    late_first = reversed(range(layers))
    adapter.calibration = Calibration(
        lowest=_LOWEST,
        context=512,
        paths={
            Phase.PROMPT: tuple(
                Step(layer, unit.value, 0.0)
                for layer in late_first
                for unit in (Unit.MLP_TOKENS, Unit.ATTENTION_TOKENS)
            ),
            Phase.OUTPUT: tuple(
                Step(layer, site.value, share)
                for share in _SHARES
                for layer in range(layers)
                for site in Site
            ),
        },
        thresholds={},
        measured=(),
    )
    model.attach(adapter)
    # As in an adapter that a command calibrated, outputs take channels by thresholds.
    ids_WT = torch.tensor(text_ids(model, 256))[None]
    quantiles = channel_quantiles(model, adapter.calibration, ids_WT)
    adapter.calibration = replace(adapter.calibration, channel_quantiles=quantiles)
    model.attach(adapter)
    return model


def routed_tokens(model: ElasticModel, kv: KVPolicy) -> None:
    """Give a model an untrained adapter under which both phases leave out tokens of all layers.

    What a cache holds then falls with the capacity, if `kv` lets it. Attention goes a little
    ahead of the MLP, since over fewer keys a kept token's attention costs less as well.
    """
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)
    adapter = model.blank_adapter(units, kv=kv, lora_rank=0)
    steps = range(19, 4, -1)
    path = tuple(
        Step(layer, unit.value, place / 20)
        for step in steps
        for unit, place in zip(units, (step, step + 2), strict=True)
        if place < 20
        for layer in range(len(model.layout.layers))
    )
    adapter.calibration = Calibration(
        lowest=0.4, context=512, paths=dict.fromkeys(Phase, path), thresholds={}, measured=()
    )
    model.attach(adapter)


def text_ids(model: ElasticModel, tokens: int) -> list[int]:
    """So many token ids of English; of a model without a tokenizer, random ones."""
    if model.tokenizer is None:
        draw = torch.Generator().manual_seed(0)
        drawn: list[int] = torch.randint(
            model.layout.vocabulary, (tokens,), generator=draw
        ).tolist()
        return drawn
    text = _TEXT.read_text("utf-8")
    # Not verbose: it would warn that the text is longer than the context.
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return (ids * (tokens // len(ids) + 1))[:tokens]


def capacity_argument(text: str) -> Capacity:
    """A capacity on the command line, in JSON: 0.8, or {"mlp_tokens": 0.5}."""
    try:
        return Capacity.parse(json.loads(text), "--capacity")
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"a number or a JSON object; got {text!r}") from None
    except CapacityError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def label_of(capacity: Capacity) -> str:
    return json.dumps(capacity.as_json())


def check_context(model: ElasticModel, tokens: int) -> None:
    if tokens > model.context:
        raise InputError(f"{tokens} tokens are wanted; the model's context holds {model.context}")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    fast = any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
