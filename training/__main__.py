"""Train and measure routers, offline.

    python -m training synthesize --base BASE --prompts FILE --tokens N --out FILE.jsonl
    python -m training distill    --base BASE --data DATA --out DIR
    python -m training repair     --base BASE --adapter DIR --data DATA --out DIR
    python -m training ranks      --base BASE --data DATA --held-out TEXT --leave-at 14,18 --out DIR
    python -m training calibrate  --base BASE --adapter DIR --data DATA
    python -m training evaluate   --base BASE --adapter DIR --data DATA --capacities 1.0,0.8,0.6
                                  --out REPORT_DIR
    python -m training ablate     --base BASE --adapter DIR --data DATA --held-out DATA
                                  --out REPORT_DIR
    python -m training seeds      --base BASE --adapter DIR --data DATA --held-out DATA --test DATA
                                  --work DIR --out REPORT_DIR
    python -m training domains    --base BASE --data DATA --test DATA --domain NAME=LABEL,LABEL
                                  --domain NAME=LABEL,LABEL --out REPORT_DIR
    python -m training recipe     --base BASE --data DATA --held-out DATA --out REPORT_DIR
    python -m training reconstruct --base BASE --adapter DIR --data DATA --out REPORT_DIR
    python -m training summarize  --reports REPORT_DIR REPORT_DIR --out FILE.md
    python -m training goals      --report REPORT_DIR --goals FILE.json --into FILE.md FILE.md

BASE: a model folder, a Hub id, or the name of an embedded model. DATA: a .txt or .jsonl file, a
folder of them, or hub:NAME[:split]. `python -m training COMMAND --help` names every option.

`distill` runs under torchrun in several processes; every other command runs in one, and refuses
more. Progress goes to stderr. The last line of stdout is one JSON object, for scripts. Ctrl-C ends
a command with status 130 and a line that says how to go on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Each a module of this package.
COMMANDS = (
    "build",
    "synthesize",
    "distill",
    "repair",
    "ranks",
    "calibrate",
    "evaluate",
    "ablate",
    "seeds",
    "domains",
    "recipe",
    "reconstruct",
    "summarize",
    "goals",
)
SHARED = ("distill",)  # what several processes of torchrun do together
TO_A_FILE = ("synthesize", "summarize")  # the others write --out as a folder
STOPPED = 130  # the exit status of what Ctrl-C ends, as shells count
ANEW = "nothing of it is kept, so the same command begins anew"
GOES_ON = {
    **dict.fromkeys(("build", "distill"), "go on from the last checkpoint with --resume"),
    **dict.fromkeys(
        ("synthesize", "calibrate", "ablate", "seeds", "domains", "recipe"),
        "the same command goes on where it was",
    ),
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and names the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        unset = action.default is None or action.default is False
        if unset or action.default == argparse.SUPPRESS or "default" in said:
            return action.help
        return f"{said} (default: %(default)s)".strip()


def check_alone(command: str) -> None:
    """Raises RunError for several processes where each would do the same work."""
    from training.files import RunError

    told = os.environ.get("WORLD_SIZE", "1")
    if not (told.isascii() and told.isdigit() and int(told) >= 1):
        raise RunError(f"WORLD_SIZE: a whole number of processes, at least 1; got {told!r}")
    if int(told) > 1 and command not in SHARED:
        raise RunError(
            f"{command}: runs in 1 process, and WORLD_SIZE says {told}: each would do all of the "
            f"work and write the same files. Start it without torchrun, which is for "
            f"{', '.join(SHARED)}"
        )


def check_places(command: str, args: argparse.Namespace) -> None:
    """Raises RunError where results could not be written, as they would be after long work."""
    from training.files import check_writable

    for name in ("out", "work"):
        place: Path | None = getattr(args, name, None)
        if place is not None:
            check_writable(f"--{name}", place, is_folder=command not in TO_A_FILE)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="python -m training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS)
    command = top.parse_args(given[:1]).command

    with suppress(KeyboardInterrupt):
        return _ended(command, given[1:])
    # Only now have the frames of what ran gone, and progress bars ended their lines.
    print(f"{command}: stopped; {GOES_ON.get(command, ANEW)}", file=sys.stderr)
    return STOPPED


def _ended(command: str, given: Sequence[str]) -> int:
    """The exit status of a command that nobody stops."""
    # Here and not above: the library takes seconds to load, in which Ctrl-C may come too.
    from elastiformer.errors import ElastiError

    try:
        check_alone(command)
        # Only the command asked for is loaded: each brings libraries that the others do without.
        module = importlib.import_module(f"training.{command}")
        parser = argparse.ArgumentParser(
            prog=f"python -m training {command}",
            description=module.__doc__,
            formatter_class=Help,
        )
        module.add_arguments(parser)
        args = parser.parse_args(given)
        check_places(command, args)
        report = module.run(args)
    except (ElastiError, OSError) as error:  # the second: a full disk, a file that is not ours
        print(f"error: {error}", file=sys.stderr)
        return 1
    if report is not None:  # None: another process of the same run reports
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
