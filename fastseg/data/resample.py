"""The one place that defines the sampling grid of image and mask, and that averages or samples over its cells.

libjpeg-turbo can decode a JPEG at 1/8, 1/4 or 1/2 of its size, which skips most of the work. It then covers whole
blocks: 1918 columns at 1/8 are 240 pixels that cover 1920 columns. A mask resized from its own 1918 columns to 240
would drift away from that image, by 2 columns at the right edge. So both are sampled over the extent that the scaled
JPEG covers, where pixels beyond the image repeat its edge.

The compiled functions take no lock and raise nothing, so that threads run them side by side.
"""

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from fastseg.data import gif
from fastseg.data.gif import OK, Bytes, as_uint8, compiled, decode_binary, gif_error, parse_gif
from fastseg.errors import DataError

__all__ = [
    "MASK_MODES",
    "Grid",
    "decode_mask_into",
    "mask_from_array",
    "mask_from_gif",
    "resize_area",
    "sample_mask",
    "sampling_grid",
]

AREA, NEAREST = 0, 1
MASK_MODES = {"area": AREA, "nearest": NEAREST}


@dataclass(frozen=True)
class Grid:
    """Target cell (r, c) covers columns [c, c + 1) * extent_x / target_width of the source, and rows likewise."""

    denominator: int  # the JPEG is decoded at 1/denominator: 1, 2, 4 or 8
    extent_x: int  # source columns that the target covers: width rounded up to a multiple of denominator
    extent_y: int


@register_jitable
def _grid_numbers(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int, int]:
    denominator = 8
    while denominator > 1 and (-(-width // denominator) < target_width or -(-height // denominator) < target_height):
        denominator //= 2
    return denominator, -(-width // denominator) * denominator, -(-height // denominator) * denominator


def sampling_grid(width: int, height: int, target_width: int, target_height: int) -> Grid:
    """The grid for images and masks of `width` x `height` source pixels.

    It belongs to the smallest JPEG scale that is not below the target; an image below the target has scale 1.

    Raises:
        ValueError: a size is below 1.

    >>> sampling_grid(1918, 1280, 240, 160)
    Grid(denominator=8, extent_x=1920, extent_y=1280)
    """
    if min(width, height, target_width, target_height) < 1:
        sizes = f"{width} x {height} and {target_width} x {target_height}"
        raise ValueError(f"image and target must have at least one pixel; got {sizes}.")
    return Grid(*_grid_numbers(width, height, target_width, target_height))


@compiled
def _average_cells(source: Bytes, num_channels: int, extent_x: int, extent_y: int, scale: int, out: Bytes) -> None:
    """Area average over cells of any size, times `scale`, rounded half up.

    Exact: a cell's sum is an integer in units of 1 / (target_width * target_height) pixels, below 2**53, and the
    quotient of two such integers lies further from the next integer than a float64 can err.

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
    rows = np.zeros((extent_x + 1) * num_channels, np.uint32)  # weighted sum of rows, and a pixel of 0 behind the last
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
    """The same as _average_cells for a mask of 0 and 1, scale 255, and cells of 1, 2, 4 or 8 by up to 31 pixels.

    Rows are added up as bytes; one multiplication then adds up the bytes of a cell, whose sum stays below 256.
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


@compiled
def sample_mask(mask: Bytes, out: Bytes, mode: int) -> None:
    """Samples a mask over its grid.

    Args:
        mask: uint8 (H, W) of 0 and 1, at least one pixel.
        out: uint8 (target_height, target_width), written: coverage 0..255, or only 0 and 255 if nearest.
        mode: 0 for the area average, 1 for the pixel under the centre of the cell.
    """
    if out.size == 0 or mask.size == 0:
        return
    _, extent_x, extent_y = _grid_numbers(mask.shape[1], mask.shape[0], out.shape[1], out.shape[0])
    block_x, block_y = extent_x // out.shape[1], extent_y // out.shape[0]
    if mode == NEAREST:
        _pick_centres(mask, extent_x, extent_y, out)
    elif (
        block_x * out.shape[1] == extent_x
        and block_y * out.shape[0] == extent_y
        and (block_x == 8 or block_x == 4 or block_x == 2 or block_x == 1)
        and block_y < 32
    ):
        _average_blocks(mask, block_x, block_y, out)
    else:
        _average_cells(mask, 1, extent_x, extent_y, 255, out)


def _compile_decode_mask_into(gif_source: str) -> Any:
    # numba keeps machine code by the text of this file and by the values of a closure. It does not see that a function
    # in another file has changed: without the text of gif.py in the closure, its old code would live on in here.
    def decode_mask_into(data: Bytes, out: Bytes, mode: int) -> int:
        """Decodes a GIF mask and samples it over its grid.

        Args:
            data: uint8 (N,), the file.
            out, mode: as for sample_mask.

        Returns:
            0, or a status of gif.STATUS_MESSAGES; then `out` is as it was. `mask_from_gif` gives the full message.
        """
        gif_source  # noqa: B018
        header = parse_gif(data)
        if header.status != OK:
            return header.status
        # A buffer per call costs nothing: malloc keeps freed memory of this size, so its pages stay mapped.
        pixels = np.empty(header.width * header.height, np.uint8)
        status, _ = decode_binary(data, header, pixels)
        if status == OK:
            sample_mask(pixels.reshape(header.height, header.width), out, mode)
        return status

    return compiled(decode_mask_into)


decode_mask_into = _compile_decode_mask_into(hashlib.sha256(inspect.getsource(gif).encode()).hexdigest())


@compiled
def _split_values(values: Bytes, mask: Bytes) -> bool:
    """Sets the mask to 1 where the value is the highest and above 0, else 0; returns False if there are over two."""
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


def _mask_mode(mode: str) -> int:
    if mode not in MASK_MODES:
        raise ValueError(f"mode must be one of {', '.join(MASK_MODES)}; got {mode!r}.")
    return MASK_MODES[mode]


def mask_from_gif(data: bytes, target_height: int, target_width: int, mode: str = "area") -> Bytes:
    """Decodes a GIF mask of any two colours, the brighter of which is foreground, and samples it over its grid.

    Returns:
        uint8 (target_height, target_width), coverage 0..255, or only 0 and 255 if mode is "nearest".

    Raises:
        DataError: why the file is refused, without its name.
        ValueError: the mode is unknown or the target has no pixel.
    """
    file, code = as_uint8(data), _mask_mode(mode)
    if min(target_height, target_width) < 1:
        raise ValueError(f"the target must have at least one pixel; got {target_width} x {target_height}.")
    out = np.empty((target_height, target_width), np.uint8)
    if decode_mask_into(file, out, code) != OK:
        header = parse_gif(file)
        pixels = np.empty(header.width * header.height if header.status == OK else 0, np.uint8)
        raise gif_error(file, header, *decode_binary(file, header, pixels))
    return out


def mask_from_array(values: NDArray[Any], target_height: int, target_width: int, mode: str = "area") -> Bytes:
    """Like mask_from_gif for a decoded mask of any other format.

    Args:
        values: uint8 or bool (H, W) of at most two values; the higher is foreground, one alone if it is above 0.

    Raises:
        DataError: there are more than two values.
        ValueError: shape or dtype differ, the mode is unknown, or an image or target has no pixel.
    """
    if values.ndim != 2 or values.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"a mask must be uint8 or bool (H, W); got {values.dtype} {values.shape}.")
    sampling_grid(values.shape[1], values.shape[0], target_width, target_height)
    mask, out = np.empty(values.shape, np.uint8), np.empty((target_height, target_width), np.uint8)
    if not _split_values(np.ascontiguousarray(values).view(np.uint8), mask):
        raise DataError(f"a mask must have two values; found {np.unique(values).size}")
    sample_mask(mask, out, _mask_mode(mode))
    return out


def resize_area(image: Bytes, grid: Grid, target_height: int, target_width: int, out: Bytes | None = None) -> Bytes:
    """Exact area average of an image over its grid.

    (Pillow's BOX is that only where cells are whole pixels: elsewhere a pixel counts for one cell alone.)

    Args:
        image: uint8 (H, W) or (H, W, C), either decoded at 1 / grid.denominator or at full size.
        grid: of the image's full size and this target.
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
