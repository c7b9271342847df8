"""Upsampling from the network's cells to the photo's pixels, on the sampling grid of the training."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from fastseg.data.decode import Size
from fastseg.data.gif import compiled
from fastseg.data.resample import sampling_grid

__all__ = ["label_logits", "threshold_logits", "upsample_logits"]


def upsample_logits(logits: Tensor, height: int, width: int, onto: Size | None = None) -> Tensor:
    """Upsample logits to the photo's own size, or to a finer grid of it. Threshold them afterwards, at 0.

    The cells cover the grid's extent, which may reach some columns and rows beyond the photo (1920 columns of 1918).
    These are cropped. A resize straight to the photo's size would drift by as many pixels.

    Args:
        logits: (B, C, h, w) of photos that are all `height` x `width`.
        onto: height and width of a grid of these photos with at least as many cells; it may cover less beyond the
            photo.

    Returns:
        (B, C, height, width) or the size of `onto`, of the same dtype: linear between the centres of cells; the mean
        over a pixel where the photo has fewer pixels than cells.

    Raises:
        ValueError: a size is below 1.
    """
    cells = sampling_grid(width, height, logits.shape[-1], logits.shape[-2])
    if onto is None:
        size = (cells.extent_y, cells.extent_x)
        return interpolate(logits, size, mode="bilinear", antialias=True)[..., :height, :width]
    grid = sampling_grid(width, height, onto[1], onto[0])
    # Rounded up, because torch truncates the size; the crop removes a surplus pixel.
    scale = (
        math.nextafter(onto[0] * cells.extent_y / (logits.shape[-2] * grid.extent_y), math.inf),
        math.nextafter(onto[1] * cells.extent_x / (logits.shape[-1] * grid.extent_x), math.inf),
    )
    return interpolate(logits, scale_factor=scale, mode="bilinear")[..., : onto[0], : onto[1]]


def threshold_logits(logits: NDArray[np.float32], height: int, width: int) -> NDArray[np.bool_]:
    """The mask of one photo: `upsample_logits(...) > 0`, except for ties and rounding.

    The sign does not change between four cell centres of one sign, so only pixels along the outline are computed. That
    takes an eighth of the time on a CPU, and one byte per pixel instead of four. Releases the GIL.

    Args:
        logits: (h, w), C-contiguous.

    Returns:
        (height, width).

    Raises:
        ValueError: a size is below 1.
    """
    cells_y, cells_x = logits.shape
    grid = sampling_grid(width, height, cells_x, cells_y)
    if grid.extent_x < cells_x or grid.extent_y < cells_y:  # a pixel is a mean over cells
        return (upsample_logits(torch.from_numpy(logits)[None, None], height, width)[0, 0] > 0).numpy()
    mask = np.zeros((height, width), np.bool_)
    _cut(logits, grid.extent_x / cells_x, grid.extent_y / cells_y, mask)
    return mask


@compiled
def _cut(logits: Any, cell_x: float, cell_y: float, mask: Any) -> None:
    """`threshold_logits` for cells of at least one pixel; `mask` starts as zeros."""
    (cells_y, cells_x), (height, width) = logits.shape, mask.shape
    starts = np.empty(cells_x, np.int64)  # first pixel at or right of each cell's centre
    for c in range(cells_x):
        starts[c] = min(math.ceil((c + 0.5) * cell_x - 0.5), width)
    values = np.empty(cells_x, np.float32)  # at the cells' centres, in this row of pixels
    for y in range(height):
        position = min(max((y + 0.5) / cell_y - 0.5, 0.0), cells_y - 1.0)
        top = int(position)
        bottom, part = min(top + 1, cells_y - 1), np.float32(position - top)
        for c in range(cells_x):
            values[c] = logits[top, c] + part * (logits[bottom, c] - logits[top, c])
        row = mask[y]
        if values[0] > 0:
            row[: starts[0]] = True
        for c in range(cells_x - 1):
            left, right = values[c], values[c + 1]
            if left > 0 and right > 0:
                row[starts[c] : starts[c + 1]] = True
            elif left > 0 or right > 0:
                for x in range(starts[c], starts[c + 1]):
                    row[x] = left + np.float32((x + 0.5) / cell_x - 0.5 - c) * (right - left) > 0
        if values[cells_x - 1] > 0:
            row[starts[cells_x - 1] :] = True


def label_logits(logits: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """The classes of one photo: `upsample_logits(...).argmax`, except for ties and rounding.

    Between two centres of cells in a row of pixels, the largest logit is the same if it is at both, so only pixels
    between different classes are computed. Needs one byte per pixel, whatever the number of classes. Releases the GIL.

    Args:
        logits: (C, h, w), C-contiguous; at most 255 classes.

    Returns:
        (height, width) uint8; of equal logits the first.

    Raises:
        ValueError: a size is below 1.
    """
    _, cells_y, cells_x = logits.shape
    grid = sampling_grid(width, height, cells_x, cells_y)
    if grid.extent_x < cells_x or grid.extent_y < cells_y:  # a pixel is a mean over cells
        full = upsample_logits(torch.from_numpy(logits)[None], height, width)
        return full[0].argmax(0).to(torch.uint8).numpy()
    labels = np.empty((height, width), np.uint8)
    _label(np.ascontiguousarray(logits.transpose(1, 2, 0)), grid.extent_x / cells_x, grid.extent_y / cells_y, labels)
    return labels


@compiled
def _label(logits: Any, cell_x: float, cell_y: float, labels: Any) -> None:
    """`label_logits` for cells of at least one pixel; logits are (h, w, C)."""
    (cells_y, cells_x, num_classes), (height, width) = logits.shape, labels.shape
    starts = np.empty(cells_x, np.int64)  # first pixel at or right of each cell's centre
    for c in range(cells_x):
        starts[c] = min(math.ceil((c + 0.5) * cell_x - 0.5), width)
    values = np.empty((cells_x, num_classes), np.float32)  # at the cells' centres, in this row of pixels
    largest = np.empty(cells_x, np.uint8)
    for y in range(height):
        position = min(max((y + 0.5) / cell_y - 0.5, 0.0), cells_y - 1.0)
        top = int(position)
        bottom, part = min(top + 1, cells_y - 1), np.float32(position - top)
        for c in range(cells_x):
            best = 0
            for k in range(num_classes):
                values[c, k] = logits[top, c, k] + part * (logits[bottom, c, k] - logits[top, c, k])
                if values[c, k] > values[c, best]:
                    best = k
            largest[c] = best
        row = labels[y]
        row[: starts[0]] = largest[0]
        for c in range(cells_x - 1):
            if largest[c] == largest[c + 1]:
                row[starts[c] : starts[c + 1]] = largest[c]
                continue
            for x in range(starts[c], starts[c + 1]):
                part = np.float32((x + 0.5) / cell_x - 0.5 - c)
                best, most = 0, values[c, 0] + part * (values[c + 1, 0] - values[c, 0])
                for k in range(1, num_classes):
                    value = values[c, k] + part * (values[c + 1, k] - values[c, k])
                    if value > most:
                        best, most = k, value
                row[x] = best
        row[starts[cells_x - 1] :] = largest[cells_x - 1]
