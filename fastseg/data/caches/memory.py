"""A cache in GPU memory or in RAM, for one process."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import Batch

__all__ = ["Cache"]


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

    def refresh(self) -> None:
        """Mark the rows that other processes have filled."""

    def clear(self) -> None:
        """Mark all rows as not filled."""
        self.filled[:] = False

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
