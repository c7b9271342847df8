"""Caches of decoded pairs, uint8, filled in the first epoch: in GPU memory, in RAM, or in a memory-mapped file.

Carvana's training set takes 0.8 GB at 160x240. With a cache, each pair is decoded once.
"""

import hashlib
import logging
import math
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import Batch
from fastseg.data.formats.rows import FORMAT, STAMP_BYTES, Rows, TemporaryRows, remove_orphans
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.errors import ConfigError, OutputError
from fastseg.runtime.files import user_cache
from fastseg.runtime.memory import free_host_memory

__all__ = ["Cache", "DiskCache", "open_cache"]

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

    def find_damaged(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the filled rows that must be decoded again; they are not filled any more."""
        return indices[:0]

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
    that map the old file keep it. Each row also has a checksum, which is verified when the row is first read.

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
        names = hashlib.sha256(os.fsencode("\0".join([*pairs.images, *pairs.masks]))).hexdigest()[:16]
        self.path = folder / f"{key}-{names}.fastseg"
        self.stamps = _stamps(pairs)
        self._temporary: TemporaryRows | None = None
        remove_orphans(folder)
        shape = (len(pairs), height, width)
        self._verified = np.zeros(len(pairs), bool)
        published = Rows.open(self.path, shape)
        if published is not None and np.array_equal(published.stamps, self.stamps):
            self._rows = published
            super().__init__(torch.from_numpy(published.images), torch.from_numpy(published.masks))
            self.filled[:] = True
            log.info("disk cache: %d pairs from %s", len(pairs), self.path)
            return
        self._temporary = TemporaryRows(self.path, shape, self.stamps)
        self._rows = self._temporary.rows
        weakref.finalize(self, self._temporary.close)  # runs at the latest when the program ends
        super().__init__(torch.from_numpy(self._rows.images), torch.from_numpy(self._rows.masks))
        for other in sorted(folder.glob(f"{key}-*.fastseg")):  # the same folders, perhaps split in another way
            self._copy_rows(Rows.open(other, (None, height, width)))
        log.info("disk cache: %d of %d pairs already in %s", self.filled.sum(), len(pairs), folder)

    def _copy_rows(self, old: Rows | None) -> None:
        if old is None:
            return
        row_of = {stamp.tobytes(): row for row, stamp in enumerate(old.stamps)}
        for row in np.flatnonzero(~self.filled):
            source = row_of.get(self.stamps[row].tobytes())
            if source is not None and old.is_intact(source):
                self.images.numpy()[row] = old.images[source]
                self.masks.numpy()[row] = old.masks[source]
                self._rows.checksums[row] = old.checksums[source]
                self.filled[row] = self._verified[row] = True

    def put(self, batch: Batch) -> None:
        super().put(batch)
        for row in batch.indices:
            self._rows.checksums[row] = self._rows.checksum(row)
        self._verified[batch.indices] = True

    def find_damaged(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        unread = indices[~self._verified[indices]]
        intact = np.array([self._rows.is_intact(row) for row in unread], bool)
        self._verified[unread[intact]] = True
        damaged = unread[~intact]
        if len(damaged):
            self.filled[damaged] = False
            log.warning("disk cache: %d pairs in %s are damaged; it is removed", len(damaged), self.path)
            self.path.unlink(missing_ok=True)
        return damaged

    def publish(self, bad: list[int]) -> None:
        if self._temporary is None or not self.is_complete(bad):
            return
        self._rows.stamps[~self.filled] = 0  # the stamp of no file, so that the next run tries these pairs again
        try:
            self._temporary.publish()
            log.info("disk cache: wrote %s", self.path)
        except OSError as error:  # this run does not need the file: its rows stay mapped
            log.warning("disk cache: %s cannot be written (%s); the next run decodes again", self.path, error.strerror)
        self._temporary.close()
        self._temporary = None


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
            yield hashlib.blake2b(os.fsencode(text), digest_size=STAMP_BYTES).digest()

    return np.frombuffer(b"".join(rows()), np.uint8).reshape(len(pairs), STAMP_BYTES)


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
