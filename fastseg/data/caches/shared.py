"""A cache that the processes of a machine share."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import Batch
from fastseg.data.caches.memory import Cache
from fastseg.data.caches.rows import Rows

__all__ = ["RowsCache"]


class RowsCache(Cache):
    """A cache whose rows several processes may map.

    A process writes the stamp of a row after its pixels and their checksum. Another process that sees the stamp
    verifies the checksum when it first reads the row, because a processor may reorder the writes.

    Args:
        rows: storage.
        stamps: (N, STAMP_BYTES) uint8, of filled rows; not zeros.
    """

    def __init__(self, rows: Rows, stamps: NDArray[np.uint8]) -> None:
        super().__init__(torch.from_numpy(rows.images), torch.from_numpy(rows.masks))
        self.rows, self.stamps = rows, stamps
        self._verified = np.zeros(len(stamps), bool)

    def refresh(self) -> None:
        self.filled |= self.rows.stamps.any(axis=1)

    def clear(self) -> None:
        super().clear()
        self.rows.stamps[:] = 0

    def put(self, batch: Batch) -> None:
        super().put(batch)
        for row in batch.indices:
            self.rows.checksums[row] = self.rows.checksum(row)
        self._verified[batch.indices] = True
        self.rows.stamps[batch.indices] = self.stamps[batch.indices]

    def find_damaged(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        unread = indices[~self._verified[indices]]
        intact = np.array([self.rows.is_intact(row) for row in unread], bool)
        self._verified[unread[intact]] = True
        self.filled[unread[~intact]] = False
        return unread[~intact]
