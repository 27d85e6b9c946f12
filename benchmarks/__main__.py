"""Measure the library and the server, side by side and within bounded time.

    python -m benchmarks saving      what a capacity saves: time beside FLOPs
    python -m benchmarks dense       capacity 1.0 against Transformers and other engines
    python -m benchmarks mixed       mixed capacities in a batch against uniform batches
    python -m benchmarks overhead    an adapter that nobody uses against no adapter
    python -m benchmarks cache       bytes per token, and how many requests fit
    python -m benchmarks serving     load over HTTP, and what HTTP and scheduling cost
    python -m benchmarks planning    requests per second that this machine holds, on paper
    python -m benchmarks soak        random requests, cancels and disconnects; is anything left?
    python -m benchmarks images      classifiers: tokens routed, and an image's merged or dropped
    python -m benchmarks profile     where a decode step's time goes

`python -m benchmarks NAME --help` names every option and how long it takes. Measure alone on the
machine: whatever else runs is measured too. Each writes NAME.json, NAME.md and NAME.svg into
benchmarks/results. Progress goes to stderr. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from elastiformer.errors import ElastiError
from training.__main__ import Help

COMMANDS = (
    "saving",
    "dense",
    "mixed",
    "overhead",
    "cache",
    "serving",
    "planning",
    "soak",
    "images",
    "profile",
)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS)
    command = top.parse_args(given[:1]).command

    module = importlib.import_module(f"benchmarks.{command}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=module.__doc__, formatter_class=Help
    )
    module.add_arguments(parser)
    args = parser.parse_args(given[1:])
    args.command_line = given
    try:
        report = module.run(args)
    except ElastiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
