"""What decoders yield, and what becomes of a file that breaks while they run."""

import itertools
import logging
import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.pairs import Pairs
from fastseg.errors import DataError

__all__ = ["BadSamples", "Batch", "wait_on_current_stream"]

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Decoded pairs, uint8 until they are on the training device."""

    images: torch.Tensor  # (B, H, W, 3) uint8
    masks: torch.Tensor  # (B, H, W) uint8: coverage 0..255
    indices: NDArray[np.int64]  # (B,) which pairs these are


def wait_on_current_stream(batch: Batch, written: torch.cuda.Event) -> Batch:
    """A batch that another stream writes, for use on the current one, which waits for `written`; the host does not.

    The memory is not used again for other batches before the current stream has done with it.
    """
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(written)
    batch.images.record_stream(stream)
    batch.masks.record_stream(stream)
    return batch


class BadSamples:
    """Files that broke after the header check: `found` holds each index and its reason, in the order met.

    With "raise" the first one ends the run. With "skip" each is named once, and the pair that follows it in the
    list takes its place: a rule that depends on the files alone, so every decoder and thread count gives the same.
    """

    def __init__(self, pairs: Pairs, policy: str) -> None:
        self.pairs = pairs
        self.policy = policy
        self.found: dict[int, str] = {}
        self._lock = threading.Lock()

    def report(self, index: int, error: DataError) -> None:
        """Note that a pair cannot be used.

        Raises:
            DataError: the policy is "raise".
        """
        if self.policy == "raise":
            raise DataError(f'{error}. Replace the file, or pass bad_samples="skip" to leave it out.') from None
        with self._lock:  # threads may meet a pair at the same time
            if index in self.found:
                return
            self.found[index] = str(error)
        log.warning("left out: %s", error)

    def replacement(self, index: int) -> int:
        """The pair to use for `index`: itself, or the first one after it that is not known to be bad.

        Raises:
            DataError: no pair is left.
        """
        for candidate in itertools.chain(range(index, len(self.pairs)), range(index)):
            if candidate not in self.found:
                return candidate
        raise DataError(f"{self.pairs.image_dir}: not one of its {len(self.pairs)} pairs can be used.")
