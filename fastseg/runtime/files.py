"""Atomic writes, checks of folders, and the user's cache folder."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastseg.errors import OutputError

__all__ = ["atomic_write", "check_writable", "make_folder", "target_of_temporary", "user_cache"]

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Write a temporary file beside `path`, which replaces `path` when the block ends.

    A reader finds the old or the new file, never a part. An exception leaves the old file in place. A killed process
    leaves its temporary file, `.NAME.PID.tmp`.

    Args:
        sync: flush the file to disk before the rename, so that a power failure loses neither file. Too slow for
            thousands of small files that can be made again.

    Yields:
        The path of the temporary file, for the block to write.

    Raises:
        OutputError: the block, the flush or the rename failed with an OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def target_of_temporary(name: str) -> str | None:
    """The name of the file that a temporary file of `atomic_write` would have replaced; None for other files."""
    match = re.fullmatch(rf"\.(.+)\.\d+{re.escape(TEMPORARY_SUFFIX)}", name)
    return match and match[1]


def check_writable(path: str | os.PathLike[str]) -> None:
    """Test whether a folder exists or can be made, and can be written. Makes nothing.

    Raises:
        OutputError: it cannot.
    """
    existing = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
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


def user_cache() -> Path:
    """The user's folder for caches. Source: XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastseg")
