"""The class of each cell of the sampling grid: that of most of its area, or that under its centre.

The compiled functions release the GIL. A compiled function must not call one of another file: numba's cache does not
notice when that one changes.
"""

import numpy as np
from numpy.typing import NDArray

from fastseg.data.gif import Bytes, compiled
from fastseg.data.labels.encoding import UNLISTED
from fastseg.data.resample import sampling_grid

__all__ = ["count_bytes", "index_colours", "vote"]


@compiled
def _vote(
    stored: Bytes, table: Bytes, num_classes: int, extent_x: int, extent_y: int, by_centre: bool, out: Bytes
) -> bool:
    """See `vote`; returns whether every pixel has a class or is ignored.

    Where a row of cells changes from pixel to pixel is found first, many columns at a time. Most cells have no change,
    and need no vote; a cell whose edge is one gets its vote in vain. The area that a class covers is exact: an integer,
    in units of 1 / (target_width * target_height) pixels.
    """
    height, width = stored.shape
    target_height, target_width = out.shape
    changes = np.zeros((width + 7) // 8 * 8, np.uint8)
    by_8 = changes.view(np.uint64)
    is_mixed = np.empty(target_width, np.bool_)
    areas = np.zeros(256, np.int64)
    starts, ends = np.empty(target_width, np.int64), np.empty(target_width, np.int64)  # of the cells, columns
    for c in range(target_width):
        starts[c] = c * extent_x // target_width
        ends[c] = ((c + 1) * extent_x + target_width - 1) // target_width
    all_listed = True
    for r in range(target_height):
        top, bottom = r * extent_y, (r + 1) * extent_y
        first_y, end_y = top // target_height, (bottom + target_height - 1) // target_height
        first = stored[min(first_y, height - 1)]
        changes[0] = 0
        for x in range(1, width):
            changes[x] = first[x] ^ first[x - 1]
        for y in range(first_y + 1, min(end_y, height)):
            row = stored[y]
            for x in range(width):
                changes[x] |= row[x] ^ first[x]
        is_mixed[:] = False
        for word in range(by_8.size):
            if by_8[word] != 0:
                for x in range(8 * word, 8 * word + 8):
                    if changes[x] != 0:
                        for c in range(x * target_width // extent_x, ((x + 1) * target_width - 1) // extent_x + 1):
                            is_mixed[c] = True
        centre_y = min((2 * r + 1) * extent_y // (2 * target_height), height - 1)
        for c in range(target_width):
            index = np.int64(table[first[min(starts[c], width - 1)]])
            if is_mixed[c]:
                left, right = c * extent_x, (c + 1) * extent_x
                areas[:num_classes] = 0
                areas[UNLISTED:] = 0
                for y in range(first_y, end_y):
                    weight = min(bottom, (y + 1) * target_height) - max(top, y * target_height)
                    row = stored[min(y, height - 1)]
                    for x in range(starts[c], ends[c]):
                        part = min(right, (x + 1) * target_width) - max(left, x * target_width)
                        areas[table[row[min(x, width - 1)]]] += weight * part
                all_listed &= areas[UNLISTED] == 0
                if by_centre:
                    index = np.int64(table[stored[centre_y, min((left + right) // (2 * target_width), width - 1)]])
                else:
                    index = np.int64(255)  # ignored
                    for at in range(num_classes - 1, -1, -1):  # of equal areas the lowest class wins
                        if areas[at] >= areas[index]:
                            index = np.int64(at)
            all_listed &= index != UNLISTED
            out[r, c] = index
    return all_listed


@compiled
def _index_colours(pixels: Bytes, codes: NDArray[np.int32], indices: Bytes, out: Bytes) -> None:
    """See `index_colours`. Neighbours mostly have one colour, so the last one found is tried first."""
    last_code, last_index = np.int64(-1), np.int64(UNLISTED)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            code = 65536 * np.int64(pixels[y, x, 0]) + 256 * np.int64(pixels[y, x, 1]) + np.int64(pixels[y, x, 2])
            if code != last_code:
                low, high = 0, codes.size
                while low < high:
                    middle = (low + high) // 2
                    if codes[middle] < code:
                        low = middle + 1
                    else:
                        high = middle
                last_code = code
                last_index = np.int64(UNLISTED)
                if low < codes.size and codes[low] == code:
                    last_index = np.int64(indices[low])
            out[y, x] = last_index


@compiled
def _count_bytes(stored: Bytes) -> NDArray[np.int64]:
    """See `count_bytes`. Runs of one byte are counted at once."""
    counts = np.zeros(256, np.int64)
    for row in stored:
        first, last = 0, row[0]
        for x in range(1, row.size):
            if row[x] != last:
                counts[last] += x - first
                first, last = x, row[x]
        counts[last] += row.size - first
    return counts


def count_bytes(stored: Bytes) -> NDArray[np.int64]:
    """Pixels of each byte of (H, W) uint8, (256,)."""
    return _count_bytes(_read_only(stored))


def vote(stored: Bytes, table: Bytes, num_classes: int, out: Bytes, mode: str) -> bool:
    """Write the class of each cell.

    Args:
        stored: (H, W) uint8, C-contiguous: the bytes of a mask.
        table: (256,) uint8, the class index of each byte, `IGNORED` or `UNLISTED`.
        num_classes: the indices in the table are below it.
        out: (target_height, target_width) uint8, written. "area": the index that covers most of the cell, on the grid
            of `resample.sampling_grid`; of equal areas the lowest. Ignored pixels vote, too. "nearest": the index
            under the cell's centre.

    Returns:
        Whether no pixel of the mask, also of those under no centre, is `UNLISTED`.
    """
    (height, width), (target_height, target_width) = stored.shape, out.shape
    grid = sampling_grid(width, height, target_width, target_height)
    return _vote(_read_only(stored), table, num_classes, grid.extent_x, grid.extent_y, mode == "nearest", out)


def index_colours(pixels: Bytes, codes: NDArray[np.int32], indices: Bytes) -> Bytes:
    """The class index of each pixel of (H, W, 3) RGB, as (H, W) uint8; `UNLISTED` for colours that are no class.

    Args:
        codes, indices: of `ClassEncoding.codes`.
    """
    out = np.empty(pixels.shape[:2], np.uint8)
    _index_colours(_read_only(pixels), codes, indices, out)
    return out


def _read_only(values: Bytes) -> Bytes:
    """C-contiguous and read-only, as Pillow's pixels are: numba compiles once for those and once for the others."""
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False
    return view
