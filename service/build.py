"""Which build this is: its version, the releases beneath it, and the files it serves from."""

from __future__ import annotations

import hashlib
import platform
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "elastiformer-serve"
_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_BENEATH = ("torch", "transformers")
_HASHED = (".json", ".safetensors")  # what an adapter is read from


@cache
def version() -> str:
    """As pyproject.toml has it: in a checkout from the file, elsewhere from the installed package.

    A checkout goes first: what is installed beside it may be of another day.
    """
    if _PROJECT.is_file():
        project = tomllib.loads(_PROJECT.read_text("utf-8"))["project"]
        if project["name"] == PACKAGE:
            return str(project["version"])
    return metadata.version(PACKAGE)


@cache
def releases() -> dict[str, str]:
    """Python, and the packages that decide what a model computes."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _BENEATH},
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that an adapter consists of, by its path inside the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _HASHED
    }
