"""Write Grafana's dashboards, or draw what they show.

    python -m deploy.dashboards write                     deploy/grafana/*.json, for Grafana
    python -m deploy.dashboards write --check             say whether those files are current
    python -m deploy.dashboards load --server URL         mixed requests, so that there is something
    python -m deploy.dashboards render --prometheus URL   the same queries as pictures

`load` is for a server of the embedded models. `render` needs a Prometheus that has scraped a
server, and no Grafana: a PNG for each dashboard, over the last minutes. Progress goes to stderr.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.dashboards.grafana import as_json
from deploy.dashboards.health import HEALTH
from deploy.dashboards.latency import LATENCY
from deploy.dashboards.prometheus import PrometheusError
from deploy.dashboards.savings import SAVINGS
from training.options import real

BOARDS = (SAVINGS, LATENCY, HEALTH)
JSON = Path("deploy/grafana")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "write":
        return write(args.out, args.check)
    return load(args) if args.command == "load" else render(args)


def parser() -> argparse.ArgumentParser:
    usage = argparse.ArgumentParser(
        prog="python -m deploy.dashboards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = usage.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="Grafana's JSON")
    writing.add_argument("--out", type=Path, default=JSON, help="folder (%(default)s)")
    writing.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    loading = commands.add_parser("load", help="mixed requests to a server of the embedded models")
    loading.add_argument("--server", required=True, metavar="URL")
    loading.add_argument("--minutes", type=real(above=0, most=60), default=6.0)
    loading.add_argument(
        "--rate", type=real(above=0, most=100), default=1.0, help="requests a second (%(default)s)"
    )
    loading.add_argument("--key", help="of callers, where the server asks for one")
    loading.add_argument("--limited-key", help="of one with a ceiling; unset: as the others")
    drawing = commands.add_parser("render", help="pictures of what a Prometheus holds")
    drawing.add_argument("--prometheus", required=True, metavar="URL")
    drawing.add_argument("--out", type=Path, default=Path("docs/dashboards"))
    drawing.add_argument("--minutes", type=float, default=5.0, help="how far back (%(default)s)")
    drawing.add_argument("--end", type=float, help="until when, in seconds since 1970 (now)")
    drawing.add_argument(
        "--scrape-seconds", type=float, default=15.0, help="the scrape interval (%(default)s)"
    )
    return usage


def files() -> dict[str, str]:
    """What each file in deploy/grafana holds, by its name."""
    return {
        f"{board.name}.json": as_json(board, [other for other in BOARDS if other is not board])
        for board in BOARDS
    }


def write(folder: Path, check: bool) -> int:
    wanted = files()
    there = {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.json"))}
    stale = sorted(
        name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)
    )
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        for name in stale:
            if name in wanted:
                (folder / name).write_text(wanted[name], "utf-8")
            else:
                (folder / name).unlink()
    print(json.dumps({"stale" if check else "written": stale}))
    return 1 if check and stale else 0


def load(args: argparse.Namespace) -> int:
    from deploy.dashboards.load import send

    keys = (args.key, args.limited_key or args.key)
    seen = asyncio.run(send(args.server, args.minutes, args.rate, keys))
    print(json.dumps({"seen": seen}))
    return 0 if seen.get("200") else 1


def render(args: argparse.Namespace) -> int:
    import httpx

    from deploy.dashboards.pictures import Span, draw
    from deploy.dashboards.prometheus import Prometheus

    end = time.time() if args.end is None else args.end
    span = Span.until(end, args.minutes * 60, args.scrape_seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = []
    try:
        with httpx.Client() as client:
            for board in BOARDS:
                path = args.out / f"{board.name}.png"
                path.write_bytes(draw(board, Prometheus(client, args.prometheus), span))
                print(f"drawn: {path}", file=sys.stderr)
                drawn.append(str(path))
    except PrometheusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"drawn": drawn}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
