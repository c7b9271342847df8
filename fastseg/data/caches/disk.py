"""A cache in a file, which later runs use too."""

import hashlib
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastseg.data.caches.rows import FORMAT, STAMP_BYTES, Rows, TemporaryRows, remove_orphans
from fastseg.data.caches.shared import RowsCache
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs

__all__ = ["DiskCache", "file_stamps"]

log = logging.getLogger(__name__)


class DiskCache(RowsCache):
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
        stamps = file_stamps(pairs)
        self.temporary: TemporaryRows | None = None
        remove_orphans(folder)
        shape = (len(pairs), height, width)
        published = Rows.open(self.path, shape)
        if published is not None and np.array_equal(published.stamps, stamps):
            super().__init__(published, stamps)
            self.filled[:] = True
            log.info("disk cache: %d pairs from %s", len(pairs), self.path)
            return
        self.temporary = TemporaryRows(self.path, shape)
        weakref.finalize(self, self.temporary.close)  # runs at the latest when the program ends
        super().__init__(self.temporary.rows, stamps)
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
                self.rows.checksums[row] = old.checksums[source]
                self.rows.stamps[row] = self.stamps[row]
                self.filled[row] = self._verified[row] = True

    def find_damaged(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        damaged = super().find_damaged(indices)
        if len(damaged) and self.temporary is None:
            log.warning("disk cache: %d pairs in %s are damaged; it is removed", len(damaged), self.path)
            self.path.unlink(missing_ok=True)
        return damaged

    def publish(self, bad: list[int]) -> None:
        """Rows of bad pairs have no stamp, so that the next run tries these pairs again."""
        if self.temporary is None or not self.is_complete(bad):
            return
        try:
            self.temporary.publish()
            log.info("disk cache: wrote %s", self.path)
        except OSError as error:  # this run does not need the file: its rows stay mapped
            log.warning("disk cache: %s cannot be written (%s); the next run decodes again", self.path, error.strerror)
        self.temporary.close()
        self.temporary = None


def file_stamps(pairs: Pairs) -> NDArray[np.uint8]:
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
