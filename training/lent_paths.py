"""What a language model's adapter knows of its layers, lent to the model of images made of it.

A vision-language model's layers are those of a language model, of which an adapter says in what
order their units are given up, and its notes what was probed for that (sensitivity.py). Here that
order is kept, and goes on from where it ended, as far as a lower capacity asks. Nothing is probed:
what comes of it is measured on text, which has no image tokens to give up.

Shape letters: W windows   T tokens
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from elastiformer import Calibration, Phase
from elastiformer.accounting import ModelShape
from elastiformer.calibration import Measured, Step, unit_of, walk
from elastiformer.vlm import ElasticVlm
from training.allotment import TOKEN_FIELDS, Allotment, fields_of, late_layers
from training.channel_sizes import channel_quantiles
from training.data import check_window, read_corpus, tokenizer_of, two_sets
from training.encoder_calibrate import kept_calibration
from training.files import DataError
from training.path_search import Paths, lowest, trimmed
from training.quality import Setting, Window, measure, miss, prompt_share, windows_of
from training.sensitivity import Probe, curves, late_losses, remembered

NOTES = "sensitivity.jsonl"


@dataclass(frozen=True, slots=True)
class TextRow:
    """What one capacity loses on text, and by how much the worst text missed it."""

    kl: float  # prompt and continuation routed, in nats per token
    kl_scored: float
    perplexity_ratio: float
    missed: float

    def measured(self, row: Measured) -> Measured:
        """The same row of the table with what text loses."""
        return replace(
            row,
            kl_text=self.kl,
            kl_scored=self.kl_scored,
            perplexity_ratio=self.perplexity_ratio,
        )


def text_row(model: ElasticVlm, windows: Sequence[Window], capacity: float) -> TextRow:
    """What a capacity loses on text."""
    both, scored = (
        measure(model, windows, capacity, setting) for setting in (Setting.BOTH, Setting.SCORED)
    )
    tokens = len(windows[0].ids_T)
    prompt = prompt_share(model, tokens)
    whole = 1 - (1 - prompt) * (windows[0].prompt_tokens - 1) / tokens
    missed = max(
        miss(capacity, both.spent_least, both.spent_most, whole, prompt),
        miss(capacity, scored.spent_least, scored.spent_most, 1.0, prompt),
    )
    return TextRow(both.kl, scored.kl, scored.perplexity_ratio, missed)


def beside_text(row: Measured, earlier: Measured | None) -> Measured:
    """The same row of the table with what an earlier one says of text."""
    if earlier is None:
        return row
    return replace(
        row,
        kl_text=earlier.kl_text,
        kl_scored=earlier.kl_scored,
        perplexity_ratio=earlier.perplexity_ratio,
    )


class LentPaths:
    """One calibration of layers along another adapter's paths.

    Raises:
        AdapterError, DataError: there are no such paths, no text, or too little of it.
    """

    def __init__(self, model: ElasticVlm, args: argparse.Namespace) -> None:
        if args.text is None or args.keep_paths is None:
            raise DataError(
                "--keep-paths and --text: of a vision-language model's layers, the one says in "
                "what order they give and the other on what that is measured; got one alone"
            )
        kept = kept_calibration(args, model)
        assert kept is not None, "asked for above"
        answers = remembered(Path(args.keep_paths or args.adapter) / NOTES)
        self._model, self._args = model, args
        self._paths: Paths = {
            phase: continued(kept.paths[phase], phase, answers, model.shape, args.window)
            for phase in Phase
        }
        self.prompt_tokens = args.prompt_tokens or args.window * 2 // 3
        if not 2 <= self.prompt_tokens < args.window:
            raise DataError(f"--prompt-tokens: from 2 to below --window; got {self.prompt_tokens}")
        check_window("--window", args.window, model.context)
        corpus = read_corpus(args.text, tokenizer_of(model))
        self._probe_WT, check_WT = two_sets(
            corpus, tokenizer_of(model), args.window, args.windows, args.check_windows, args.seed
        )
        self._check_WT: Tensor = check_WT

    def lowest(self, capacities: Sequence[float]) -> float:
        """The lowest of the capacities that text of every length can be run at."""
        return lowest(self._paths, self._model.shape, self._model.context, capacities)

    def calibrated(self, draft: Calibration) -> Calibration:
        """This calibration with the paths, down to its lowest capacity, and channels' sizes."""
        shape, lengths = self._model.shape, (1, draft.context, self._model.context)
        paths = {
            phase: trimmed(path, shape, draft.lowest, lengths)
            for phase, path in self._paths.items()
        }
        draft = replace(draft, paths=paths)
        return replace(
            draft, channel_quantiles=channel_quantiles(self._model, draft, self._probe_WT)
        )

    def windows(self) -> list[Window]:
        return windows_of(self._model, self._check_WT, self.prompt_tokens)

    def row(self, windows: Sequence[Window], capacity: float) -> TextRow:
        """What a capacity loses on text."""
        return text_row(self._model, windows, capacity)


def continued(
    path: Sequence[Step],
    phase: Phase,
    answers: Mapping[Probe, float],
    shape: ModelShape,
    context: int,
) -> tuple[Step, ...]:
    """A path that goes on from its end until one layer is left, by what probes said of the rest.

    Where they said nothing, whole layers follow, the last one first.
    """
    layers = len(shape.layers)
    fields = fields_of(sorted({unit_of(step.field) for step in path if step.share > 0}))
    found = list(path)
    if fields:
        known = curves(dict(answers), phase, layers)
        late = late_losses(dict(answers)) if phase is Phase.PROMPT else None
        found += Allotment(shape, context, known, fields, late=late).path(after=path)
    *_, plan = walk(found, layers)
    found += [
        step
        for step in late_layers(layers)
        if step.field in TOKEN_FIELDS and getattr(plan[step.layer], step.field) > 0
    ]
    return tuple(found)
