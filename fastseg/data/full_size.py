"""Pairs at their own size, decoded by threads a few ahead of whoever takes them.

A photo of 1918x1280 takes 5 ms and 7 MB, so that nobody wants a batch of them at once, nor wait for one.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.data.decode import decode_full_mask, decode_full_photo
from fastseg.data.host import decode_file
from fastseg.data.pairs import Pairs

__all__ = ["FullPair", "decode_full_pairs"]


class FullPair(NamedTuple):
    """A pair at its own size; the photo only where it is asked for."""

    photo: NDArray[np.uint8] | None  # (H, W, 3)
    mask: NDArray[np.bool_]  # (H, W)


def decode_full_pairs(pairs: Pairs, *, num_workers: int, with_photo: bool) -> Generator[Future[FullPair], None, None]:
    """Every pair in order, two for each thread decoded or being decoded ahead.

    Yields:
        A future whose result raises DataError, which names the file, where that is damaged: the caller decides whether
        to go on.
    """

    def decode(index: int) -> FullPair:
        photo = decode_file(pairs.image_path(index), decode_full_photo) if with_photo else None
        return FullPair(photo, decode_file(pairs.mask_path(index), decode_full_mask))

    waiting: deque[Future[FullPair]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="fastseg-full-size") as pool:
        try:
            for index in range(len(pairs)):
                waiting.append(pool.submit(decode, index))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft()
            yield from waiting
        finally:  # the caller may leave early; then what is queued is dropped
            for future in waiting:
                future.cancel()
