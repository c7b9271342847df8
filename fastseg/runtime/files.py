"""Atomic writes, checks of folders, and the user's cache folder."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from filelock import FileLock, Timeout

from fastseg.errors import FastsegError, OutputError

__all__ = [
    "MAX_NAME_BYTES",
    "FileVersion",
    "atomic_write",
    "check_regular",
    "check_writable",
    "file_version",
    "json_text",
    "lock_folder",
    "make_folder",
    "remove_dead_temporaries",
    "target_of_temporary",
    "user_cache",
]

FileVersion = tuple[int, int] | None

TEMPORARY_SUFFIX = ".tmp"
# The file that it replaces, the machine or container (not in older versions), and the process
TEMPORARY = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-)?([0-9]{1,9})\.tmp", re.DOTALL)
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
DAY = 86400  # seconds, after which a temporary file of another machine is taken for one of a killed process
LOCK = ".writer.lock"
MAX_NAME_BYTES = 255  # of a file on common file systems


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Write a temporary file beside `path`, which replaces `path` when the block ends.

    A reader finds the old or the new file, never a part. An exception leaves the old file in place. A killed process
    leaves its temporary file, `.NAME.MACHINE-PID.tmp`. A link is followed; a device or a pipe is written to instead.

    Args:
        sync: flush the file to disk before the rename, so that a power failure loses neither file, and remove what
            killed processes have left of it. Too slow for thousands of small files that can be made again.

    Yields:
        The path of the temporary file, for the block to write.

    Raises:
        OutputError: the block, the flush or the rename failed with an OSError.
    """
    if _is_device(path):
        with _copy_to_device(path) as temporary:
            yield temporary
        return
    target = Path(os.path.realpath(path) if os.path.islink(path) else path)
    temporary = target.with_name(_temporary_name(target.name))
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        if sync:
            remove_dead_temporaries(target.parent, target.name)
    except OSError as error:
        raise OutputError(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _copy_to_device(path: str | os.PathLike[str]) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "file")
            yield temporary
            with open(temporary, "rb") as source, open(path, "wb") as device:
                shutil.copyfileobj(source, device)
    except OSError as error:
        raise OutputError(path, error) from None


def _is_device(path: str | os.PathLike[str]) -> bool:
    """Whether a path exists and is neither a regular file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _temporary_name(name: str) -> str:
    suffix = f".{MACHINE}-{os.getpid()}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(name)) + len(suffix) >= MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}{suffix}"


def remove_dead_temporaries(folder: Path, name: str = "") -> None:
    """Delete the temporary files in a folder whose process has died; of other machines, those that are a day old.

    Args:
        name: of the file that they would have replaced; empty for all files.
    """
    for found in os.listdir(folder):
        match = TEMPORARY.fullmatch(found)
        if match and name in ("", match[1]) and _is_dead(folder / found, match[2], int(match[3])):
            (folder / found).unlink(missing_ok=True)


def _is_dead(path: Path, machine: str | None, pid: int) -> bool:
    if machine in (None, MACHINE):
        return not psutil.pid_exists(pid)
    try:
        return time.time() - path.stat().st_mtime > DAY
    except OSError:  # it has just replaced its file
        return False


def target_of_temporary(name: str) -> str | None:
    """The name of the file that a temporary file of `atomic_write` would have replaced; None for other files."""
    match = TEMPORARY.fullmatch(name)
    return match and match[1]


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse to read from a pipe, which may block for ever, or from a device, which may never end.

    Raises:
        OSError: the path is neither a regular file nor a folder, or does not exist.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder has an error of its own
        raise OSError(errno.EINVAL, "is not a regular file")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Test whether a folder exists or can be made, and can be written. Makes nothing.

    Raises:
        OutputError: it cannot.
    """
    existing = next(folder for folder in (Path(path), *Path(path).absolute().parents) if os.path.exists(folder))
    if not existing.is_dir():
        raise OutputError(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents unless it exists.

    Raises:
        OutputError: it cannot be made or written.
    """
    check_writable(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(path, error) from None


@contextmanager
def lock_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Hold a folder for the duration of the block. The system releases it if the process dies.

    Args:
        folder: must exist.
        remedy: what the user can do if another process holds it.

    Raises:
        FastsegError: another process, or another call in this one, holds the folder.
        OutputError: the lock file cannot be written.
    """
    path = folder / LOCK
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
        if os.name == "posix":  # elsewhere a locked file cannot be read
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")
        raise FastsegError(
            f"{folder}: is held by {holder or 'another process'}, which writes to it. {remedy}."
        ) from None
    except OSError as error:
        raise OutputError(folder, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release: afterwards it may be another process's
            path.unlink()
        lock.release()


def file_version(path: Path) -> FileVersion:
    """What changes when a file is written again; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of nested dictionaries and lists, with null for numbers that are not finite: JSON has no NaN."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def user_cache() -> Path:
    """The user's folder for caches, as the system has it."""
    return Path(platformdirs.user_cache_dir("fastseg", appauthor=False))
