"""An adapter's recipe with several seeds: how far apart lies what it gives, and what others give.

    python -m training seeds --base BASE --adapter DIR --data DATA --held-out DATA --test DATA
                             --work DIR --out REPORT_DIR

For each seed: `repair` on texts of --data, `calibrate` on texts of --held-out, `evaluate` on the
same texts of --test, beside baselines whose seed it is as well. One of these is the paper's recipe,
trained: routers of all its units together with rank-1 LoRA, the same keep share in every layer,
`distill` on as many tokens of --data as the repair was fitted to. A seed chooses texts, and what is
left to chance. What each step left in --work is taken up again, so a run that was stopped goes on
where it was. Writes seeds.json, seeds.md and seeds.png into --out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from elastiformer import ElasticModel, Unit
from training import calibrate, distill, evaluate, repair
from training.baselines import RANDOM
from training.data import read_corpus, some_windows, tokenizer_of, two_sets
from training.files import DataError, write_atomically, write_json
from training.options import real, whole
from training.pictures import draw_spread
from training.quality import Setting
from training.reports import TITLES, table
from training.summarize import OURS, Json, read, sets

SETTINGS = (Setting.BOTH, Setting.SCORED)
RECIPE = "paper's recipe, trained"
# All units of the paper's; part weights with a mean of 1 lose least of its gates (`recipe`).
RECIPE_OPTIONS = {
    "units": "attention_tokens,mlp_tokens,heads,experts",
    "lessons": "uniform",
    "lora_rank": 1,
    "part_gate": "mean",
    "lr": 2e-3,
    "held_out": 0,
    "probe_windows": 0,
}
SHARES_GRID = 20  # keep shares are twentieths, as of uniform paths


@dataclass(frozen=True, slots=True)
class Row:
    """What one thing lost at one capacity in one setting, seed by seed; KL in nats per token."""

    what: str
    capacity: float
    setting: Setting
    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.kl)

    @property
    def deviation(self) -> float | None:
        """Of one seed from another; None of one alone."""
        return stdev(self.kl) if len(self.kl) > 1 else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--adapter", required=True, help="whose routers and units every seed has")
    add("--data", required=True, help="text to fit to")
    add("--held-out", required=True, help="text to calibrate on")
    add("--test", required=True, help="text to measure on")
    add("--work", required=True, type=Path, help="folder of what each seed makes")
    add("--out", required=True, type=Path, help="folder of the report")
    add("--seeds", type=seeds, default=[0, 1, 2], help="comma-separated")
    add("--capacities", type=calibrate.capacities, default=calibrate.capacities("0.65"))
    add("--windows", type=whole(1), default=12, help="texts to measure on")
    add("--window", type=whole(3), default=192, help="tokens of each, and of those calibrated on")
    add("--prompt-units", default="none", help="that prompts may lower, as `calibrate` takes it")
    add("--output-units", default="channels", help="the same of outputs")
    add("--calibrate-windows", type=whole(1), default=3, help="texts that probes run on")
    add("--check-windows", type=whole(1), default=4, help="texts that a calibration is checked on")
    add("--probes", type=whole(1), help="of each calibration and phase (default: all there are)")
    add("--max-minutes", type=real(above=0), default=math.inf, help="of each calibration")
    add("--repair-windows", type=whole(1), default=64, help="texts to fit to")
    add("--repair-window", type=whole(2), default=256, help="tokens of each")
    add("--lora-rank", type=whole(1), default=64, help="of the repair and of maps in baselines")
    add("--experts", type=whole(2), default=16, help="blocks of an MLP, of the paper's recipe")
    add("--dtype", default="float32")
    add("--device", default="auto")


def seeds(text: str) -> list[int]:
    """Comma-separated whole numbers, each once."""
    return list(dict.fromkeys(whole(0)(part) for part in text.split(",")))


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    check(args)
    reports: list[Json] = []
    for seed in args.seeds:
        report = _one_seed(args, seed)
        if report is None:
            return {"finished": False, "work": str(args.work)}
        reports.append(report)
    rows = rows_of(reports)
    args.out.mkdir(parents=True, exist_ok=True)
    about = _about(args, reports)
    draw_spread(
        args.out / "seeds.png",
        {
            f"{TITLES[setting]}, capacity {capacity:g}": {
                row.what: row.kl
                for row in rows
                if (row.setting, row.capacity) == (setting, capacity)
            }
            for setting in SETTINGS
            for capacity in dict.fromkeys(row.capacity for row in rows)
        },
        x="KL to the full model, nats per token",
    )
    write_atomically(args.out / "seeds.md", markdown(about, rows).encode())
    write_json(args.out / "seeds.json", about | {"rows": [_as_json(row) for row in rows]})
    seconds = round(time.monotonic() - started, 1)
    return about | {"finished": True, "out": str(args.out), "seconds": seconds}


def check(args: argparse.Namespace) -> None:
    """Refuse now what a later step would refuse after long work.

    Raises:
        DataError, AdapterError: too little text, or a value that does not fit the base.
    """
    calibrate.check_lowered("--capacities", args.capacities)
    model = ElasticModel.load(args.base, dtype=args.dtype, device=args.device)
    model.blank_adapter([Unit.EXPERTS], experts=args.experts, expert_split="contiguous")
    tokenizer = tokenizer_of(model)
    texts = args.calibrate_windows, args.check_windows
    two_sets(read_corpus(args.held_out, tokenizer), tokenizer, args.window, *texts, seed=0)
    some_windows(args.test, tokenizer, args.windows, args.window, seed=0)
    fitted = args.repair_windows + evaluate.PROBE_WINDOWS
    some_windows(args.data, tokenizer, fitted, args.repair_window, seed=0)


def _one_seed(args: argparse.Namespace, seed: int) -> Json | None:
    """The report of one seed, made as far as it is not there yet; None when told to stop."""
    folder = args.work / f"seed-{seed}"
    adapter, report = folder / "adapter", folder / "report"
    common = {"base": args.base, "dtype": args.dtype, "device": args.device}
    fitted = {"repair_windows": args.repair_windows, "repair_window": args.repair_window}
    if not (adapter / "adapter.json").exists():
        call(
            repair,
            **common,
            adapter=args.adapter,
            data=args.data,
            out=adapter,
            windows=args.repair_windows,
            window=args.repair_window,
            lora_rank=args.lora_rank,
            seed=seed,
        )
    if not (adapter / "calibration.json").exists():
        call(
            calibrate,
            **common,
            **_calibrated(args),
            adapter=adapter,
            prompt_units=args.prompt_units,
            output_units=args.output_units,
            **({} if math.isinf(args.max_minutes) else {"max_minutes": args.max_minutes}),
            **({} if args.probes is None else {"probes": args.probes}),
            seed=seed,
        )
    if not (report / "report.json").exists():
        call(
            evaluate,
            **common,
            **_measured(args),
            **fitted,
            adapter=adapter,
            out=report,
            baselines=RANDOM,
            baseline_seed=seed,
            repair_data=args.data,
            skip_rank=args.lora_rank,
        )
    found, recipe = read(report), _recipe(args, seed, folder)
    if recipe is None:
        return None
    found["baselines"][RECIPE] = recipe["ours"]
    return found


def _recipe(args: argparse.Namespace, seed: int, folder: Path) -> Json | None:
    """The report of the paper's recipe, made as far as it is not there yet; None: told to stop."""
    adapter, report = folder / "recipe", folder / "recipe-report"
    common = {"base": args.base, "dtype": args.dtype}
    least, most = keep_shares(args.capacities)
    if not (adapter / "adapter.json").exists():
        trained = call(
            distill,
            ("resume",),
            **common,
            **RECIPE_OPTIONS,
            data=args.data,
            out=adapter,
            min_capacity=least,
            max_capacity=most,
            experts=args.experts,
            steps=args.repair_windows,
            batch_tokens=args.repair_window,
            window=args.repair_window,
            seed=seed,
        )
        if not trained["finished"]:
            return None
    common["device"] = args.device
    if not (adapter / "calibration.json").exists():
        call(
            calibrate,
            ("uniform",),
            **common,
            **_calibrated(args),
            adapter=adapter,
            capacities=",".join(map(str, args.capacities)),
            seed=seed,
        )
    if not (report / "report.json").exists():
        call(
            evaluate,
            **common,
            **_measured(args),
            adapter=adapter,
            out=report,
            baselines="none",
        )
    return read(report)


def _calibrated(args: argparse.Namespace) -> dict[str, Any]:
    """What every adapter of the comparison is calibrated on."""
    return {
        "data": args.held_out,
        "windows": args.calibrate_windows,
        "check_windows": args.check_windows,
        "window": args.window,
    }


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """What every adapter of the comparison is measured on."""
    return {
        "data": args.test,
        "capacities": ",".join(map(str, args.capacities)),
        "windows": args.windows,
        "window": args.window,
        "greedy_tokens": 0,
        "repeats": 0,
    }


def keep_shares(capacities: Sequence[float]) -> tuple[float, float]:
    """The range of keep shares to train for these capacities, all units together.

    Tokens are kept around a sub-layer and parts inside it, so a share p of both spends about p².
    """
    lowered = [each for each in capacities if each < 1]
    near = [round(math.sqrt(each) * SHARES_GRID) for each in (min(lowered), max(lowered))]
    return (near[0] - 1) / SHARES_GRID, min(near[1] + 1, SHARES_GRID) / SHARES_GRID


def call(command: ModuleType, flags: Sequence[str] = (), **options: object) -> Json:
    """What another command of this package reports, with its own defaults for what is not given."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    words = [*(f"--{flag}" for flag in flags), *(word for pair in given for word in pair)]
    report: Json = command.run(parser.parse_args(words))
    return report


def rows_of(reports: Sequence[Json]) -> list[Row]:
    """A row for everything that every report has, ours first, dear capacities first.

    Raises:
        DataError: the reports were not measured on the same text.
    """
    texts = {(r["data"]["sha256"], r["windows"], r["window_tokens"], r["seed"]) for r in reports}
    if len(texts) > 1:
        raise DataError(f"reports of different texts: {sorted(texts)}")
    found: dict[tuple[float, Setting, str], list[float]] = {}
    for report in reports:
        for what, rows in sets(report).items():
            for row in rows:
                if row["capacity"] < 1 and row["setting"] in SETTINGS:
                    key = (row["capacity"], Setting(row["setting"]), what)
                    found.setdefault(key, []).append(row["kl"])
    return [
        Row(what, capacity, setting, tuple(kls))
        for (capacity, setting, what), kls in sorted(
            found.items(), key=lambda each: (-each[0][0], each[0][1], fmean(each[1]))
        )
        if len(kls) == len(reports)
    ]


def _about(args: argparse.Namespace, reports: Sequence[Json]) -> dict[str, Any]:
    first = reports[0]
    return {
        "base": first["base"],
        "seeds": args.seeds,
        "adapters": [report["adapter"] for report in reports],
        "fitted_to": {
            "name": Path(args.data).name,
            "tokens": args.repair_windows * args.repair_window,
        },
        "calibrated_on": {
            "name": Path(args.held_out).name,
            "probes": args.probes,
            "minutes": None if math.isinf(args.max_minutes) else args.max_minutes,
        },
        "recipe": RECIPE_OPTIONS
        | dict(zip(("min_capacity", "max_capacity"), keep_shares(args.capacities), strict=True)),
        "measured_on": first["data"]
        | {name: first[name] for name in ("windows", "window_tokens", "prompt_tokens")},
        "dtype": first["dtype"],
        "versions": first["versions"],
    }


def _as_json(row: Row) -> dict[str, Any]:
    return asdict(row) | {"mean": row.mean, "deviation": row.deviation}


def limits(calibrated: Mapping[str, Any]) -> str:
    """What ended a calibration."""
    probes, minutes = calibrated["probes"], calibrated["minutes"]
    said = [] if probes is None else [f"at most {probes} probes a phase"]
    if minutes is not None:
        said.append(f"at most {minutes:g} minutes")
    return " and ".join(said) or "all probes"


def markdown(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    fitted, on, calibrated = about["fitted_to"], about["measured_on"], about["calibrated_on"]
    lines = [
        f"# Adapters for {about['base']['id']} with several seeds",
        "",
        f"Seeds {', '.join(map(str, about['seeds']))} (adapters "
        f"{', '.join(f'`{each}`' for each in about['adapters'])}): each with a repair fitted to "
        f"{fitted['tokens']} tokens of {fitted['name']} and a calibration on "
        f"{calibrated['name']} of {limits(calibrated)}, on texts that the seed chose; so were the "
        f"baselines. The paper's recipe is trained on as many tokens: "
        f"{about['recipe']['units'].replace(',', ', ')} together, each kept alike in every layer, "
        f"rank-{about['recipe']['lora_rank']} LoRA. All were measured on the same "
        f"{on['windows']} windows of {on['window_tokens']} tokens of {on['name']}, "
        f"{on['prompt_tokens']} of them prompt, in {about['dtype']}. KL to the full model in nats "
        "per token; the deviation is that of one seed.",
        "",
    ]
    for setting in SETTINGS:
        of_setting = [row for row in rows if row.setting is setting]
        ours = {row.capacity: row.mean for row in of_setting if row.what == OURS}
        lines += [f"## {TITLES[setting]}", ""]
        lines += table(
            ["capacity", "what", "mean", "deviation", "each seed", "ours over it"],
            [
                [
                    f"{row.capacity:g}",
                    row.what,
                    f"{row.mean:.4f}",
                    "" if row.deviation is None else f"{row.deviation:.4f}",
                    ", ".join(f"{kl:.4f}" for kl in row.kl),
                    "" if row.what == OURS else f"{ours[row.capacity] / row.mean:.3f}",
                ]
                for row in of_setting
                if row.capacity in ours
            ],
        )
        lines.append("")
    return "\n".join([*lines, "![seeds](seeds.png)"]) + "\n"
