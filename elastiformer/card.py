"""An adapter's README.md: what it is for, how it was made, and what was measured. Pure Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from elastiformer.calibration import Calibration, Measured
from elastiformer.tasks import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION

_HEADINGS = {
    "capacity": "capacity",
    "spent": "spent",
    "kl": "KL, prompt and continuation routed",
    "kl_prompt": "KL, prompt routed only",
    "kl_text": "KL of text, prompt and continuation routed",
    "kl_scored": "KL, every token scored",
    "kl_p95": "95th percentile of KL",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity / full",
    "greedy_agreement": "greedy tokens agreeing",
    "prefill_time_ratio": "prefill time / full",
    "decode_time_ratio": "decode time / full",
    "cosine": "cosine to the full model's features",
    "same_label": "same label as full",
    "accuracy": "accuracy",
    "time_ratio": "time / full, 16 at once",
}
# What the same columns hold of models that do not only go on with a text.
_OF_ANSWERS = {"kl": "KL of answers", "greedy_agreement": "same answer as full"}
_OF_ITEMS = {"kl": "KL to the full model"}


def model_card(header: Mapping[str, Any], calibration: Calibration | None) -> str:
    """Markdown, from adapter.json's content and the calibration's measured rows."""
    base = header["base"]
    lines = [
        f"# An elastic adapter for {base['id']}",
        "",
        "Routers that let the frozen base model leave out part of its compute, each request with",
        "its own capacity. Capacity 1.0 is the base model itself.",
        "",
        f"- Base: `{base['id']}`, revision `{base['revision']}`, config `{base['config_hash']}`",
        f"- Task: {header['task']}",
        f"- Units: {', '.join(header['units'])}",
        f"- Keys and values of tokens that skip attention: {header['kv']}",
    ]
    if spread := header.get("image_spread"):
        lines.append(f"- Image tokens are kept by score and by place: spread {spread:g}")
    if lora := header["lora"]:
        lines.append(
            f"- LoRA: rank {lora['rank']} on {', '.join(lora['parts'])} from layer "
            f"{lora.get('first_layer', 0)} on; phases: {lora['phases']}"
        )
    if calibration is not None and calibration.measured:
        writes = header["task"] in (TEXT_GENERATION, IMAGE_TEXT_TO_TEXT)
        things = "windows of" if header["task"] == TEXT_GENERATION else "items of about"
        lines += ["", "## Measured on data held out", ""]
        lines += measured_table(calibration, header["task"])
        if calibration.data is not None:
            data = calibration.data
            lines += [
                "",
                f"{data.windows} {things} {data.window_tokens} tokens of {data.name} "
                f"(sha256 {data.sha256[:16]}). KL to the base model in nats per "
                f"{'token' if writes else 'item'}.",
            ]
    if header["training"]:
        record = json.dumps(header["training"], indent=1)
        lines += ["", "## Training record", "", "```json", record, "```"]
    return "\n".join(lines) + "\n"


def measured_table(calibration: Calibration, task: str) -> list[str]:
    """The measured rows as a Markdown table; a column that no row fills is left out."""
    rows = calibration.measured
    special = {TEXT_GENERATION: {}, IMAGE_TEXT_TO_TEXT: _OF_ANSWERS}.get(task, _OF_ITEMS)
    headings = {**_HEADINGS, **special}
    names = [f.name for f in fields(Measured) if any(getattr(r, f.name) is not None for r in rows)]
    lines = [
        "| " + " | ".join(headings[name] for name in names) + " |",
        "|" + "---|" * len(names),
    ]
    for row in rows:
        values = [getattr(row, name) for name in names]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
