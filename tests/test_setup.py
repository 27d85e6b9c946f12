"""Promises of the way from nothing to an environment: whole or not at all, and said plainly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def set_up(venv: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """`setup.sh` on a machine whose package index gives nothing."""
    return subprocess.run(
        [ROOT / "setup.sh", "service"],
        env=offline(venv, python),
        capture_output=True,
        text=True,
        timeout=240,
    )


def offline(venv: Path, python: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    return kept | nothing | {"VENV": str(venv), "PYTHON": python}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An environment with all its marks, newer than what it was made from."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").touch()
    (venv / "ready-service").touch()
    return venv


def test_a_whole_environment_is_left_alone_without_a_word(whole):
    done = set_up(whole, python="no-such-python")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_newer_list_of_packages_makes_it_due_again(whole):
    os.utime(whole / "ready-service", (0, 0))
    done = set_up(whole, python="no-such-python")
    assert done.returncode != 0
    assert "there is no 'no-such-python' here" in done.stderr


def test_a_python_that_is_too_old_is_refused_by_its_version(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; esac\necho 3.9.18\n')
    old.chmod(0o755)
    done = set_up(tmp_path / "venv", python=str(old))

    assert done.returncode != 0
    assert f"Python 3.11 or newer is needed; '{old}' is 3.9.18" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_without_ensurepip_says_what_to_install(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    bare.chmod(0o755)
    done = set_up(tmp_path / "venv", python=str(bare))

    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr


def test_half_an_environment_is_never_taken_for_a_whole_one(whole, tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    (whole / "setting-up").write_text(str(killed.pid))
    half = whole / "half-a-package"
    half.touch()
    full_disk = tmp_path / "python3"  # a Python whose environments fail
    full_disk.write_text(f'#!/bin/sh\n[ "$2" = venv ] && exit 1\nexec {sys.executable} "$@"\n')
    full_disk.chmod(0o755)

    for _ in range(2):
        done = set_up(whole, python=str(full_disk))
        assert done.returncode != 0
        assert "an earlier setup was cut off: starting over" in done.stderr
        assert "no environment could be made" in done.stderr
        assert not half.exists()
        assert not (whole / "ready-service").exists()


def test_without_an_index_it_fails_with_a_reason_and_says_where_the_rest_is(tmp_path):
    done = set_up(tmp_path / "venv")
    assert done.returncode != 0
    assert "ERROR: No matching distribution found for" in done.stderr
    assert f"All of what pip said: {tmp_path / 'venv' / 'setup.log'}" in done.stderr
    assert not (tmp_path / "venv" / "ready-service").exists()


def test_a_second_setup_waits_for_the_first(whole):
    first = subprocess.Popen(["sleep", "60"])
    (whole / "setting-up").write_text(str(first.pid))
    second = subprocess.Popen(
        [ROOT / "setup.sh", "service"],
        env=offline(whole, "no-such-python"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert second.stderr is not None
    told = second.stderr.readline()
    (whole / "setting-up").unlink()  # the first is done
    rest = second.communicate(timeout=30)[1]
    first.kill()
    first.wait()

    assert told == f"setup: process {first.pid} is setting up {whole}; waiting for it\n"
    assert (second.returncode, rest) == (0, "")
