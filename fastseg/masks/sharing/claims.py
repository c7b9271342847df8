"""Which process predicts which photos: batch by batch, the next one goes to the process that is free.

Ranks of torchrun count the batches in torch's store. Processes that `--resume` into one folder, on any machines that
share it, lock the bytes of a file there: the system releases the locks of a process that dies, and the others then find
the results that its batch lacks.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from itertools import count

from fastseg.errors import OutputError
from fastseg.runtime.distributed import count_on_store, get_world_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claims", "choose_claims"]

LOCK = ".fastseg.claims"  # in the output folder, while processes work there
WAIT_SECONDS = 0.5  # between looks at the batches of other processes

log = logging.getLogger(__name__)

calls = count()  # of ranks that predict more than once


class Claims:
    """All batches, for one process."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def rounds(self) -> Iterator[Iterator[int]]:
        """The batches of this process, in ascending order; a round must end before the next one begins."""
        yield iter(range(self.num_batches))

    def release(self, batch: int) -> None:
        """Tell that a batch is done."""

    def close(self) -> None:
        """Release everything."""


class _RankClaims(Claims):
    """Batches that the ranks of a process group take in turn."""

    def rounds(self) -> Iterator[Iterator[int]]:
        yield self._take(f"fastseg/predict/{next(calls)}")

    def _take(self, key: str) -> Iterator[int]:
        while (batch := count_on_store(key)) < self.num_batches:
            yield batch


class _FileClaims(Claims):
    """Batches that independent processes take in turn: byte b of a file is locked by the process that has batch b.

    Each process also takes the batches of the others once they are released, and finds their results. Without locks,
    as on some network file systems, every process takes every batch: more work, with the same results.
    """

    def __init__(self, num_batches: int, folder: str) -> None:
        super().__init__(num_batches)
        self._path = os.path.join(folder, LOCK)
        self._remaining = list(range(num_batches))
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(self._path, error) from None

    def rounds(self) -> Iterator[Iterator[int]]:
        while self._remaining:
            yield self._take()
            if self._remaining:
                log.debug("%d batches belong to other processes", len(self._remaining))
                time.sleep(WAIT_SECONDS)

    def _take(self) -> Iterator[int]:
        others = []
        for batch in self._remaining:
            if self._lock(batch):
                yield batch
            else:
                others.append(batch)
        self._remaining = others

    def _lock(self, batch: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, batch)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            log.debug("%s: cannot be locked (%s)", self._path, error.strerror)
        return True

    def release(self, batch: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, batch)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the whole file: fails while anybody has a batch
            os.unlink(self._path)
        os.close(self._file)


def choose_claims(num_batches: int, out: str, *, resume: bool) -> Claims:
    """The claims of this process on batches whose results are written to `out`.

    Raises:
        OutputError: `out` cannot be written.
    """
    if get_world_size() > 1:
        return _RankClaims(num_batches)
    return _FileClaims(num_batches, out) if resume and fcntl is not None else Claims(num_batches)
