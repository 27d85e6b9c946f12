"""The rows of `ablate`: each what the adapter does, but for one decision. Nothing runs here.

Outputs choose channels: rows differ in a `Choice`, or in the shares, from one that gives each token
as many as the adapter grants; so does the adapter itself, which has thresholds. Prompts leave
layers: rows differ in what is left out, whether that is repaired, or how many last tokens run
whole.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from elastiformer.capacity import Plan, Site
from training.allotment import TOKEN_FIELDS, without_layers
from training.channel_choices import (
    EVERYWHERE,
    INPUTS,
    NEURONS,
    Choice,
    Weight,
    block_mean,
    held,
    mean_before,
    running_mean,
    sequence_mean,
    token_before,
)

AS_SHIPPED, AS_MANY_FOR_EACH = "as-shipped", "as-many-for-each"
ENDING_AS_SHIPPED = "ending-as-shipped"
AS_MANY = Choice()
ENDINGS = (0, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class OutputRow:
    """Every token scored: which channels an output keeps."""

    name: str
    decision: str
    says: str
    choice: Choice | None = AS_MANY  # None: by what thresholds the adapter has
    uniform: bool = False  # the same share in every layer and place


@dataclass(frozen=True, slots=True)
class LeavingRow:
    """Prompts leave whole sub-layers out, and the continuation is whole."""

    name: str
    decision: str
    says: str
    first: int  # the layer from which on they leave all,
    kept: tuple[tuple[int, str], ...] = ()  # but these sub-layers
    repaired: bool = True

    def plan(self, layers: int) -> Plan:
        plan = list(without_layers(self.first, layers))
        for layer, name in self.kept:
            plan[layer] = replace(plan[layer], **{name: 1.0})
        return tuple(plan)


@dataclass(frozen=True, slots=True)
class EndingRow:
    """A prompt's last tokens run whole, and those before make up for it."""

    name: str
    decision: str
    says: str
    tokens: int | None  # None: as many as the adapter's prompts have


Row = OutputRow | LeavingRow | EndingRow

OUTPUTS = (
    OutputRow(
        AS_MANY_FOR_EACH, "", "each token its largest by size x column norm, as many as granted"
    ),
    OutputRow(
        AS_SHIPPED, "as shipped", "those above the adapter's thresholds, as many on average", None
    ),
    OutputRow("uniform-shares", "shares", "the same share in every layer and place", uniform=True),
    *(
        OutputRow(name, "a size is weighed by", says, Choice(weight=weight))
        for name, weight, says in (
            ("by-size", Weight.NOTHING, "nothing"),
            ("by-gradient", Weight.GRADIENT, "the root mean square of the loss's gradient"),
        )
    ),
    *(
        OutputRow(name, "whose sizes choose", says, choice)
        for name, says, choice in (
            ("block-mean-4", "mean of its block of 4", Choice(seen=block_mean(4))),
            (
                "block-mean-4-inputs",
                "the same, inputs of query, key and value, of gate and up only",
                Choice(seen=block_mean(4), seen_at=INPUTS),
            ),
            (
                "block-mean-4-neurons",
                "the same, the neurons that down reads only",
                Choice(seen=block_mean(4), seen_at=NEURONS),
            ),
            ("block-mean-16", "mean of its block of 16", Choice(seen=block_mean(16))),
            ("sequence-mean", "mean of the sequence", Choice(seen=sequence_mean)),
            ("token-before", "those of the token before", Choice(seen=token_before)),
            ("held-2", "its own at every second token, held for one more", Choice(seen=held(2))),
            ("held-4", "its own at every fourth, held for three more", Choice(seen=held(4))),
            ("mean-before", "mean of all tokens before", Choice(seen=mean_before)),
            (
                "running-mean",
                "running mean of those before, a quarter of each new",
                Choice(seen=running_mean(0.25)),
            ),
        )
    ),
    *(
        OutputRow(
            f"threshold-{where}", "one threshold for all tokens", says, Choice(threshold_at=at)
        )
        for where, says, at in (
            ("everywhere", "everywhere, of the very text", EVERYWHERE),
            ("inputs", "inputs of query, key and value, of gate and up", INPUTS),
            ("neurons", "the neurons that down reads", NEURONS),
        )
    ),
    *(
        OutputRow(name, "what is left out counts as", says, choice)
        for name, says, choice in (
            (
                "constant-attention-out",
                "its mean, at the attention's output",
                Choice(constant_at=frozenset({Site.ATTENTION_OUT})),
            ),
            ("constant", "its mean, everywhere", Choice(constant_at=EVERYWHERE)),
            (
                "constant-nearest",
                "its mean, everywhere, and what is nearest to it is left out",
                Choice(constant_at=EVERYWHERE, by_nearness=True),
            ),
        )
    ),
    *(
        OutputRow(
            f"up-{share:g}",
            "more inputs, up for fewer neurons",
            f"for {share:g} of them, those of the largest gate",
            Choice(up_share=share),
        )
        for share in (0.9, 0.8, 0.7)
    ),
    OutputRow(
        "threshold-up-0.8",
        "more inputs, up for fewer neurons",
        "for 0.8 of them, and one threshold for all tokens everywhere",
        Choice(threshold_at=EVERYWHERE, up_share=0.8),
    ),
)

ENDS = (
    EndingRow(ENDING_AS_SHIPPED, "last tokens whole", "as shipped", None),
    *(
        EndingRow(f"ending-{tokens}", "last tokens whole", str(tokens), tokens)
        for tokens in ENDINGS
    ),
)


def rows_of(leave_at: Sequence[int], keep: Iterable[str]) -> dict[str, Row]:
    """All rows by name.

    Args:
        leave_at: layers from which on prompts leave all.
        keep: as `kept` reads it, what they keep leaving from the first of these on.
    """
    rows: list[Row] = [*OUTPUTS, *ENDS]
    for layer in leave_at:
        for repaired in (False, True):
            rows.append(
                LeavingRow(
                    f"leave-{layer}" + ("" if repaired else "-unrepaired"),
                    f"leaving from layer {layer} on",
                    "the adapter's repair" if repaired else "no repair",
                    layer,
                    repaired=repaired,
                )
            )
    for text in keep:
        rows.append(
            LeavingRow(
                f"keep-{text.replace(':', '-')}",
                f"leaving from layer {leave_at[0]} on, but",
                _says(text),
                leave_at[0],
                tuple(kept(text)),
            )
        )
    return {row.name: row for row in rows}


def kept(text: str) -> Iterator[tuple[int, str]]:
    """The sub-layers that `17`, `16+17`, `attention:13-17` or `mlp:17` names.

    Raises:
        ArgumentTypeError: it names none.
    """
    part, _, layers = text.rpartition(":")
    fields = {"": TOKEN_FIELDS, "attention": TOKEN_FIELDS[:1], "mlp": TOKEN_FIELDS[1:]}
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", each) for each in layers.split("+")]
    if part not in fields or None in ranges:
        raise argparse.ArgumentTypeError(
            f"layers as in 17, 16+17, attention:13-17 or mlp:17; got {text!r}"
        )
    for found in filter(None, ranges):
        first, last = found.groups()
        for layer in range(int(first), int(last or first) + 1):
            for name in fields[part]:
                yield layer, name


def _says(text: str) -> str:
    part, _, layers = text.rpartition(":")
    named = f"layer{'' if layers.isdecimal() else 's'} {layers.replace('+', ', ')}"
    return f"the {part} of {named}" if part else named
