"""Files of public packages: fetched by their client, checked, opened."""

import hashlib
import io
import tarfile

import pytest

from training import packages
from training.files import DataError
from training.packages import FASHION_MNIST, VADER, Package, debian_files, fetched


def debian_package(files: dict[str, bytes]) -> bytes:
    """A .deb as deb(5) and ar(5) describe it; the first member has an odd length on purpose."""
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", inside.getvalue())):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


def test_the_files_of_a_debian_package_are_read_without_its_tools():
    with debian_files(debian_package({"./usr/share/a": b"one", "./b": b"two"})) as archive:
        assert archive.extractfile("./usr/share/a").read() == b"one"
        assert archive.getnames() == ["./usr/share/a", "./b"]

    with pytest.raises(DataError, match="does not begin like an ar archive"):
        debian_files(b"PK")
    with pytest.raises(DataError, match=r"no member data\.tar"):
        debian_files(b"!<arch>\n")


def test_a_file_that_is_there_is_taken_and_another_one_refused(tmp_path):
    package = Package("thing==1", "thing-1.zip", hashlib.sha256(b"right").hexdigest(), "MIT")
    path = tmp_path / "thing-1.zip"

    path.write_bytes(b"right")
    assert fetched(package, tmp_path) == path
    path.write_bytes(b"wrong")
    with pytest.raises(
        DataError, match=rf"thing-1\.zip: sha256 [0-9a-f]+, expected {package.sha256}"
    ):
        fetched(package, tmp_path)


def test_without_the_client_it_is_said_where_a_file_may_be_put_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match=r"needs apt-get; or put the file of .* by hand: .*\.deb"):
        fetched(FASHION_MNIST, tmp_path)
    with pytest.raises(DataError, match=r"vaderSentiment==0\.5 there by hand"):
        fetched(VADER, tmp_path)


def test_a_client_that_fails_is_quoted(tmp_path):
    missing = Package("./no-such-folder==1", "no-1.zip", "0" * 64, "MIT")
    with pytest.raises(DataError, match=r"failed: .*no-such-folder"):
        fetched(missing, tmp_path)
