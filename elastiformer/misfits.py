"""What of a saved adapter does not fit a base model: every misfit, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from elastiformer.weights import BaseIdentity, comes_along


def base_misfits(saved: BaseIdentity, base: BaseIdentity) -> list[str]:
    misfits = []
    # A folder's name is its owner's whim: there, equal weights are enough.
    both_folders = not any("/" in each.id or comes_along(each.id) for each in (saved, base))
    if saved.id != base.id and not (both_folders and saved.revision == base.revision):
        misfits.append(f"base model: saved for {saved.id}, this is {base.id}")
    if saved.revision != base.revision:
        misfits.append(f"revision: saved {saved.revision}, this model has {base.revision}")
    if saved.config_hash != base.config_hash:
        misfits.append(f"config hash: saved {saved.config_hash}, this model has {base.config_hash}")
    return misfits


def shape_misfits(
    saved: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    misfits = []
    for name, shape in expected.items():
        if name not in saved:
            misfits.append(f"{name}: missing")
        elif tuple(saved[name].shape) != shape:
            misfits.append(f"{name}: saved {tuple(saved[name].shape)}, this model has {shape}")
        elif not bool(torch.isfinite(saved[name].float()).all()):
            misfits.append(f"{name}: holds a number that is not finite")
    misfits += [f"{name}: not a tensor of this model" for name in saved if name not in expected]
    return misfits


def order_misfits(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name}: not an order of the neurons, each once"
        for name, order_I in tensors.items()
        if name.endswith("neuron_order")
        and not torch.equal(order_I.long().sort().values, torch.arange(len(order_I)))
    ]


def misfit_message(misfits: list[str]) -> str:
    return "adapter does not fit this base model:\n  " + "\n  ".join(_by_layer(misfits))


def _by_layer(misfits: list[str]) -> list[str]:
    """The same, with what is amiss in the same way in several layers on one line."""
    alike: dict[tuple[str, str], list[int]] = {}
    for text in misfits:
        found = re.match(r"(lora \w+: |layers\.)(\d+)(\..*)", text)
        if found is None:
            alike[text, ""] = []
        else:
            alike.setdefault((found[1], found[3]), []).append(int(found[2]))
    return [
        before + _ranges(layers) + after if layers else before
        for (before, after), layers in alike.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """`{0-3,7}`, or the only number there is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
