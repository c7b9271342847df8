"""Refinement of outlines by a conditional random field: the network sees 8x8 pixels of a Carvana photo as one cell.

The network's logits say roughly where an outline runs. Mean-field inference in a conditional random field moves it to
an edge of the photo: pixels of similar colour nearby influence each other's label. It works on a grid finer than the
network's cells and coarser than the photo, to which a JPEG is decoded for a fraction of the cost of all its pixels; the
result is upsampled like the network's logits.

It runs on the CPU, where each thread refines one photo, also when the network is on a GPU. After two iterations, only
labels that still change send a message: a message is a sum over labels, so a label that changed by d adds d times its
kernel to the messages around it. On Carvana-like photos one label in ten changes after the second iteration and one in
a hundred after the ninth, all of them along the outline, so ten iterations take the time of four. The constants were
chosen on training photos of 1918x1280 and a network of 240x160: `python benchmarks/refine.py`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.data.decode import Size
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.kernels import njit

__all__ = ["guide_size", "mean_field_crf", "refine_with_crf"]

GRID = 480  # pixels on the longer side of the grid, at least half of them: 4 x 4 pixels of a Carvana photo are one

# A label, in [-1, 1], is sent again when it is further than this from what its neighbours know of it. A message is then
# never further than this times the sum of its kernel (37 with the defaults) from its exact value.
MIN_CHANGE = np.float32(1e-6)
ROOT, MAX_SQUARED = 64, np.float32(0.25)  # of _likeness, which stays constant beyond that, at 1e-7
MAX_SENDERS = 0.2  # share of changed labels above which all are sent row by row, in a quarter of the time for each


def guide_size(height: int, width: int) -> Size:
    """Height and width of the grid on which photos refine a network of `height` x `width` cells.

    A cell has a whole number of pixels: as many as give 480 on the longer side, and at least one.

    >>> guide_size(160, 240)
    (320, 480)
    """
    pixels = max(1, GRID // max(height, width))
    return height * pixels, width * pixels


@torch.no_grad()
def refine_with_crf(logits: Tensor, photos: Tensor, size: Size) -> Tensor:
    """Refine logits by the photos; the threshold stays 0.

    Args:
        logits: (B, 1, h, w), any float dtype, on any device.
        photos: (B, H, W, 3) uint8, decoded onto a grid of `guide_size` by `decode_image`.
        size: height and width of the photos themselves, which determine what both grids cover.

    Returns:
        (B, 1, H, W) float32 on the logits' device, for `upsample_logits` or `threshold_logits`. Images do not influence
        each other.

    Raises:
        ValueError: shapes or dtype differ, or the photos are coarser than the logits.
    """
    shapes = f"{tuple(logits.shape)} and {photos.dtype} {tuple(photos.shape)}"
    if logits.ndim != 4 or logits.shape[1] != 1 or photos.dtype != torch.uint8 or photos.shape[3:] != (3,):
        raise ValueError(f"logits must be (B, 1, h, w) and photos uint8 (B, H, W, 3); got {shapes}")
    grid = (photos.shape[1], photos.shape[2])
    if len(photos) != len(logits) or grid[0] < logits.shape[2] or grid[1] < logits.shape[3]:
        raise ValueError(f"photos must be as many as logits, and no coarser; got {shapes}")
    fine = upsample_logits(logits.float().cpu(), *size, onto=grid)
    return mean_field_crf(fine, photos.cpu()).to(logits.device)


def mean_field_crf(
    logits: Tensor,
    photos: Tensor,
    *,
    radius: int = 5,
    iterations: int = 10,
    smoothness: float = 0.5,
    smoothness_sigma: float = 1.0,
    appearance: float = 0.5,
    appearance_sigma: float = 4.0,
    colour_sigma: float = 0.03,
) -> Tensor:
    """Mean-field inference in a conditional random field whose pixels are connected to all others of a window.

    The energy is that of Kraehenbuehl & Koltun: sum_i psi_i(x_i) + sum_{i<j} k_ij [x_i != x_j], with the kernel

        k_ij = smoothness * exp(-|p_i - p_j|^2 / 2 smoothness_sigma^2)
             + appearance * exp(-|p_i - p_j|^2 / 2 appearance_sigma^2 - |c_i - c_j|^2 / 2 colour_sigma^2)

    of places p and colours c, not normalised, and 0 where j lies outside the window of (2 radius + 1)^2 pixels around
    i, or is i. Their update is Q_i(l) ~ exp(-psi_i(l) - sum_j k_ij Q_j(other label)). With q = Q(1) the probability of
    foreground and u = psi(0) - psi(1) the network's logit, the ratio of the two labels leaves one message a pixel:

        logit q_i = u_i + sum_j k_ij (q_j - (1 - q_j)) = u_i + sum_j k_ij tanh(logit q_j / 2)

    Args:
        logits: (B, 1, H, W) float32, u.
        photos: (B, H, W, 3) uint8.
        radius, smoothness_sigma, appearance_sigma: in pixels.
        iterations: all pixels are updated at once; it begins with u.
        smoothness, appearance: weights, in units of the logits.
        colour_sigma: where colours lie in [0, 1].

    Returns:
        (B, 1, H, W) float32, logit of q. Memory: a few copies of the photo, whatever the radius. One thread
        does it, and q is within 1e-4 of the exact one.

    Source: Kraehenbuehl & Koltun 2011, Efficient inference in fully connected CRFs (arXiv:1210.5644), algorithm 1.
    """
    down, right = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    squared = down * down + right * right
    by_place = (smoothness * np.exp(-0.5 * squared / smoothness_sigma**2) * (squared > 0)).astype(np.float32)
    by_colour = (appearance * np.exp(-0.5 * squared / appearance_sigma**2) * (squared > 0)).astype(np.float32)
    return _refine_images(logits, photos, by_place, by_colour, 255 * colour_sigma, iterations)


def _refine_images(
    logits: Tensor,
    photos: Tensor,
    smoothness: NDArray[np.float32],
    appearance: NDArray[np.float32],
    colour_sigma: float,
    iterations: int,
) -> Tensor:
    """`mean_field_crf` in the calling thread, image after image. Releases the GIL.

    Args:
        logits: (B, 1, H, W) float32.
        photos: (B, H, W, 3) uint8.
        smoothness, appearance: (2 radius + 1, 2 radius + 1), kernel weights by offset, the latter for equal colours;
            0 in the middle.
        colour_sigma: in units of uint8 values.
        iterations: all labels are updated at once.

    Returns:
        (B, 1, H, W) float32, the refined logits.
    """
    (height, width), radius = logits.shape[2:], len(smoothness) // 2
    colours = np.zeros((3, height + 2 * radius, width + 2 * radius), np.float32)
    scale = np.float32(1 / (np.sqrt(2 * ROOT) * colour_sigma))
    refined = torch.empty(logits.shape)
    for one, photo, out in zip(logits[:, 0], photos, refined[:, 0], strict=True):
        inside = colours[:, radius : radius + height, radius : radius + width]
        np.multiply(photo.permute(2, 0, 1).numpy(), scale, out=inside)
        _mean_field(one.contiguous().numpy(), colours, smoothness, appearance, iterations, out.numpy())
    return refined


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _likeness(red: Any, green: Any, blue: Any) -> Any:
    """exp(-ROOT x) within 1e-6, x the squared distance of two colours. numba does not vectorise exp."""
    x = min(red * red + green * green + blue * blue, MAX_SQUARED)
    power = np.float32(1) - x * (np.float32(1) - x * (np.float32(1 / 2) - x * np.float32(1 / 6)))
    for _ in range(6):  # 2**6 = ROOT
        power *= power
    return power


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _mean_field(logits: Any, colours: Any, smoothness: Any, appearance: Any, iterations: int, out: Any) -> None:
    """All planes but `logits` and `out` have a border of `radius`, where labels are 0 and messages are ignored."""
    (height, width), radius = logits.shape, smoothness.shape[0] // 2
    red, green, blue = colours[0], colours[1], colours[2]
    sent, changes, messages = np.zeros_like(red), np.zeros_like(red), np.zeros_like(red)
    touched = np.ones(red.shape, np.bool_)  # whether a message changed since its label was computed
    rows, columns = np.empty(logits.size, np.int32), np.empty(logits.size, np.int32)
    for _ in range(iterations):
        changed = 0
        for y in range(height):
            for x in range(width):
                at = (y + radius, x + radius)
                changes[at] = 0
                if touched[at]:
                    touched[at] = False
                    change = np.tanh(np.float32(0.5) * (logits[y, x] + messages[at])) - sent[at]
                    if abs(change) > MIN_CHANGE:
                        rows[changed], columns[changed] = at
                        changed += 1
                        changes[at] = change
                        sent[at] += change
        if changed > MAX_SENDERS * logits.size:
            _send_all(red, green, blue, changes, smoothness, appearance, messages)
            touched[:] = True
        else:
            for i in range(changed):
                _send(red, green, blue, changes, smoothness, appearance, messages, rows[i], columns[i])
                for y in range(rows[i] - radius, rows[i] + radius + 1):
                    touched[y, columns[i] - radius : columns[i] + radius + 1] = True
    for y in range(height):
        for x in range(width):
            out[y, x] = logits[y, x] + messages[y + radius, x + radius]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _send_all(red: Any, green: Any, blue: Any, changes: Any, smoothness: Any, appearance: Any, messages: Any) -> None:
    """Add all changes to the messages around them: each pair of pixels once, for k_ij = k_ji."""
    radius = smoothness.shape[0] // 2
    width = red.shape[1] - 2 * radius
    kernel = np.empty(width, np.float32)
    for y in range(radius, red.shape[0] - radius):
        for down in range(radius + 1):
            for right in range(-radius if down else 1, radius + 1):
                place, colour = smoothness[radius + down, radius + right], appearance[radius + down, radius + right]
                here, there = slice(radius, radius + width), slice(radius + right, radius + right + width)
                red_0, green_0, blue_0 = red[y, here], green[y, here], blue[y, here]
                red_1, green_1, blue_1 = red[y + down, there], green[y + down, there], blue[y + down, there]
                for x in range(width):
                    likeness = _likeness(red_0[x] - red_1[x], green_0[x] - green_1[x], blue_0[x] - blue_1[x])
                    kernel[x] = place + colour * likeness
                to, change = messages[y, here], changes[y + down, there]
                for x in range(width):
                    to[x] += kernel[x] * change[x]
                to, change = messages[y + down, there], changes[y, here]
                for x in range(width):
                    to[x] += kernel[x] * change[x]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _send(
    red: Any,
    green: Any,
    blue: Any,
    changes: Any,
    smoothness: Any,
    appearance: Any,
    messages: Any,
    row: int,
    column: int,
) -> None:
    """Add one pixel's change to the messages around it."""
    side = smoothness.shape[0]
    left, change = column - side // 2, changes[row, column]
    own_red, own_green, own_blue = red[row, column], green[row, column], blue[row, column]
    for down in range(side):
        y = row - side // 2 + down
        reds, greens, blues = red[y, left : left + side], green[y, left : left + side], blue[y, left : left + side]
        to, place, colour = messages[y, left : left + side], smoothness[down], appearance[down]
        for x in range(side):
            likeness = _likeness(own_red - reds[x], own_green - greens[x], own_blue - blues[x])
            to[x] += change * (place[x] + colour[x] * likeness)
