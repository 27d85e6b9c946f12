"""What an elastic encoder still knows of an image, drawn by a masked autoencoder's own decoder.

    python -m training reconstruct --base BASE --adapter DIR --data DATA --out DIR

BASE is a masked autoencoder (ViTMAEForPreTraining). Part of each image's patches is shown to its
encoder, at every capacity; the decoder, which is never routed, draws the others. Measured are the
cosine of every token to the full encoder's, also where the whole image is shown, and by how much
hidden pixels are missed. Writes report.json, report.md and reconstructions.png into --out.

Shape letters: B images   T tokens   P patches   D width   X numbers of a patch
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTMAEForPreTraining

from elastiformer import AdapterError, Capacity
from elastiformer.encoder import Batch, ElasticEncoder
from elastiformer.sequence import Chunk, Item
from elastiformer.weights import as_base_model_error, resolve
from training.calibrate import capacities
from training.encoder_calibrate import some
from training.examples import read_examples
from training.files import RunError, write_atomically, write_json
from training.options import real, whole
from training.overlap import item_grid
from training.pictures import draw_images
from training.progress import track
from training.reports import table

ITEMS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Drawn:
    """One capacity over a set of images of which a share of the patches is shown."""

    seen: float
    capacity: float
    spent: float  # the mean over images
    cosine: float  # of a token to the full encoder's, the mean over all tokens
    cosine_least: float  # the same of the worst image
    squares: float | None  # by which hidden pixels are missed, in the mean; None if all are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of a ViTMAEForPreTraining")
    add("--adapter", type=Path, required=True, help="its calibrated adapter")
    add("--data", required=True, help="images that no training saw")
    add("--out", type=Path, required=True, help="folder of the report")
    add("--capacities", type=capacities, default=capacities("1.0,0.8,0.65,0.5"))
    add(
        "--seen",
        type=real(above=0, below=1),
        help="share of the patches that the encoder sees (default: as the base was trained)",
    )
    add("--items", type=whole(1), default=256, help="images to measure on")
    add("--shown", type=whole(1), default=6, help="of them in the picture")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, draw and write.

    Raises:
        RunError, AdapterError, DataError, BaseModelError: see their messages.
    """
    started = time.monotonic()
    model = ElasticEncoder.load(args.base, dtype="float32", device=args.device)
    if not model.encoder.hides_patches:
        raise RunError(f"--base {args.base}: not a masked autoencoder; nothing could be drawn")
    model.attach_saved(args.adapter)
    if model.calibration is None or model.adapter is None:
        raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
    with as_base_model_error(args.base):
        path = resolve(args.base).path
        whole_base: Any = ViTMAEForPreTraining.from_pretrained(path, dtype=torch.float32)
    painter = Painter(whole_base.eval().to(model.device))
    share = args.seen if args.seen is not None else 1 - model.config.mask_ratio
    examples = some(read_examples(args.data, model), args.items)
    served = [each for each in args.capacities if each >= model.lowest - 1e-9]
    rows: list[Drawn] = []
    pictures: dict[str, list[Tensor]] = {}
    for seen in (share, 1.0):
        shown = examples if seen == 1.0 else examples.shown(seen, model)
        items = shown.items(range(len(shown.each)))
        for capacity in track(served, label=f"{seen:.0%} of the patches shown"):
            rows.append(measured(model, painter, items, seen, capacity))
            if seen < 1:
                pictures[f"{capacity:g}: {rows[-1].cosine:.3f}"] = painted(
                    model, painter, items[: args.shown], capacity
                )
        if seen < 1:
            batch = model.collate(items[: args.shown])
            before = {
                "image": list(batch.inputs["pixel_values"].cpu()),
                "shown": list(painter.hidden_from(batch).cpu()),
            }
            pictures = before | pictures
    args.out.mkdir(parents=True, exist_ok=True)
    draw_images(args.out / "reconstructions.png", pictures)
    spec = model.adapter.spec
    report: dict[str, Any] = {
        "base": Path(args.base).name,
        "adapter": model.adapter.identity,
        "units": [unit.value for unit in spec.units],
        "lora_rank": spec.lora_rank,
        "training_steps": model.adapter.training.get("steps"),
        "data": Path(args.data).name,
        "images": len(examples.each),
        "data_sha256": examples.sha256,
        "rows": [asdict(row) for row in rows],
        "refused": [each for each in args.capacities if each not in served],
    }
    write_atomically(args.out / "report.md", _markdown(report, rows).encode())
    write_json(args.out / "report.json", report)
    return {
        "report": str(args.out),
        "cosine": {f"{row.capacity:g}": row.cosine for row in rows if row.seen == 1.0},
        "cosine_masked": {f"{row.capacity:g}": row.cosine for row in rows if row.seen < 1},
        "squares": {f"{row.capacity:g}": row.squares for row in rows if row.seen < 1},
        "seconds": round(time.monotonic() - started, 1),
    }


class Painter:
    """A masked autoencoder's decoder, and what it paints of hidden patches."""

    def __init__(self, base: Any) -> None:
        self.base = base

    @torch.inference_mode()
    def patches(self, last_BTD: Tensor, batch: Batch) -> Tensor:
        """What it makes of an encoder's output: every patch, in the numbers of the pixels."""
        painted_BPX: Tensor = self.base.decoder(last_BTD, places(batch)).logits
        if self.base.config.norm_pix_loss:  # it paints each patch in the patch's own units
            real_BPX = self.base.patchify(batch.inputs["pixel_values"])
            deviation_BP1 = (real_BPX.var(-1, keepdim=True) + 1e-6).sqrt()
            painted_BPX = painted_BPX * deviation_BP1 + real_BPX.mean(-1, keepdim=True)
        return painted_BPX

    def squares(self, painted_BPX: Tensor, batch: Batch) -> Tensor:
        """By how much each image's hidden pixels are missed, [B]; NaN where none is hidden."""
        real_BPX = self.base.patchify(batch.inputs["pixel_values"])
        missed_BP = (painted_BPX - real_BPX).square().mean(-1)
        hidden_BP = hidden(batch)
        missed_B: Tensor = (missed_BP * hidden_BP).sum(1) / hidden_BP.sum(1)
        return missed_B

    def pasted(self, painted_BPX: Tensor, batch: Batch) -> Tensor:
        """Images of what was seen, and of what was painted where it was not."""
        real_BPX = self.base.patchify(batch.inputs["pixel_values"])
        both_BPX = torch.where(hidden(batch)[..., None], painted_BPX, real_BPX)
        images: Tensor = self.base.unpatchify(both_BPX)
        return images

    def hidden_from(self, batch: Batch) -> Tensor:
        """The images as the encoder sees them: what is hidden is not a number."""
        nothing = torch.full_like(self.base.patchify(batch.inputs["pixel_values"]), torch.nan)
        return self.pasted(nothing, batch)


def places(batch: Batch) -> Tensor:
    """For every patch, its place among those that the encoder saw, and then the others, [B, P]."""
    noise_BP: Tensor = batch.inputs["noise"]
    return noise_BP.argsort(stable=True, dim=1).argsort(dim=1)


def hidden(batch: Batch) -> Tensor:
    """Which patches the encoder does not see, bool [B, P]."""
    return places(batch) >= batch.mask_BT.shape[1] - 1


def measured(
    model: ElasticEncoder, painter: Painter, items: Sequence[Item], seen: float, capacity: float
) -> Drawn:
    """What a capacity leaves of these images."""
    cosines: list[Tensor] = []
    squares: list[Tensor] = []
    spent: list[float] = []
    for start in range(0, len(items), ITEMS_AT_ONCE):
        some_items = items[start : start + ITEMS_AT_ONCE]
        batch = model.collate(some_items)
        with torch.inference_mode():
            teacher_BTD, student_BTD = model.teacher(batch), routed(model, some_items, capacity)
            cosines.append(F.cosine_similarity(teacher_BTD, student_BTD, -1).mean(1))
            squares.append(painter.squares(painter.patches(student_BTD, batch), batch))
        sequences = [model.sequence(Capacity(capacity, capacity), item) for item in some_items]
        model.step([Chunk(each, list(each.item.ids)) for each in sequences])
        spent += [each.usage.capacity_spent for each in sequences]
    cosine_N, squares_N = torch.cat(cosines), torch.cat(squares)
    return Drawn(
        seen=seen,
        capacity=capacity,
        spent=sum(spent) / len(spent),
        cosine=float(cosine_N.mean()),
        cosine_least=float(cosine_N.min()),
        squares=float(squares_N.mean()) if seen < 1 else None,
    )


def routed(model: ElasticEncoder, items: Sequence[Item], capacity: float) -> Tensor:
    """The features of every token at a capacity, [B, T, D]."""
    batch = model.collate(items)
    return model.masked(batch, item_grid(model, items, capacity)).outputs


def painted(
    model: ElasticEncoder, painter: Painter, items: Sequence[Item], capacity: float
) -> list[Tensor]:
    """The images as they are drawn at a capacity."""
    batch = model.collate(items)
    with torch.inference_mode():
        last_BTD = routed(model, items, capacity)
        return list(painter.pasted(painter.patches(last_BTD, batch), batch).cpu())


def _markdown(report: Mapping[str, Any], rows: Sequence[Drawn]) -> str:
    steps = report["training_steps"]
    heads = ["patches shown", "capacity", "spent", "cosine", "worst image", "pixels missed by"]
    cells = [
        [
            f"{row.seen:.0%}",
            f"{row.capacity:g}",
            f"{row.spent:.4f}",
            f"{row.cosine:.4f}",
            f"{row.cosine_least:.4f}",
            "" if row.squares is None else f"{row.squares:.4f}",
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "# What an elastic encoder still knows of an image",
            "",
            f"Adapter `{report['adapter']}` ({', '.join(report['units'])}; low-rank repair of rank "
            f"{report['lora_rank']}; {'untrained' if steps is None else f'{steps} steps'}); "
            f"{report['images']} images of {report['data']}.",
            "",
            *table(heads, cells),
            "",
            "Cosine: of each token to the full encoder's, in the mean. Pixels: mean squares, in "
            "units of the images' variance.",
            "",
        ]
    )
