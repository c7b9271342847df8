"""The batches that decoders yield, and the pairs that turn out to be broken while they run."""

import itertools
import logging
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.pairs import Pairs
from fastseg.errors import DataError

__all__ = ["BadSamples", "Batch", "empty_batch", "wait_on_current_stream"]

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Decoded pairs. They stay uint8 until they are on the training device."""

    images: torch.Tensor  # (B, H, W, 3) uint8
    masks: torch.Tensor  # (B, H, W) uint8: coverage 0..255; or class indices, and 255 where ignored
    indices: NDArray[np.int64]  # (B,) of the pairs


def empty_batch(indices: NDArray[np.int64], height: int, width: int, **storage: Any) -> Batch:
    """A batch to be filled; `storage` has the other arguments of `torch.empty`, such as the device."""
    shape = (len(indices), height, width)
    images = torch.empty((*shape, 3), dtype=torch.uint8, **storage)
    return Batch(images, torch.empty(shape, dtype=torch.uint8, **storage), np.array(indices, np.int64))


def wait_on_current_stream(batch: Batch, written: torch.cuda.Event) -> Batch:
    """Make the current stream wait until another stream has written the batch. The host does not wait.

    The batch's memory is not reused before the current stream has finished with it.
    """
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(written)
    batch.images.record_stream(stream)
    batch.masks.record_stream(stream)
    return batch


class BadSamples:
    """Pairs that cannot be decoded; `found` maps the index of each to the reason, in the order of discovery.

    With "raise" the first one ends the run. With "skip" each is logged once, and the next pair in the list replaces
    it. This rule depends on the files alone, so that every decoder and every number of threads gives the same batches.
    """

    def __init__(self, pairs: Pairs, policy: str) -> None:
        self.pairs = pairs
        self.policy = policy
        self.found: dict[int, str] = {}
        self._lock = threading.Lock()

    def report(self, index: int, error: DataError) -> None:
        """Record that a pair cannot be used.

        Raises:
            DataError: the policy is "raise".
        """
        if self.policy == "raise":
            message = f'{error}. Replace the file, or pass bad_samples="skip" to leave it out.'
            raise DataError(message, error.kind) from None
        with self._lock:  # several threads may meet the same pair
            if index in self.found:
                return
            self.found[index] = str(error)
        log.warning("left out: %s", error)

    def replacement(self, index: int) -> int:
        """The pair to use for `index`: itself, or the first one after it that is not known to be broken.

        Raises:
            DataError: every pair is broken.
        """
        for candidate in itertools.chain(range(index, len(self.pairs)), range(index)):
            if candidate not in self.found:
                return candidate
        raise DataError(f"{self.pairs.image_dir}: none of its {len(self.pairs)} pairs can be used. Replace the files.")
