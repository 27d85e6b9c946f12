"""What a run begins with: an untrained adapter, or one that was trained already.

Of the latter its routers, its repair and its shape are taken; not its calibration, which was of
other weights than the run will leave. Only lessons may follow that calibration's path.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from elastiformer import Adapter, AdapterSpec, Calibration, Phase, SavedAdapter, Unit
from elastiformer.accounting import ModelShape
from elastiformer.elastic import Elastic
from training.data import seed_of
from training.files import RunError


def settle_start(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Give the options that say what is trained the values that the adapter begun with has.

    Raises:
        AdapterError: it cannot be read.
        RunError: an option asks for another shape, or for a path without an adapter.
    """
    if args.start is None:
        if args.lessons == "calibrated":
            raise RunError("--lessons calibrated: needs --start with a calibrated adapter")
        return
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    taken = _options_of(SavedAdapter.load(args.start).spec)
    other = [
        f"--{name.replace('_', '-')}: {value} in the adapter that --start names; "
        f"got {getattr(args, name)}"
        for name, value in taken.items()
        if getattr(args, name) not in (parser.get_default(name), value)
    ]
    if other:
        raise RunError("\n".join(other))
    vars(args).update(taken)


def begun_with(args: argparse.Namespace, model: Elastic) -> Adapter | None:
    """The adapter that `--start` names, on this base; None without one.

    Raises:
        AdapterError: naming every misfit at once.
    """
    if args.start is None:
        return None
    return SavedAdapter.load(args.start).fit(model.layout, model.identity)


def blank_adapter(args: argparse.Namespace, model: Elastic, sample: Any) -> Adapter:
    """The untrained adapter that the options ask for."""
    torch.manual_seed(seed_of("weights", args.seed))
    return model.blank_adapter(
        units=args.units,
        experts=args.experts if Unit.EXPERTS in args.units else 0,
        expert_split=args.expert_split,
        token_gate=args.token_gate,
        part_gate=args.part_gate,
        kv=args.kv,
        lora_rank=args.lora_rank,
        lora_parts=tuple(args.lora_modules.split(",")) if args.lora_rank else (),
        lora_phases=args.lora_phases,
        image_scorer=args.image_scorer,
        image_spread=args.image_spread,
        calibration_ids=sample,
    )


def path_followed(
    args: argparse.Namespace, calibration: Calibration | None, shape: ModelShape
) -> Calibration | None:
    """The calibration whose path the lessons follow; None where they follow none.

    Raises:
        RunError: there is none, or it leaves nothing out.
        CapacityError: it does not go down to `--min-capacity`.
    """
    if args.lessons != "calibrated":
        return None
    if calibration is None or not any(calibration.paths.values()):
        raise RunError(f"--start {args.start}: not calibrated; run python -m training calibrate")
    for phase in (phase for phase in Phase if calibration.paths[phase]):
        calibration.schedule(args.min_capacity, phase, shape, args.window)
    return calibration


def _options_of(spec: AdapterSpec) -> dict[str, Any]:
    """An adapter's shape as the options that ask for it."""
    options: dict[str, Any] = {
        "units": spec.units,
        "token_gate": spec.token_gate,
        "part_gate": spec.part_gate,
        "kv": spec.kv,
        "lora_rank": spec.lora_rank,
    }
    if spec.experts:
        options |= {"experts": spec.experts, "expert_split": spec.expert_split}
    if spec.lora_rank:
        options |= {"lora_modules": ",".join(spec.lora_parts), "lora_phases": spec.lora_phases}
    if Unit.IMAGE_TOKENS in spec.units:
        options |= {"image_scorer": spec.image_scorer, "image_spread": spec.image_spread}
    return options
