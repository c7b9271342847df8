"""`refinement.mean_field_crf` on the CPU: after two steps, only labels that still change send a message.

A message is a sum over labels. A label that changed by d adds d times its kernel to the messages around it, and one
that did not change adds nothing. On Carvana-like photos one label in ten changes after the second step and one in a
hundred after the ninth, all of them along the outline: ten steps take the time of four. benchmarks/refine.py measures
the whole.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["mean_field_on_host"]

# A label, in [-1, 1], is sent again when it is further than this from what its neighbours know of it. A message is then
# never further than this times the sum of its kernel (37 with the defaults) from what it should be.
SENT_AGAIN = np.float32(1e-6)
ROOT, FURTHEST = 64, np.float32(0.25)  # of _likeness, which beyond that, at 1e-7, stays as it is
SENT_BY_ALL = 0.2  # share of labels that changed, above which all are sent row by row, a quarter of the time for each


def mean_field_on_host(
    logits: Tensor,
    photos: Tensor,
    smoothness: NDArray[np.float32],
    appearance: NDArray[np.float32],
    colour_sigma: float,
    iterations: int,
) -> Tensor:
    """The mean field of each image, one after the other in the calling thread; holds no lock.

    Args:
        logits: (B, 1, H, W) float32.
        photos: (B, H, W, 3) uint8.
        smoothness, appearance: (2 radius + 1, 2 radius + 1), what a kernel is by its place, the latter where colours
            are equal; 0 in the middle.
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
    """exp(-ROOT x) of x the squared length of a step of colours, within 1e-6; numba has no exp for vectors."""
    x = min(red * red + green * green + blue * blue, FURTHEST)
    power = np.float32(1) - x * (np.float32(1) - x * (np.float32(1 / 2) - x * np.float32(1 / 6)))
    for _ in range(6):  # 2**6 = ROOT
        power *= power
    return power


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _mean_field(logits: Any, colours: Any, smoothness: Any, appearance: Any, iterations: int, out: Any) -> None:
    """All planes but `logits` and `out` have a frame of `radius`, where labels are 0 and messages are nobody's."""
    (height, width), radius = logits.shape, smoothness.shape[0] // 2
    red, green, blue = colours[0], colours[1], colours[2]
    sent, changes, messages = np.zeros_like(red), np.zeros_like(red), np.zeros_like(red)
    touched = np.ones(red.shape, np.bool_)  # a message that changed since its label was computed
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
                    if abs(change) > SENT_AGAIN:
                        rows[changed], columns[changed] = at
                        changed += 1
                        changes[at] = change
                        sent[at] += change
        if changed > SENT_BY_ALL * logits.size:
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
