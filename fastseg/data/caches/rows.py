"""Decoded pairs as rows of a file that is mapped into memory: a disk cache, or memory that processes share."""

import errno
import json
import os
import uuid
import weakref
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

__all__ = ["FORMAT", "STAMP_BYTES", "TEMPORARY_SUFFIX", "Rows", "TemporaryRows", "remove_orphans"]

FORMAT = 2  # version of the file; raise it when the layout or the decoded pixels change
HEADER_BYTES = 4096
STAMP_BYTES, CHECKSUM_BYTES = 16, 4
TEMPORARY_SUFFIX = ".part"
NAMES = 100  # of a temporary file that are tried


class Rows:
    """A cache file mapped into memory: a JSON header, then stamps, checksums (CRC-32), images and masks.

    A row has a stamp of zeros until it is filled.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, int, int], mode: Any) -> None:
        count, height, width = shape
        sizes = [HEADER_BYTES, count * STAMP_BYTES, count * CHECKSUM_BYTES, count * height * width * 3]
        offsets = np.cumsum(sizes)
        shapes = [(count, STAMP_BYTES), (count, CHECKSUM_BYTES), (count, height, width, 3), shape]
        self.stamps, self.checksums, self.images, self.masks = (
            np.memmap(file, np.uint8, mode, offset, part) for offset, part in zip(offsets, shapes, strict=True)
        )

    def checksum(self, row: int) -> NDArray[np.uint8]:
        value = zlib.crc32(self.masks[row], zlib.crc32(self.images[row]))
        return np.frombuffer(value.to_bytes(CHECKSUM_BYTES, "little"), np.uint8)

    def is_intact(self, row: int) -> bool:
        return np.array_equal(self.checksums[row], self.checksum(row))

    @classmethod
    def open(cls, path: str | Path, shape: tuple[int | None, int, int], *, shared: bool = False) -> "Rows | None":
        """The rows of a file of this shape (None: any number of rows); None if there is no such file.

        Args:
            shared: rows written here reach the file, and the other processes that map it.
        """
        try:
            with open(path, "rb+" if shared else "rb") as file:
                header = json.loads(file.read(HEADER_BYTES))
                found = tuple(header["shape"])
                fits = header["format"] == FORMAT and found[1:] == shape[1:] and shape[0] in (None, found[0])
                if not fits or os.fstat(file.fileno()).st_size != _file_bytes(found):
                    return None
                # "c" is copy on write: torch requires writable memory, but nothing writes.
                return cls(file, found, "r+" if shared else "c")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @classmethod
    def in_memory(cls, shape: tuple[int, int, int]) -> tuple["Rows", str]:
        """Rows that other processes of the machine can map, and the path for `open` while the rows exist.

        Nothing is left of them when the processes end. They are a memfd, because containers limit /dev/shm to 64 MiB.

        Raises:
            OSError, AttributeError: the system has no such files.
        """
        descriptor = os.memfd_create("fastseg-cache")
        with open(descriptor, "r+b", closefd=False) as file:
            _write_header(file, shape)
            os.truncate(descriptor, _file_bytes(shape))  # a page is allocated when it is written
            rows = cls(file, shape, "r+")
        weakref.finalize(rows, os.close, descriptor)
        return rows, f"/proc/{os.getpid()}/fd/{descriptor}"


class TemporaryRows:
    """A file that becomes a cache file when it is published. A lock file beside it shows that its process is alive.

    Args:
        path: of the cache file.
        shape: rows, height and width.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.target = path
        self.path, self._lock = _lock_new_name(path)
        try:
            with open(self.path, "x+b") as file:
                _write_header(file, shape)
                _allocate(file.fileno(), _file_bytes(shape))
                self.rows = Rows(file, shape, "r+")
        except OSError:
            self.close()
            raise

    def publish(self) -> None:
        """Write everything to the disk and take the final name.

        Raises:
            OSError: the file cannot be written or renamed.
        """
        for part in (self.rows.stamps, self.rows.checksums, self.rows.images, self.rows.masks):
            part.flush()
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)

    def close(self) -> None:
        """Delete the file, unless it is published. May be called twice."""
        if self._lock.is_locked:
            _remove(self.path, self._lock)


def remove_orphans(folder: Path) -> None:
    """Delete temporary files whose process has died, which has released its lock."""
    found = {*folder.glob("*.fastseg.*.part"), *(lock.with_suffix("") for lock in folder.glob("*.fastseg.*.part.lock"))}
    for path in found:
        lock = _lock(path)
        with suppress(Timeout, OSError):  # locked, or deleted by another process
            lock.acquire(timeout=0)
            _remove(path, lock)


def _lock_new_name(path: Path) -> tuple[Path, FileLock]:
    """A name for a temporary file, and its lock, which is held.

    Raises:
        OSError: the lock file cannot be written.
    """
    for _ in range(NAMES):
        name = Path(f"{path}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        lock = _lock(name)
        with suppress(Timeout):  # `remove_orphans` of another process holds it for a moment, and deletes its file
            lock.acquire(timeout=0)
            if os.path.exists(lock.lock_file):
                return name, lock
            lock.release()
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _lock(path: Path) -> FileLock:
    return FileLock(f"{path}.lock", thread_local=False)


def _remove(path: Path, lock: FileLock) -> None:
    """Delete a temporary file and its lock file, which is held, and release the lock."""
    for name in (path, Path(lock.lock_file)):
        with suppress(OSError):
            name.unlink()
    lock.release()


def _write_header(file: IO[bytes], shape: tuple[int, int, int]) -> None:
    file.write(json.dumps({"format": FORMAT, "shape": shape}).encode().ljust(HEADER_BYTES))
    file.flush()


def _allocate(file: int, size: int) -> None:
    """Reserve a file's space: a full disk shows now, not in the epoch."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _file_bytes(shape: tuple[int, int, int]) -> int:
    count, height, width = shape
    return HEADER_BYTES + count * (STAMP_BYTES + CHECKSUM_BYTES + height * width * 4)
