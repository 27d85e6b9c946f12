"""The lines of a data file, parted by their domain: a file for each, and one for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.files import DataError, write_atomically

EVERYTHING = "all"


class Line(NamedTuple):
    """A line of data as it is written, and how much of a domain it is."""

    written: str
    size: int  # characters of its text, or 1 item


def write_domains(
    source: Path,
    domains: Mapping[str, Sequence[str]],
    by: str,
    folder: Path,
    of_text: bool = False,
    alike: bool = False,
) -> dict[str, int]:
    """One file for each domain, and one for all of them; how much of each there is.

    Args:
        of_text: what a domain has is counted in characters, not in items.
        alike: of each no more is taken than the smallest has: its first lines that have room.

    Raises:
        DataError: naming the file, and the line or the domain at fault.
    """
    lines = _lines(source, domains, by, of_text)
    if few := [name for name, of_domain in lines.items() if len(of_domain) < 2]:
        known = ", ".join(domains[few[0]])
        raise DataError(f"{source}: fewer than 2 lines of {few[0]} ({by}: {known})")
    if alike:
        most = min(map(_size, lines.values()))
        lines = {name: _first(of_domain, most) for name, of_domain in lines.items()}
    lines[EVERYTHING] = [line for of_domain in lines.values() for line in of_domain]
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_domain in lines.items():
        content = "".join(f"{line.written}\n" for line in of_domain)
        write_atomically(folder / f"{name}.jsonl", content.encode())
    return {name: _size(of_domain) for name, of_domain in lines.items()}


def _lines(
    source: Path, domains: Mapping[str, Sequence[str]], by: str, of_text: bool
) -> dict[str, list[Line]]:
    where = {value: name for name, values in domains.items() for value in values}
    lines: dict[str, list[Line]] = {name: [] for name in domains}
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
            lines[name].append(Line(line, _characters(record) if of_text else 1))
    return lines


def _characters(record: Mapping[str, Any]) -> int:
    """Of the text in a line; what is malformed has none, and whoever reads it says so."""
    messages = record.get("messages")
    parts = messages if isinstance(messages, list) else [{"content": record.get("text")}]
    said = [part.get("content") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in said if isinstance(text, str))


def _size(lines: Sequence[Line]) -> int:
    return sum(line.size for line in lines)


def _first(lines: Sequence[Line], most: int) -> list[Line]:
    """The first lines that have room, each that does not left out."""
    taken: list[Line] = []
    left = most
    for line in lines:
        if line.size <= left:
            taken.append(line)
            left -= line.size
    return taken
