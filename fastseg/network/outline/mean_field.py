"""Compiled mean-field inference with two labels. `crf` says what it computes."""

from typing import Any

import numpy as np

from fastseg.runtime.kernels import njit

__all__ = ["MAX_SENDERS", "ROOT", "kernel_of_row", "likeness", "mean_field"]

# A label, in [-1, 1], is sent again when it is further than this from what its neighbours know of it. A message is then
# never further than this times the sum of its kernel (37 with the defaults) from its exact value.
MIN_CHANGE = np.float32(1e-6)
ROOT, MAX_SQUARED = 64, np.float32(0.25)  # of likeness, which stays constant beyond that, at 1e-7
MAX_SENDERS = 0.2  # share of changed labels above which all are sent row by row, in a quarter of the time for each


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def likeness(red: Any, green: Any, blue: Any) -> Any:
    """exp(-ROOT x) within 1e-6, x the squared distance of two colours. numba does not vectorise exp."""
    x = min(red * red + green * green + blue * blue, MAX_SQUARED)
    power = np.float32(1) - x * (np.float32(1) - x * (np.float32(1 / 2) - x * np.float32(1 / 6)))
    for _ in range(6):  # 2**6 = ROOT
        power *= power
    return power


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def mean_field(logits: Any, colours: Any, smoothness: Any, appearance: Any, iterations: int, out: Any) -> None:
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
            _send_all(colours, changes, smoothness, appearance, messages)
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
def kernel_of_row(colours: Any, smoothness: Any, appearance: Any, y: int, down: int, right: int, kernel: Any) -> None:
    """k_ij of all pixels i of row y, and the pixels j that are `down` rows below and `right` columns right of them."""
    radius, width = smoothness.shape[0] // 2, len(kernel)
    place, colour = smoothness[radius + down, radius + right], appearance[radius + down, radius + right]
    here, there = slice(radius, radius + width), slice(radius + right, radius + right + width)
    red_0, green_0, blue_0 = colours[0, y, here], colours[1, y, here], colours[2, y, here]
    red_1, green_1, blue_1 = colours[0, y + down, there], colours[1, y + down, there], colours[2, y + down, there]
    for x in range(width):
        like = likeness(red_0[x] - red_1[x], green_0[x] - green_1[x], blue_0[x] - blue_1[x])
        kernel[x] = place + colour * like


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _send_all(colours: Any, changes: Any, smoothness: Any, appearance: Any, messages: Any) -> None:
    """Add all changes to the messages around them: each pair of pixels once, for k_ij = k_ji."""
    radius = smoothness.shape[0] // 2
    width = colours.shape[2] - 2 * radius
    kernel = np.empty(width, np.float32)
    for y in range(radius, colours.shape[1] - radius):
        for down in range(radius + 1):
            for right in range(-radius if down else 1, radius + 1):
                kernel_of_row(colours, smoothness, appearance, y, down, right, kernel)
                here, there = slice(radius, radius + width), slice(radius + right, radius + right + width)
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
            like = likeness(own_red - reds[x], own_green - greens[x], own_blue - blues[x])
            to[x] += change * (place[x] + colour[x] * like)
