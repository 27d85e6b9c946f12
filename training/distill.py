"""Train routers, and low-rank repair, on what the pretrained model itself says.

One adapter comes out for all capacities and both phases. DIR is the adapter; beside it, DIR.run
holds checkpoints, progress.jsonl, TensorBoard's log and the training curve. A run that was
stopped, or killed at any moment, goes on with the same command and --resume, to the same bits.

Several processes: `torchrun --nproc-per-node N -m training distill …`; --batch-tokens is that of
all together, and what is learnt does not hang on their number.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastiformer import ElasticModel, Phase, SavedAdapter, Selection, Unit
from elastiformer.lora import PARTS
from elastiformer.routers import IMAGE_SCORERS, PART_GATES, TOKEN_GATES
from elastiformer.tasks import Task
from elastiformer.vlm_weights import is_vlm
from training.allotment import fields_of, probe_share
from training.checkpoint import Checkpoint, latest_checkpoint
from training.encoder_calibrate import SEEN, task_asked
from training.files import RunError, run_beside, write_json
from training.learners import learner
from training.lessons import tolerances
from training.loop import Distillation, Text
from training.losses import Direction
from training.options import LAYER_UNITS, SPREAD, real, refuse_unused, units, whole
from training.picture_student import LEAST_IMAGE_SHARE
from training.processes import World, joined, shard_base
from training.progress import track
from training.quality import recalibrate
from training.sensitivity import Meter, Probe
from training.signals import Stop
from training.start import begun_with, blank_adapter, path_followed, settle_start
from training.student import Student, TextStudent

BLANK, TOLERANCE = "blank", "tolerance.json"  # what a run begins with, kept for its resumption

# Options that may differ between a run and its resumption; the others decide what is learnt.
FREE = {"out", "resume", "data", "base", "checkpoint_every", "pass_tokens", "shard_base", "device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--data", required=True, help=".txt, .jsonl, a folder of them or of images, or hub:NAME")
    add("--stream", action="store_true", help="read the data as it is needed, not whole first")
    add(
        "--task",
        choices=list(Task),
        help="of an encoder (default: what its config says)",
    )
    add("--out", type=Path, required=True, help="folder of the adapter to write")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--start", help="adapter that training begins with; also decides what is trained")
    add(
        "--units",
        type=units,
        help="what may be left out (default: all; of a vision-language model image_tokens)",
    )
    add(
        "--prompt-units",
        type=units,
        help="of them, in prompts (default: all of --units; none: whole late layers only)",
    )
    add(
        "--output-units",
        type=units,
        help="of them, in outputs (default: all of --units; none: outputs run whole, and what is "
        "learnt is what prompts need)",
    )
    add("--experts", type=whole(2), default=16, help="blocks that each MLP is divided into")
    add(
        "--expert-split",
        default="coactivation",
        choices=["coactivation", "contiguous"],
        help="neurons that work together, or neighbours",
    )
    add("--image-scorer", default="linear", choices=IMAGE_SCORERS, help="of image tokens")
    add("--image-spread", type=real(least=0), default=0.0, help=SPREAD)
    add(
        "--image-draws",
        type=whole(0),
        default=0,
        help="sets of image tokens tried for each image; 0: only those that score best",
    )
    add(
        "--image-most",
        type=real(above=LEAST_IMAGE_SHARE, most=1),
        default=1.0,
        help="the largest share of an image's tokens that is trained",
    )
    add("--token-gate", default="hard", choices=TOKEN_GATES, help="a kept token's multiplier")
    add("--part-gate", default="hard", choices=PART_GATES, help="a kept head's or expert's")
    add("--kv", default="complete", choices=["complete", "kept"], help="keys of skipped tokens")
    add("--lora-rank", type=whole(0), default=1, help="0: no repair")
    add("--lora-modules", default=",".join(PARTS), help="the projections that are repaired")
    add(
        "--lora-phases",
        default="shared",
        choices=["shared", "split", "prompt"],
        help="one repair, or one for prompt tokens and one for output tokens",
    )
    add("--steps", type=whole(1), default=400, help="of the optimizer")
    add("--batch-tokens", type=whole(1), default=1024, help="of one step, over all processes")
    add("--batch-items", type=whole(1), default=32, help="the same of an encoder or in exchanges")
    add("--seen", type=real(above=0, most=1), default=1.0, help=SEEN)
    add("--window", type=whole(2), default=256, help="tokens of one row")
    add("--lr", type=real(above=0), default=1e-3, help="the highest learning rate")
    add("--warmup", type=real(least=0, below=1), default=0.05, help="share of the steps")
    add("--clip", type=real(above=0), default=1.0, help="gradient norm, at most")
    add("--weight-decay", type=real(least=0), default=0.0, help="of AdamW")
    add(
        "--min-capacity",
        type=real(above=0, below=1),
        default=0.5,
        help="the lowest that is trained; of uniform lessons, the lowest keep share",
    )
    add(
        "--max-capacity",
        type=real(above=0, most=1),
        default=1.0,
        help="the highest that is trained; of uniform lessons, the highest keep share",
    )
    add(
        "--lessons",
        default="mixed",
        choices=["mixed", "uniform", "calibrated"],
        help="plans of all kinds; the paper's: one share in all layers, every token scored; or "
        "those that the adapter of --start was calibrated to",
    )
    add("--kl", default="forward", choices=list(Direction), help="teacher to student, or back")
    add("--top-k", type=whole(0), default=0, help="teacher's likeliest tokens compared; 0: all")
    add("--temperature", type=real(above=0), default=1.0, help="of both in the KL")
    add(
        "--even-rows",
        action="store_true",
        help="a row counts by the logarithm of its KL: low capacities teach no more than high ones",
    )
    add(
        "--copied",
        type=real(least=0, most=1),
        default=0.0,
        help="share of the rows whose text repeats its prompt: what answers quote",
    )
    add("--balance", type=real(least=0), default=0.1, help="weight of the load-balancing loss")
    add(
        "--agreement",
        type=real(least=0),
        default=0.1,
        help="weight of the threshold-agreement loss",
    )
    add("--selection", default="rank", choices=list(Selection), help="of tokens, in training")
    add(
        "--probe-windows",
        type=whole(0),
        default=2,
        help="to find what must stay whole; 0: no probing",
    )
    add(
        "--held-out",
        type=real(least=0, below=1),
        default=0.02,
        help="share of documents; 0: measure nothing",
    )
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the base; what is trained is float32",
    )
    add("--checkpoint-every", type=whole(1), default=50, help="steps")
    add("--pass-tokens", type=whole(1), default=2048, help="of one forward and backward: memory")
    add("--shard-base", action="store_true", help="FSDP2: spread the base over the processes")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train; what happened, or None in a process that does not lead.

    Raises:
        DataError, RunError, BaseModelError, AdapterError: see their messages.
    """
    with joined() as world:
        return train(args, world)


def train(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """One run in a world that stands: from the options to the adapter."""
    with Stop("step" if world.leads else None) as stop:
        settle(args, world)
        return prepared(args, world, *learner(args, world)).go(stop)


def settle(args: argparse.Namespace, world: World) -> None:
    """Give every option the value that it has for this base, or refuse it."""
    settle_start(args, add_arguments)
    reads_images = is_vlm(args.base)
    of_text = not reads_images and task_asked(args) is None
    if not of_text:
        # Rows are items or exchanges, whatever their lengths.
        args.window, args.batch_tokens = 1, args.batch_items
    if args.units is None:
        args.units = (Unit.IMAGE_TOKENS,) if reads_images else LAYER_UNITS
    if args.units == (Unit.IMAGE_TOKENS,):
        args.lora_rank = 0  # only layers that leave something out are repaired
    if not args.units:
        raise RunError("--units: at least one; there is nothing to learn without")
    if args.max_capacity < args.min_capacity:
        raise RunError(
            f"--max-capacity {args.max_capacity:g}: at least --min-capacity, {args.min_capacity:g}"
        )
    rows, left = divmod(args.batch_tokens, args.window)
    if rows == 0 or left or rows % world.size:
        raise RunError(
            f"--batch-tokens {args.batch_tokens}: a multiple of --window {args.window} whose rows "
            f"divide among the processes, of which there are {world.size}"
        )
    if Unit.IMAGE_TOKENS not in args.units:
        unused = ("image_spread", "image_draws", "image_most")
        refuse_unused(args, add_arguments, unused, "what routes no image tokens")
    if not of_text:
        refuse_unused(args, add_arguments, ("even_rows", "copied"), "what learns from no text")
    if args.lessons == "uniform":
        refuse_unused(args, add_arguments, ("copied",), "--lessons uniform, which has no prompts,")
    if args.image_draws == 1:
        raise RunError("--image-draws 1: one set has none to be compared with; 2 at least, or 0")
    if args.image_draws and args.token_gate != "hard":
        raise RunError(f"--image-draws: asks for --token-gate hard, not {args.token_gate}")
    for name in ("prompt_units", "output_units"):
        asked = getattr(args, name)
        asked = args.units if asked is None else asked
        setattr(args, name, asked)
        if stray := [unit for unit in asked if unit not in args.units]:
            raise RunError(f"--{name.replace('_', '-')}: {', '.join(stray)} is not among --units")
    of_layers = [unit for unit in args.units if unit is not Unit.IMAGE_TOKENS]
    for name in ("prompt_units", "output_units"):
        asked = tuple(unit for unit in getattr(args, name) if unit in of_layers)
        setattr(args, name, asked)
    if of_layers and not args.output_units:
        if not of_text or args.lessons == "uniform":
            raise RunError(
                "--output-units: at least one; outputs are whole in lessons of text alone"
            )
        if not args.prompt_units and not args.lora_rank:
            raise RunError(
                "--output-units none: what learns then is prompts' units or repair; name one"
            )


def prepared(
    args: argparse.Namespace, world: World, student: Student, text: Text, sample: Any
) -> Distillation:
    """A run before its first step, or before the first that is left; its options are settled.

    Args:
        sample: a little of the text, to split experts by.
    """
    model = student.model
    options = {name: _plain(value) for name, value in vars(args).items() if name not in FREE}
    start = begun_with(args, model)
    options |= {"start": None if start is None else start.identity}
    options |= {"data_sha256": text.sha256, "base_revision": model.identity.revision}

    folder = run_beside(args.out)
    found = latest_checkpoint(folder)
    _refuse_mixing(args, found, options)
    world.wait()  # nobody writes before everybody has looked
    if found is None and world.leads:
        shutil.rmtree(folder, ignore_errors=True)
        (start or blank_adapter(args, model, sample)).save(folder / BLANK)
    world.wait()
    model.attach(SavedAdapter.load(folder / BLANK).fit(model.layout, model.identity))
    followed = path_followed(args, model.calibration, model.shape)
    recalibrate(model, None)  # it is not of the weights to come
    tolerance = folder / TOLERANCE
    if world.leads and not tolerance.exists():
        probed = {}
        if isinstance(student, TextStudent) and followed is None:
            probed = probed_losses(student.model, text, args.probe_windows)
        write_json(tolerance, _named(probed))
    world.wait()
    losses = {_place(name): loss for name, loss in json.loads(tolerance.read_text()).items()}
    if args.shard_base and world.size > 1:
        shard_base(world, model.base, model.layout.layers_path)
    distillation = Distillation(
        args, world, folder, student, text, options, tolerances(losses), followed
    )
    if found is not None:
        distillation.restore(found)
    return distillation


def _refuse_mixing(
    args: argparse.Namespace, found: Checkpoint | None, options: Mapping[str, object]
) -> None:
    """Never train over an adapter or a run that something else has left."""
    if not args.resume:
        if found is not None:
            raise RunError(
                f"{args.out}: a run of {found.step} steps is there; --resume goes on with it, "
                "another --out begins a new one"
            )
        if (args.out / "adapter.json").exists():
            raise RunError(f"{args.out}: holds an adapter already; choose another --out")
    elif found is not None:
        before = found.state["options"]
        changed = [
            f"  {name}: was {before.get(name)}, now {options.get(name)}"
            for name in sorted(before.keys() | options.keys())
            if before.get(name) != options.get(name)
        ]
        if changed:
            raise RunError("\n".join(["this is not the run that was stopped:", *changed]))


def probed_losses(model: ElasticModel, text: Text, windows: int) -> dict[tuple[int, str], float]:
    """What lowering each share alone loses, before any training; empty without windows."""
    if windows == 0:
        return {}
    assert model.adapter is not None, "nothing to probe without an adapter"
    units = model.adapter.units
    layers, window = len(model.shape.layers), text.train_WT.shape[1]
    meter = Meter(model, text.train_WT[:windows], window // 2)
    places = [(layer, name) for layer in range(layers) for name in fields_of(units)]
    losses = {}
    for layer, name in track(places, label="finding what must stay whole"):
        plan = Probe(Phase.OUTPUT, layer, name, probe_share(name)).plan(layers)
        losses[layer, name] = meter.kl(Phase.OUTPUT, plan, layer)
    return losses


def _named(losses: Mapping[tuple[int, str], float]) -> dict[str, float]:
    return {f"{layer}.{name}": loss for (layer, name), loss in losses.items()}


def _place(name: str) -> tuple[int, str]:
    layer, _, field = name.partition(".")
    return int(layer), field


def _plain(value: object) -> object:
    """An option as JSON gives it back."""
    return [str(each) for each in value] if isinstance(value, tuple) else value
