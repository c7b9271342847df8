"""Caches of decoded pairs, uint8, filled in the first epoch: in GPU memory, in RAM, or in a memory-mapped file.

Carvana's training set takes 0.8 GB at 160x240. With a cache, each pair is decoded once.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import Batch
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.errors import ConfigError, OutputError
from fastseg.runtime.files import user_cache
from fastseg.runtime.memory import free_host_memory

__all__ = ["Cache", "DiskCache", "open_cache"]

FORMAT = 1  # version of the file; raise it when the layout or the decoded pixels change
HEADER_BYTES = 4096
STAMP_BYTES = 16

log = logging.getLogger(__name__)


class Cache:
    """One row per pair; `filled` (N,) bool says which rows are decoded.

    Args:
        images: (N, H, W, 3) uint8, storage.
        masks: (N, H, W) uint8, storage on the same device.
    """

    def __init__(self, images: torch.Tensor, masks: torch.Tensor) -> None:
        self.images, self.masks = images, masks
        self.filled = np.zeros(len(images), bool)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def put(self, batch: Batch) -> None:
        """Store a decoded batch."""
        rows = self._as_rows(batch.indices)
        self.images.index_copy_(0, rows, batch.images.to(self.device))
        self.masks.index_copy_(0, rows, batch.masks.to(self.device))
        self.filled[batch.indices] = True

    def gather(self, indices: NDArray[np.int64], pin_memory: bool = False) -> Batch:
        """A new batch of the rows `indices`."""
        rows = self._as_rows(indices)

        def select(storage: torch.Tensor) -> torch.Tensor:
            shape = (len(indices), *storage.shape[1:])
            out = torch.empty(shape, dtype=torch.uint8, device=self.device, pin_memory=pin_memory)
            return torch.index_select(storage, 0, rows, out=out)

        return Batch(select(self.images), select(self.masks), indices)

    def _as_rows(self, indices: NDArray[np.int64]) -> torch.Tensor:
        rows = torch.from_numpy(indices)
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # otherwise the copy waits for the running step
        return rows.to(self.device, non_blocking=True)

    def is_complete(self, bad: list[int]) -> bool:
        """Whether all rows but the `bad` ones are filled."""
        done = self.filled.copy()
        done[bad] = True
        return bool(done.all())

    def publish(self, bad: list[int]) -> None:
        """Make the cache available to later runs if it can be, and if all rows but the `bad` ones are filled."""


class DiskCache(Cache):
    """A cache in one file, reused by later runs.

    It is filled in a temporary file that takes its final name when it is complete. A run that dies leaves the last
    complete file untouched, and the next run removes the temporary one. Each row has a stamp of its two files (names,
    sizes, times): rows with an unchanged stamp are copied from the old file, the others are decoded again. Processes
    that map the old file keep it.

    Args:
        decoder: of the pixels to cache.
        folder: of the cache files.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, decoder: HostDecoder, folder: Path) -> None:
        pairs, height, width = decoder.pairs, decoder.height, decoder.width
        pixels = [FORMAT, os.path.realpath(pairs.image_dir), os.path.realpath(pairs.mask_dir)]
        pixels += [height, width, decoder.mask_resize, decoder.name]
        pixels += [decoder.encoding.key] if decoder.encoding else []
        key = hashlib.sha256(repr(pixels).encode()).hexdigest()[:16]
        names = hashlib.sha256("\0".join([*pairs.images, *pairs.masks]).encode()).hexdigest()[:16]
        self.path = folder / f"{key}-{names}.fastseg"
        self.stamps = _stamps(pairs)
        self._temporary: IO[bytes] | None = None
        _remove_orphans(folder)
        shape = (len(pairs), height, width)
        published = _Rows.open(self.path, shape)
        if published is not None and np.array_equal(published.stamps, self.stamps):
            super().__init__(torch.from_numpy(published.images), torch.from_numpy(published.masks))
            self.filled[:] = True
            log.info("disk cache: %d pairs from %s", len(pairs), self.path)
            return
        self._temporary, self._rows = _Rows.create(self.path, shape, self.stamps)
        self._close_temporary = weakref.finalize(self, _close, self._temporary)
        super().__init__(torch.from_numpy(self._rows.images), torch.from_numpy(self._rows.masks))
        for other in sorted(folder.glob(f"{key}-*.fastseg")):  # the same folders, perhaps split in another way
            self._copy_rows(_Rows.open(other, (None, height, width)))
        log.info("disk cache: %d of %d pairs already in %s", self.filled.sum(), len(pairs), folder)

    def _copy_rows(self, old: "_Rows | None") -> None:
        if old is None:
            return
        row_of = {stamp.tobytes(): row for row, stamp in enumerate(old.stamps)}
        for row in np.flatnonzero(~self.filled):
            source = row_of.get(self.stamps[row].tobytes())
            if source is not None:
                self.images.numpy()[row] = old.images[source]
                self.masks.numpy()[row] = old.masks[source]
                self.filled[row] = True

    def publish(self, bad: list[int]) -> None:
        if self._temporary is None or not self.is_complete(bad):
            return
        self._rows.stamps[~self.filled] = 0  # the stamp of no file, so that the next run tries these pairs again
        try:
            for part in (self._rows.stamps, self._rows.images, self._rows.masks):
                part.flush()
            os.fsync(self._temporary.fileno())
            os.replace(self._temporary.name, self.path)
            log.info("disk cache: wrote %s", self.path)
        except OSError as error:  # this run does not need the file: its rows stay mapped
            log.warning("disk cache: %s cannot be written (%s); the next run decodes again", self.path, error.strerror)
        self._temporary = None
        self._close_temporary()


class _Rows:
    """A cache file mapped into memory: a JSON header, then stamps, images and masks."""

    def __init__(self, file: IO[bytes], shape: tuple[int, int, int], mode: Any) -> None:
        count, height, width = shape
        offsets = np.cumsum([HEADER_BYTES, count * STAMP_BYTES, count * height * width * 3])
        shapes = [(count, STAMP_BYTES), (count, height, width, 3), shape]
        self.stamps, self.images, self.masks = (
            np.memmap(file, np.uint8, mode, offset, part) for offset, part in zip(offsets, shapes, strict=True)
        )

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int], stamps: NDArray[np.uint8]) -> tuple[IO[bytes], "_Rows"]:
        """A temporary file for `path`, locked, and its rows."""
        file = open(f"{path}.{uuid.uuid4().hex}.part", "x+b")  # noqa: SIM115 (closed by _close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps({"format": FORMAT, "shape": shape}).encode().ljust(HEADER_BYTES))
            file.flush()
            os.posix_fallocate(file.fileno(), 0, _file_bytes(shape))  # fails now if the disk is full, not in the epoch
            rows = cls(file, shape, "r+")
        except OSError:
            _close(file)
            raise
        if not os.path.exists(file.name):  # another process removed it as an orphan before it was locked
            file.close()
            return cls.create(path, shape, stamps)
        rows.stamps[:] = stamps
        return file, rows

    @classmethod
    def open(cls, path: Path, shape: tuple[int | None, int, int]) -> "_Rows | None":
        """The rows of a complete file of this shape (None: any number of rows); None if there is no such file."""
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(HEADER_BYTES))
                found = tuple(header["shape"])
                fits = header["format"] == FORMAT and found[1:] == shape[1:] and shape[0] in (None, found[0])
                if not fits or os.fstat(file.fileno()).st_size != _file_bytes(found):
                    return None
                return cls(file, found, "c")  # copy on write: torch requires writable memory, but nothing writes
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _file_bytes(shape: tuple[int, int, int]) -> int:
    count, height, width = shape
    return HEADER_BYTES + count * (STAMP_BYTES + height * width * 4)


def _stamps(pairs: Pairs) -> NDArray[np.uint8]:
    """(N, 16): a hash of the paths, sizes and modification times of each pair's files."""

    def stamp(path: str) -> str:
        try:
            status = os.stat(path)
        except OSError:
            return f"{path} is missing"
        return f"{path} {status.st_size} {status.st_mtime_ns}"

    def rows() -> Iterator[bytes]:
        for index in range(len(pairs)):
            text = stamp(pairs.image_path(index)) + "\0" + stamp(pairs.mask_path(index))
            yield hashlib.blake2b(text.encode(), digest_size=STAMP_BYTES).digest()

    return np.frombuffer(b"".join(rows()), np.uint8).reshape(len(pairs), STAMP_BYTES)


def _remove_orphans(folder: Path) -> None:
    """Delete temporary files whose process has died: a live process holds a lock on its file."""
    for path in folder.glob("*.fastseg.*.part"):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # locked, or already deleted by another process
            continue


def _close(temporary: IO[bytes]) -> None:
    """Close a temporary file and delete it, unless it has its final name; runs at the latest when the program ends."""
    Path(temporary.name).unlink(missing_ok=True)
    temporary.close()


def open_cache(
    kind: str, decoder: HostDecoder, device: torch.device, cache_dir: str = "", *, log_level: int = logging.INFO
) -> Cache | None:
    """The cache for a loader; None for "off".

    Args:
        kind: "device", "memory", "disk", "off", or "auto": the fastest whose free space is twice the cache's size.
        decoder: of the pixels to cache.
        cache_dir: folder of disk caches; empty: `fastseg` in the user's cache folder.
        log_level: at which the choice is logged.

    Raises:
        OutputError: the folder cannot be written.
        ConfigError: there is not enough memory.
    """
    shape = (len(decoder.pairs), decoder.height, decoder.width)
    size = math.prod(shape) * 4
    reason = "as configured"
    if kind == "auto":
        kind, reason = _choose_cache(size, device, _cache_folder(cache_dir))
    log.log(log_level, "cache: %s (%s)", kind, reason)
    if kind == "off":
        return None
    if kind == "disk":
        folder = _cache_folder(cache_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return DiskCache(decoder, folder)
        except OSError as error:
            raise OutputError(folder, error, "Make room, give another cache_dir, or use cache=off") from None
    place = device if kind == "device" else torch.device("cpu")
    try:
        images = torch.empty((*shape, 3), dtype=torch.uint8, device=place)
        return Cache(images, torch.empty(shape, dtype=torch.uint8, device=place))
    except RuntimeError:  # torch raises no narrower class on the CPU
        raise ConfigError(
            f"cache: {kind} has no room for the {size / 2**20:.0f} MiB of {shape[0]} pairs. Use cache=disk or off."
        ) from None


def _choose_cache(size: int, device: torch.device, folder: Path) -> tuple[str, str]:
    needs = f"{size / 2**20:.0f} MiB"
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 2:
        return "device", f"{needs} fit into half of the GPU's free memory"
    if size <= free_host_memory() / 2:
        return "memory", f"{needs} fit into half of the free memory"
    existing = next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))
    if size <= shutil.disk_usage(existing).free / 2 and os.access(existing, os.W_OK):
        return "disk", f"{needs} fit into half of the free disk space"
    return "off", f"{needs} fit nowhere"


def _cache_folder(cache_dir: str) -> Path:
    return Path(os.path.expanduser(cache_dir)) if cache_dir else user_cache()
