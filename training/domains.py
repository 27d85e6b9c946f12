"""Are routers robust to their training domain? Train them on parts of the data, measure on others.

    python -m training domains --base BASE --data TRAIN.jsonl --test TEST.jsonl --out DIR
                               --domain NAME=LABEL,LABEL --domain NAME=LABEL,LABEL

Routers are trained on each domain alone and on all together, with several seeds, as `distill`
trains them, and measured on the test data of each, beside routers that know nothing. All run
under the same plan, which lowers every layer alike: only what they keep differs. A domain is what
the field --by of a line says: its label, or another field. As much is trained on of each domain
as there is of the smallest; all together hold all of that.

BASE is an encoder, judged by items, or a language model, judged by every token of windows of text.

DIR holds report.json, report.md and domains.png; beside it, DIR.run the adapters. A run that was
stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastiformer import Unit
from elastiformer.tasks import Task
from elastiformer.vlm_weights import is_vlm
from training import distill
from training.calibrate import capacities, check_lowered
from training.domain_data import EVERYTHING, write_domains
from training.domain_report import UNTRAINED, Cell, Overlap, Robustness, write_robustness
from training.encoder_calibrate import task_asked
from training.encoder_evaluate import random_routers
from training.files import RunError, run_beside, same_run
from training.options import command_line, real, refuse_unused, units, whole
from training.overlap import Choice, by_chance, jaccard
from training.progress import track
from training.subjects import FOR_ITEMS, FOR_TEXTS, ItemSubject, Subject, TextSubject

# What may differ when a run goes on.
FREE = {"out", "seeds", "items", "windows", "held_out_window", "capacities", "device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--task", choices=list(Task), help="of an encoder (default: what its config says)")
    add("--data", type=Path, required=True, help=".jsonl to train on")
    add("--test", type=Path, required=True, help=".jsonl of other data, to measure on")
    add("--domain", type=domain, action="append", required=True, help="NAME=VALUE,VALUE; twice")
    add("--by", default="label", help="the field of a line whose values make the domains")
    add("--out", type=Path, required=True, help="folder of the report")
    add("--units", type=units, default="attention_tokens,mlp_tokens", help="that are routed")
    add("--experts", type=whole(2), default=16, help="neighbours that each MLP is divided into")
    add("--lora-rank", type=whole(0), default=0, help="of a repair beside the routers")
    add("--lessons", default="uniform", choices=["mixed", "uniform"], help="as distill has them")
    add("--min-capacity", type=real(above=0, below=1), default=0.3, help="that distill trains")
    add("--capacities", type=capacities, default=capacities("0.8,0.65,0.5"))
    add("--seeds", type=whole(1), default=3, help="of each training")
    add("--steps", type=whole(1), default=200, help="of each training")
    add("--batch-items", type=whole(1), default=32, help="of a step of an encoder")
    add("--batch-tokens", type=whole(1), default=1024, help="of a step of a language model")
    add("--window", type=whole(2), default=256, help="tokens of a row in its training")
    add("--lr", type=real(above=0), default=1e-2, help="the highest learning rate")
    add("--items", type=whole(1), default=500, help="test items of each domain")
    add("--windows", type=whole(1), default=8, help="the same of text")
    add("--held-out-window", type=whole(3), default=192, help="tokens of each")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--device", default="auto")


def domain(text: str) -> tuple[str, tuple[str, ...]]:
    """NAME=VALUE,VALUE."""
    name, equals, values = text.partition("=")
    names = tuple(each.strip() for each in values.split(",") if each.strip())
    if not name.isidentifier() or not equals or not names or name in (EVERYTHING, UNTRAINED):
        raise argparse.ArgumentTypeError(
            f"NAME=VALUE,VALUE, NAME a word and not {EVERYTHING!r} or {UNTRAINED!r}; got {text!r}"
        )
    return name, names


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, measure what is missing, write the report.

    Raises:
        DataError, RunError, BaseModelError: see their messages.
    """
    started = time.monotonic()
    check_lowered("--capacities", args.capacities)
    domains = _disjoint(args.domain)
    if is_vlm(args.base):
        raise RunError(f"{args.base}: an encoder or a language model; it is neither")
    of_text = task_asked(args) is None
    unused, model = (FOR_ITEMS, "a language model") if of_text else (FOR_TEXTS, "an encoder")
    refuse_unused(args, add_arguments, unused, model)
    folder = run_beside(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    same_run(folder / "options.json", vars(args), FREE)
    held = write_domains(args.data, domains, args.by, folder / "train", of_text, alike=True)
    write_domains(args.test, domains, args.by, folder / "test")
    names = [*domains, EVERYTHING]
    runs = list(itertools.product(names, range(args.seeds)))
    tests = {name: folder / "test" / f"{name}.jsonl" for name in domains}
    kind = TextSubject if of_text else ItemSubject
    if any(not _trained(folder, *each).exists() for each in runs):
        kind(args, tests)  # wrong test data is refused now, not after the trainings
    for name, seed in track(runs, label="trainings"):
        if not _train(args, folder, name, seed, of_text):
            return {"finished": False, "run": str(folder)}
    subject = kind(args, tests)
    cells, overlaps = _measured(args, folder, subject, list(domains))
    found = Robustness(
        about=_about(args, subject, domains, held),
        domains=list(domains),
        everything=EVERYTHING,
        cells=cells,
        overlaps=overlaps,
    )
    files = write_robustness(args.out, found)
    return {
        "finished": True,
        "report": str(args.out),
        "files": files,
        "sentence": found.sentence(),
        "seconds": round(time.monotonic() - started, 1),
    }


def _disjoint(given: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    domains = dict(given)
    values = [value for of_domain in domains.values() for value in of_domain]
    if len(domains) < 2 or len(domains) < len(given):
        raise RunError(f"--domain: at least two, each of its own name; got {len(given)}")
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise RunError(f"--domain: {', '.join(twice)}: in two domains, which are disjoint")
    return domains


def _trained(folder: Path, name: str, seed: int) -> Path:
    """The file that a training writes last."""
    return folder / f"{name}-{seed}" / "adapter.json"


def _train(args: argparse.Namespace, folder: Path, name: str, seed: int, of_text: bool) -> bool:
    """Whether routers of this domain and seed are there, by now."""
    adapter = folder / f"{name}-{seed}"
    if _trained(folder, name, seed).exists():
        return True
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    given = {
        "base": args.base,
        "data": folder / "train" / f"{name}.jsonl",
        "out": adapter,
        "units": ",".join(args.units),
        "experts": args.experts,
        "lora-rank": args.lora_rank,
        "steps": args.steps,
        "lr": args.lr,
        "seed": seed,
        "held-out": 0,
        "dtype": args.dtype,
        "checkpoint-every": 50,
        "lessons": args.lessons,
        "min-capacity": args.min_capacity,
        "expert-split": "contiguous",  # so all trainings have the same experts
        **(_of_texts(args) if of_text else {"batch-items": args.batch_items}),
        **({} if args.task is None else {"task": args.task}),
    }
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    print(f"{name}, seed {seed}", file=sys.stderr)
    report = distill.run(parser.parse_args([*words, "--resume"]))
    return report is not None and bool(report["finished"])


def _of_texts(args: argparse.Namespace) -> dict[str, object]:
    return {
        "batch-tokens": args.batch_tokens,
        "window": args.window,
        "probe-windows": 0,
    }


def _measured(
    args: argparse.Namespace, folder: Path, subject: Subject, domains: Sequence[str]
) -> tuple[list[Cell], list[Overlap]]:
    """What every training loses on every domain, and how alike every two of them choose."""
    lowered = [each for each in args.capacities if each < 1]
    runs = list(itertools.product([*domains, EVERYTHING, UNTRAINED], range(args.seeds)))
    cells: list[Cell] = []
    choices: dict[tuple[str, int], dict[float, Choice]] = {}
    for run in track(runs, label="measuring"):
        with _routers(folder, subject, *run):
            choices[run] = {capacity: subject.choice(capacity) for capacity in lowered}
            for at, capacity in itertools.product(domains, lowered):
                loss = subject.loss(at, capacity)
                cells.append(Cell(*run, at, capacity, **asdict(loss)))
    overlaps = []
    for capacity, (one, other) in itertools.product(lowered, itertools.combinations(runs, 2)):
        first, second = choices[one][capacity], choices[other][capacity]
        share = jaccard(first, second)
        overlaps.append(Overlap(*one, *other, capacity, share, by_chance(first)))
    return cells, overlaps


@contextmanager
def _routers(folder: Path, subject: Subject, name: str, seed: int) -> Iterator[None]:
    """The subject with the routers of one training, or with such as know nothing."""
    untrained = name == UNTRAINED
    trained = EVERYTHING if untrained else name
    subject.model.attach_saved(folder / f"{trained}-{seed}")
    with random_routers(subject.model, seed) if untrained else nullcontext():
        subject.level(folder / "train" / f"{trained}.jsonl")
        yield


def _about(
    args: argparse.Namespace,
    subject: Subject,
    domains: Mapping[str, Sequence[str]],
    held: Mapping[str, int],
) -> dict[str, Any]:
    model = subject.model
    return {
        "base": Path(args.base).name,
        "command": command_line("domains", args, add_arguments, {"device"}),
        "identity": asdict(model.identity),
        "task": model.task,
        "by": args.by,
        "domains": {name: list(values) for name, values in domains.items()},
        "trained_on": dict(held),
        "units": [unit.value for unit in args.units],
        "experts": args.experts if Unit.EXPERTS in args.units else None,
        "lora_rank": args.lora_rank,
        "steps": args.steps,
        "lr": args.lr,
        "lessons": args.lessons,
        "min_capacity": args.min_capacity,
        "seeds": args.seeds,
        "dtype": str(model.dtype).removeprefix("torch."),
        **subject.about(),
    }
