"""Masks at their own size, and photos that help to find them, decoded by threads a few ahead of whoever takes them.

A pair of 1918x1280 takes some 5 ms and 3 MB, so that nobody wants a batch of them at once, nor wait for one.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.data.decode import Size, decode_full_mask
from fastseg.data.host import decode_file, load_photo
from fastseg.data.pairs import Pairs
from fastseg.runtime.threads import count_threads

__all__ = ["FullPair", "decode_full_pairs"]


class FullPair(NamedTuple):
    """A mask at its own size, and its photo on the grid that was asked for."""

    photo: NDArray[np.uint8] | None  # (h, w, 3)
    mask: NDArray[np.bool_]  # (H, W)


def decode_full_pairs(
    pairs: Pairs, *, num_workers: int, photo_size: Size | None
) -> Generator[Future[FullPair], None, None]:
    """Every pair in order, two for each thread decoded or being decoded ahead.

    Args:
        num_workers: threads; 0: one a core.
        photo_size: height and width of the grid onto which photos are decoded; None where they are not wanted.

    Yields:
        A future whose result raises DataError, which names the file, where that is damaged: the caller decides whether
        to go on.
    """

    num_workers = count_threads(num_workers)

    def decode(index: int) -> FullPair:
        photo = None if photo_size is None else load_photo(pairs.image_path(index), photo_size)
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
