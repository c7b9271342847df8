"""Files that are complete or absent, whatever happens while they are written."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastseg
from fastseg.runtime.files import (
    atomic_write,
    check_writable,
    make_folder,
    remove_dead_temporaries,
    target_of_temporary,
)

KILLED = """
import os, signal, sys
from fastseg.runtime.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_when_the_block_ends(sync, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path, sync=sync) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert target_of_temporary(temporary.name) == "a.json"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert path.read_text() == "old"
    assert [target_of_temporary(file.name) for file in tmp_path.iterdir() if file != path] == ["a.json"]


def test_what_the_system_refuses_is_an_output_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere" / "a.json", tmp_path / "file" / "a.json"):
        with pytest.raises(fastseg.OutputError, match=r"a\.json: .*place"), atomic_write(path) as temporary:
            temporary.touch()
    for refused in (check_writable, make_folder):
        with pytest.raises(fastseg.OutputError, match=r"file/b: .*Not a directory"):
            refused(tmp_path / "file" / "b")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refusal = pytest.raises(fastseg.OutputError, match=r"b\.json: .*No space left.*Make room")
    with refusal, atomic_write(tmp_path / "b.json") as temporary:
        temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_are_tested_without_being_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["a.json", ".a.json.tmp", ".a.json.12", ".12.tmp", "a.json.12.tmp"])
def test_other_files_are_no_temporary_ones(name):
    assert target_of_temporary(name) is None


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("new", "newer"):  # a link to nothing, then to a file
        with atomic_write(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "link.json", "real"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_devices_and_pipes_are_written_to(tmp_path):
    """A rename would replace them: as root even /dev/null."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (fifo, tmp_path / "null"):
        with atomic_write(path) as temporary:
            temporary.write_text("a line")
        assert not path.is_file()
        assert path.exists()
    assert os.read(reader, 100) == b"a line"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "null"]
    assert not Path("/dev/null").is_file()


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    path, others = tmp_path / "a.json", [tmp_path / f".a.json.{os.getpid()}.tmp", tmp_path / "a.json.1.tmp"]
    for name in others:
        name.touch()
    subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert len(list(tmp_path.iterdir())) == 3
    remove_dead_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)  # of a live process, and of another program


def test_temporary_files_of_other_machines_stay_for_a_day(tmp_path):
    """They share the folder, and the numbers of their processes mean nothing here."""
    old, new = tmp_path / ".a.json.00000001-999999.tmp", tmp_path / ".b.json.00000001-999999.tmp"
    for path in (old, new):
        path.touch()
        assert target_of_temporary(path.name) == path.name[1:7]
    os.utime(old, (time.time() - 90000,) * 2)
    remove_dead_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_a_write_removes_what_a_killed_one_has_left(tmp_path):
    path = tmp_path / "a.json"
    subprocess.run([sys.executable, "-c", KILLED, str(path)])
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [237, 255])
def test_a_long_name_is_written(tmp_path, length):
    path = tmp_path / ("ä" * 100 + "a" * (length - 200))
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_name_that_is_too_long_is_an_output_error(tmp_path):
    with pytest.raises(fastseg.OutputError, match=r"too long.*shorter"):
        make_folder(tmp_path / ("a" * 300))
