"""The sampling grid that image and mask share, and the area average or the nearest pixel of each of its cells.

libjpeg-turbo can decode a JPEG at 1/8, 1/4 or 1/2 of its size, which skips most of the work. The result then covers
whole blocks: 1918 columns at 1/8 are 240 pixels that cover 1920 columns. A mask resized from its own 1918 columns to
240 would drift away from that image, by 2 columns at the right edge. So both are sampled over the extent that the
scaled JPEG covers, where pixels beyond the image repeat its edge.

The compiled functions release the GIL, so that threads run them in parallel.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.data.gif import Bytes, compiled
from fastseg.errors import DataError

__all__ = [
    "MASK_MODES",
    "Grid",
    "binary_mask",
    "mask_from_array",
    "resize_area",
    "sample_mask",
    "sampling_grid",
]

MASK_MODES = ("area", "nearest")


class Grid(NamedTuple):
    """Target cell (r, c) covers columns [c, c + 1) * extent_x / target_width of the source, and rows accordingly."""

    denominator: int  # 1, 2, 4 or 8: the JPEG is decoded at 1/denominator
    extent_x: int  # source columns that the target covers: width rounded up to a multiple of denominator
    extent_y: int


def sampling_grid(width: int, height: int, target_width: int, target_height: int) -> Grid:
    """The grid for images and masks of `width` x `height` source pixels.

    It is that of the smallest JPEG scale that is at least as large as the target, or of scale 1 if none is.

    Raises:
        ValueError: a size is below 1.

    >>> sampling_grid(1918, 1280, 240, 160)
    Grid(denominator=8, extent_x=1920, extent_y=1280)
    """
    if min(width, height, target_width, target_height) < 1:
        sizes = f"{width} x {height} and {target_width} x {target_height}"
        raise ValueError(f"image and target must have at least one pixel; got {sizes}.")
    denominator = 8
    while denominator > 1 and (-(-width // denominator) < target_width or -(-height // denominator) < target_height):
        denominator //= 2
    return Grid(denominator, -(-width // denominator) * denominator, -(-height // denominator) * denominator)


@compiled
def _average_cells(source: Bytes, num_channels: int, extent_x: int, extent_y: int, scale: int, out: Bytes) -> None:
    """Area average over cells of any size, times `scale`, rounded half up.

    The result is exact: a cell's sum is an integer in units of 1 / (target_width * target_height) pixels, below 2**53,
    and the quotient of two such integers is further from the next integer than the rounding error of a float64.

    Args:
        source: uint8 (H, W * num_channels); pixels beyond it, up to the extent, repeat its edge.
        extent_x, extent_y: in pixels of the source; extent_y below 2**24, so that uint32 holds the sum of a column.
        out: uint8 (target_height, target_width * num_channels), written.
    """
    last_row, num_columns = source.shape[0] - 1, source.shape[1]
    target_height, target_width = out.shape[0], out.shape[1] // num_channels
    # Cell c ends within pixel whole[c + 1], of which it takes part[c + 1] / target_width.
    whole, part = np.empty(target_width + 1, np.int64), np.empty(target_width + 1, np.int64)
    for c in range(target_width + 1):
        whole[c] = c * extent_x // target_width
        part[c] = c * extent_x - whole[c] * target_width
    rows = np.zeros((extent_x + 1) * num_channels, np.uint32)  # weighted sum of rows, then one pixel of 0
    before = np.empty(extent_x + 1, np.int64)  # sum of `rows` before a pixel
    divisor = np.float64(extent_x) * np.float64(extent_y)
    for r in range(target_height):
        for i in range(rows.size):
            rows[i] = 0
        top, bottom = r * extent_y, (r + 1) * extent_y
        for y in range(top // target_height, (bottom + target_height - 1) // target_height):
            weight = np.uint32(min(bottom, (y + 1) * target_height) - max(top, y * target_height))
            row = source[min(y, last_row)]
            for i in range(num_columns):
                rows[i] += weight * row[i]
        for i in range(num_columns, extent_x * num_channels):
            rows[i] = rows[i - num_channels]
        for channel in range(num_channels):
            total = np.int64(0)
            for x in range(extent_x + 1):
                before[x] = total
                total += np.int64(rows[x * num_channels + channel])
            last = np.int64(0)
            for c in range(target_width):
                end = whole[c + 1]
                upto = target_width * before[end] + part[c + 1] * np.int64(rows[end * num_channels + channel])
                # floor(scale * sum / divisor + 1/2)
                value = (2 * scale * (upto - last) + divisor) / (2 * divisor)
                out[r, c * num_channels + channel] = np.uint8(value)
                last = upto


@compiled
def _average_blocks(mask: Bytes, block_x: int, block_y: int, out: Bytes) -> None:
    """Faster `_average_cells` for a mask of 0 and 1, scale 255, and cells of 1, 2, 4 or 8 by up to 31 pixels.

    Rows are added as bytes; one multiplication then adds the bytes of a cell, whose sum is below 256.
    """
    last_row, num_columns = mask.shape[0] - 1, mask.shape[1]
    extent_x, area = block_x * out.shape[1], block_x * block_y
    coverage = np.empty(256, np.uint8)
    for count in range(area + 1):
        coverage[count] = (510 * count + area) // (2 * area)
    rows = np.empty((extent_x + 7) // 8 * 8, np.uint8)
    by_8, by_4, by_2 = rows.view(np.uint64), rows.view(np.uint32), rows.view(np.uint16)
    for r in range(out.shape[0]):
        cells, row = out[r], mask[min(r * block_y, last_row)]
        for x in range(num_columns):
            rows[x] = row[x]
        for y in range(r * block_y + 1, (r + 1) * block_y):
            row = mask[min(y, last_row)]
            for x in range(num_columns):
                rows[x] += row[x]
        for x in range(num_columns, extent_x):
            rows[x] = rows[num_columns - 1]
        if block_x == 8:
            for c in range(cells.size):
                cells[c] = coverage[(by_8[c] * np.uint64(0x0101010101010101)) >> np.uint64(56)]
        elif block_x == 4:
            for c in range(cells.size):
                cells[c] = coverage[np.uint32(by_4[c] * np.uint32(0x01010101)) >> np.uint32(24)]
        elif block_x == 2:
            for c in range(cells.size):
                cells[c] = coverage[np.uint16(by_2[c] * np.uint16(0x0101)) >> np.uint16(8)]
        else:
            for c in range(cells.size):
                cells[c] = coverage[rows[c]]


@compiled
def _pick_centres(mask: Bytes, extent_x: int, extent_y: int, out: Bytes) -> None:
    """255 times the pixel under the centre of each cell."""
    last_row, last_column = mask.shape[0] - 1, mask.shape[1] - 1
    target_height, target_width = out.shape
    columns = np.empty(target_width, np.int64)
    for c in range(target_width):
        columns[c] = min((2 * c + 1) * extent_x // (2 * target_width), last_column)
    for r in range(target_height):
        row = mask[min((2 * r + 1) * extent_y // (2 * target_height), last_row)]
        for c in range(target_width):
            out[r, c] = row[columns[c]] * np.uint8(255)


def sample_mask(mask: Bytes, out: Bytes, mode: str = "area") -> None:
    """Samples a mask over its grid.

    Args:
        mask: uint8 (H, W) of 0 and 1, C-contiguous.
        out: uint8 (target_height, target_width), written: coverage 0..255, or only 0 and 255 with "nearest".
        mode: "area" for the area average of each cell, "nearest" for the pixel under its centre.

    Raises:
        ValueError: the mode is unknown, or the mask or the target has no pixel.
    """
    if mode not in MASK_MODES:
        raise ValueError(f"mode must be one of {', '.join(MASK_MODES)}; got {mode!r}.")
    (height, width), (target_height, target_width) = mask.shape, out.shape
    grid = sampling_grid(width, height, target_width, target_height)
    block_x, rest_x = divmod(grid.extent_x, target_width)
    block_y, rest_y = divmod(grid.extent_y, target_height)
    if mode == "nearest":
        _pick_centres(mask, grid.extent_x, grid.extent_y, out)
    elif rest_x == rest_y == 0 and block_x in (1, 2, 4, 8) and block_y < 32:
        _average_blocks(mask, block_x, block_y, out)
    else:
        _average_cells(mask, 1, grid.extent_x, grid.extent_y, 255, out)


@compiled
def _split_values(values: Bytes, mask: Bytes) -> bool:
    """Sets the mask to 1 where the value is the highest and above 0, else 0; returns whether there are at most two."""
    low = high = values[0, 0]
    for row in values:
        for value in row:
            low, high = min(low, value), max(high, value)
    others = False
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            value = values[y, x]
            others |= (value != low) & (value != high)
            mask[y, x] = (value == high) & (high > 0)
    return not others


def binary_mask(values: NDArray[Any]) -> Bytes:
    """A decoded mask of any two values as 0 and 1.

    Args:
        values: uint8 or bool (H, W). The higher value is foreground; a single value is, if it is above 0.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: there are more than two values.
        ValueError: shape or dtype differ, or there is no pixel.
    """
    if values.ndim != 2 or values.dtype not in (np.uint8, np.bool_) or values.size == 0:
        raise ValueError(f"a mask must be uint8 or bool (H, W), not empty; got {values.dtype} {values.shape}.")
    mask = np.empty(values.shape, np.uint8)
    if not _split_values(np.ascontiguousarray(values).view(np.uint8), mask):
        found = np.unique(values).size
        raise DataError(f"must have two values, background and foreground; found {found}", "values")
    return mask


def mask_from_array(values: NDArray[Any], target_height: int, target_width: int, mode: str = "area") -> Bytes:
    """`binary_mask`, then `sample_mask` into a new array (target_height, target_width)."""
    out = np.empty((target_height, target_width), np.uint8)
    sample_mask(binary_mask(values), out, mode)
    return out


def resize_area(image: Bytes, grid: Grid, target_height: int, target_width: int, out: Bytes | None = None) -> Bytes:
    """Exact area average of an image over its grid.

    (Pillow's BOX gives it only if cells are whole pixels: otherwise it assigns each pixel to one cell.)

    Args:
        image: uint8 (H, W) or (H, W, C), decoded at 1 / grid.denominator or at full size.
        grid: for the image's full size and this target.
        out: uint8 (target_height, target_width[, C]), C-contiguous, written; a new array if None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"an image must be uint8 (H, W) or (H, W, C); got {image.dtype} {image.shape}.")
    scaled = (grid.extent_y // grid.denominator, grid.extent_x // grid.denominator)
    extent_y, extent_x = scaled if image.shape[:2] == scaled else (grid.extent_y, grid.extent_x)
    if not all(0 <= e - n < grid.denominator for e, n in zip((extent_y, extent_x), image.shape[:2], strict=True)):
        raise ValueError(f"an image for {grid} must be {scaled[1]} x {scaled[0]} or full size; got {image.shape}.")
    shape = (target_height, target_width, *image.shape[2:])
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 {shape}; got {out.dtype} {out.shape}.")
    if image.shape == shape:
        np.copyto(out, image)  # already one pixel per cell
    else:
        rows = np.ascontiguousarray(image).reshape(image.shape[0], -1)
        _average_cells(rows, num_channels, extent_x, extent_y, 1, out.reshape(target_height, -1))
    return out
