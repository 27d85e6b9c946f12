"""A file appears whole or not at all, and what a killed writer left goes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastiformer import whole_files
from elastiformer.whole_files import write_whole
from training.files import write_atomically

ROOT = Path(__file__).parents[2]

# A writer that comes to a halt before it flushes, and says so.
HALTED = """
import os, sys, time
from pathlib import Path
from elastiformer.whole_files import write_whole

def halt(number):
    print("halted", flush=True)
    time.sleep(600)

os.fsync = halt
write_whole(Path(sys.argv[1]), b"half")
"""


@pytest.fixture
def halted(tmp_path):
    """A process in the middle of writing to a path."""
    path = tmp_path / "adapter.json"
    path.write_bytes(b"old")
    writer = subprocess.Popen(
        [sys.executable, "-c", HALTED, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"halted\n"
    yield path, writer
    writer.kill()
    writer.communicate()


@pytest.mark.parametrize("write", [write_whole, write_atomically])
def test_what_a_killed_writer_left_goes_with_the_next_write_to_its_place(halted, write):
    path, writer = halted
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = [each for each in path.parent.iterdir() if each != path]
    others = [path.with_name(name) for name in (".adapter.json.5", f"{left.name[1:]}", ".other")]
    for other in others:
        other.touch()
    assert path.read_bytes() == b"old"

    write(path.with_name("report.json"), b"{}")  # of another place
    assert left.exists()
    write(path, b"new")
    assert path.read_bytes() == b"new" and not left.exists()
    assert all(other.exists() for other in others)


def test_what_is_still_being_written_is_left_alone(halted):
    path, _ = halted
    (beside,) = [each for each in path.parent.iterdir() if each != path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and beside.exists()


def test_what_goes_wrong_leaves_the_old_content_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"old")

    def interrupted(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_many_writers_of_one_place_do_not_meet(tmp_path):
    path, wrong = tmp_path / "deep" / "a", []

    def write(content):
        for _ in range(50):
            try:
                write_whole(path, content)
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 5000,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(set(path.read_bytes())) == 1 and list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError("no locks")

    monkeypatch.setattr(whole_files.fcntl, "flock", refused)
    left = tmp_path / ".a.0123abcd.part"
    left.touch()
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert left.exists()  # nobody can tell whether it is still being written
