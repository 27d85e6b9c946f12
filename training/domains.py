"""Are routers robust to their training domain? Train them on parts of the data, measure on others.

    python -m training domains --base BASE --data TRAIN.jsonl --test TEST.jsonl --out DIR
                               --domain NAME=LABEL,LABEL --domain NAME=LABEL,LABEL

Routers are trained on each domain alone and on all together, with several seeds, as `distill`
trains them, and measured on the test items of each, beside routers that know nothing. All run
under the same plan, which lowers every layer alike: only what they keep differs. A domain is what
the field --by of a line says: its label, or another field.

DIR holds report.json, report.md and domains.png; beside it, DIR.run the adapters and what was
measured so far. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastiformer.encoder import ElasticEncoder
from elastiformer.sequence import Item
from elastiformer.tasks import Task
from training import distill
from training.calibrate import capacities
from training.domain_report import UNTRAINED, Cell, Overlap, Robustness, write_robustness
from training.encoder_calibrate import labels_of, recalibrate, some, uniform_calibration
from training.encoder_evaluate import random_routers
from training.encoder_quality import Judged, measure_items
from training.examples import Examples, read_examples
from training.files import DataError, RunError, same_run, write_atomically
from training.options import real, units, whole
from training.overlap import Choice, by_chance, choice_of, jaccard
from training.progress import track

EVERYTHING = "all"
FREE = {"out", "seeds", "items", "capacities", "device"}  # what may differ when a run goes on
OVERLAP_ITEMS = 64  # of each domain, on which the kept tokens are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="an encoder: folder, Hub id or embedded name")
    add("--task", choices=list(Task), help="of the encoder (default: what its config says)")
    add("--data", type=Path, required=True, help=".jsonl to train on")
    add("--test", type=Path, required=True, help=".jsonl of other items, to measure on")
    add("--domain", type=domain, action="append", required=True, help="NAME=VALUE,VALUE; twice")
    add("--by", default="label", help="the field of a line whose values make the domains")
    add("--out", type=Path, required=True, help="folder of the report")
    add("--units", type=units, default="attention_tokens,mlp_tokens", help="that are routed")
    add("--lora-rank", type=whole(0), default=0, help="of a repair beside the routers")
    add("--capacities", type=capacities, default=capacities("0.8,0.65,0.5"))
    add("--seeds", type=whole(1), default=3, help="of each training")
    add("--steps", type=whole(1), default=200, help="of each training")
    add("--batch-items", type=whole(1), default=32, help="of a step")
    add("--lr", type=real(above=0), default=1e-2, help="the highest learning rate")
    add("--items", type=whole(1), default=500, help="test items of each domain")
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
    domains = _disjoint(args.domain)
    folder = args.out.with_name(args.out.name + ".run")
    folder.mkdir(parents=True, exist_ok=True)
    same_run(folder / "options.json", vars(args), FREE)
    for part, source in (("train", args.data), ("test", args.test)):
        write_domains(source, domains, args.by, folder / part)
    names = [*domains, EVERYTHING]
    runs = list(itertools.product(names, range(args.seeds)))
    for name, seed in track(runs, label="trainings"):
        if not _train(args, folder, name, seed):
            return {"finished": False, "run": str(folder)}
    model = ElasticEncoder.load(args.base, dtype=args.dtype, device=args.device, task=args.task)
    tests = {
        name: some(read_examples(str(folder / "test" / f"{name}.jsonl"), model), args.items)
        for name in domains
    }
    trained = _Trained(args, folder, model, tests)
    found = Robustness(
        about=_about(args, model, domains, tests),
        domains=list(domains),
        everything=EVERYTHING,
        cells=trained.cells(),
        overlaps=trained.overlaps(),
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


def write_domains(
    source: Path, domains: Mapping[str, Sequence[str]], by: str, folder: Path
) -> dict[str, int]:
    """One file for each domain, and one for all of them; how many lines each has.

    Raises:
        DataError: naming the file, and the line or the domain at fault.
    """
    where = {value: name for name, values in domains.items() for value in values}
    lines: dict[str, list[str]] = {name: [] for name in (*domains, EVERYTHING)}
    try:
        written = source.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    for number, line in enumerate(written, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(record, dict) or by not in record:
            raise DataError(f'{source}, line {number}: an object with "{by}"')
        if (name := where.get(str(record[by]))) is not None:
            image = record.get("image")
            if isinstance(image, str) and not image.startswith("data:"):
                line = json.dumps(record | {"image": str((source.parent / image).resolve())})
            lines[name].append(line)
            lines[EVERYTHING].append(line)
    if empty := [name for name, of_domain in lines.items() if len(of_domain) < 2]:
        known = ", ".join(values for name in empty for values in domains.get(name, ()))
        raise DataError(f"{source}: fewer than 2 lines of {empty[0]} ({by}: {known})")
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_domain in lines.items():
        write_atomically(folder / f"{name}.jsonl", "\n".join([*of_domain, ""]).encode())
    return {name: len(of_domain) for name, of_domain in lines.items()}


def _train(args: argparse.Namespace, folder: Path, name: str, seed: int) -> bool:
    """Whether routers of this domain and seed are there, by now."""
    adapter = folder / f"{name}-{seed}"
    if (adapter / "adapter.json").exists():
        return True
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    given = {
        "base": args.base,
        "data": folder / "train" / f"{name}.jsonl",
        "out": adapter,
        "units": ",".join(args.units),
        "lora-rank": args.lora_rank,
        "steps": args.steps,
        "batch-items": args.batch_items,
        "lr": args.lr,
        "seed": seed,
        "held-out": 0,
        "dtype": args.dtype,
        "checkpoint-every": 50,
        **({} if args.task is None else {"task": args.task}),
    }
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    print(f"{name}, seed {seed}", file=sys.stderr)
    report = distill.run(parser.parse_args([*words, "--resume"]))
    return report is not None and bool(report["finished"])


class _Trained:
    """All trainings of a run, and the items that they are measured on."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        model: ElasticEncoder,
        tests: Mapping[str, Examples],
    ) -> None:
        self._folder, self._model, self._tests = folder, model, tests
        self._capacities = [each for each in args.capacities if each < 1]
        names = [*tests, EVERYTHING, UNTRAINED]
        self._runs = list(itertools.product(names, range(args.seeds)))
        few = self._items(OVERLAP_ITEMS)
        self._context = round(sum(len(item.ids) for item in few) / len(few))

    @contextmanager
    def _routers(self, name: str, seed: int) -> Iterator[None]:
        """The model with the routers of one training, all layers lowered alike."""
        untrained = name == UNTRAINED
        self._model.attach_saved(self._folder / f"{EVERYTHING if untrained else name}-{seed}")
        recalibrate(self._model, uniform_calibration(self._model, self._context))
        if untrained:
            with random_routers(self._model, seed):
                yield
        else:
            yield

    def _items(self, of_each: int) -> list[Item]:
        """The first items of every domain."""
        parts = self._tests.values()
        return [item for part in parts for item in part.items(range(min(of_each, len(part.each))))]

    def cells(self) -> list[Cell]:
        """What every training loses on every domain."""
        given = {
            name: Judged.of(self._model, test.items(range(len(test.each))), labels_of(test))
            for name, test in self._tests.items()
        }
        cells = []
        for name, seed in track(self._runs, label="measuring"):
            with self._routers(name, seed):
                for at, capacity in itertools.product(given, self._capacities):
                    row = measure_items(self._model, given[at], capacity)
                    found = (row.distance, row.same_label, row.accuracy, row.spent)
                    cells.append(Cell(name, seed, at, capacity, *found))
        return cells

    def overlaps(self) -> list[Overlap]:
        """How alike every two trainings choose."""
        items, found = self._items(OVERLAP_ITEMS), []
        for capacity in self._capacities:
            choices: dict[tuple[str, int], Choice] = {}
            for name, seed in track(self._runs, label=f"what is kept at {capacity:g}"):
                with self._routers(name, seed):
                    choices[name, seed] = choice_of(self._model, items, capacity)
            for one, other in itertools.combinations(self._runs, 2):
                share = jaccard(choices[one], choices[other])
                found.append(Overlap(*one, *other, capacity, share, by_chance(choices[one])))
        return found


def _about(
    args: argparse.Namespace,
    model: ElasticEncoder,
    domains: Mapping[str, Sequence[str]],
    tests: Mapping[str, Examples],
) -> dict[str, Any]:
    return {
        "base": args.base,
        "identity": asdict(model.identity),
        "task": model.task,
        "by": args.by,
        "domains": {name: list(values) for name, values in domains.items()},
        "units": [unit.value for unit in args.units],
        "lora_rank": args.lora_rank,
        "steps": args.steps,
        "batch_items": args.batch_items,
        "lr": args.lr,
        "seeds": args.seeds,
        "items": {name: len(test.each) for name, test in tests.items()},
        "test_sha256": {name: test.sha256 for name, test in tests.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
