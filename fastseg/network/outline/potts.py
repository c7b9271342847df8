"""Compiled mean-field inference with any number of labels. `crf` says what it computes."""

from typing import Any

import numpy as np

from fastseg.network.outline.mean_field import MAX_SENDERS, kernel_of_row, likeness
from fastseg.runtime.kernels import njit

__all__ = ["potts_mean_field"]

# A probability is sent again when it is further than this from what its neighbours know of it. A message is then never
# further than this times the sum of its kernel (37 with the defaults) from its exact value.
MIN_CHANGE = np.float32(1e-5)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def potts_mean_field(logits: Any, colours: Any, smoothness: Any, appearance: Any, iterations: int, out: Any) -> None:
    """`mean_field` for C labels: `logits` and `out` are (C, height, width)."""
    (labels, height, width), radius = logits.shape, smoothness.shape[0] // 2
    shape = (labels, height + 2 * radius, width + 2 * radius)
    sent, changes, messages = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    touched = np.ones(shape[1:], np.bool_)  # whether a message changed since its labels were computed
    rows, columns = np.empty(height * width, np.int32), np.empty(height * width, np.int32)
    occurs = np.empty((labels, shape[1]), np.bool_)  # whether any probability of a row has changed
    powers = np.empty(labels, np.float32)
    for _ in range(iterations):
        changed = 0
        occurs[:] = False
        for y in range(height):
            for x in range(width):
                row, column = y + radius, x + radius
                if not touched[row, column]:
                    for label in range(labels):
                        changes[label, row, column] = 0
                    continue
                touched[row, column] = False
                _softmax(logits[:, y, x], messages[:, row, column], powers)
                sends = False
                for label in range(labels):
                    change = powers[label] - sent[label, row, column]
                    if abs(change) <= MIN_CHANGE:
                        changes[label, row, column] = 0
                        continue
                    sends = True
                    occurs[label, row] = True
                    changes[label, row, column] = change
                    sent[label, row, column] += change
                if sends:
                    rows[changed], columns[changed] = row, column
                    changed += 1
        if changed > MAX_SENDERS * height * width:
            _send_all(colours, changes, occurs, smoothness, appearance, messages)
            touched[:] = True
        else:
            for i in range(changed):
                _send(colours, changes, smoothness, appearance, messages, rows[i], columns[i])
                for y in range(rows[i] - radius, rows[i] + radius + 1):
                    touched[y, columns[i] - radius : columns[i] + radius + 1] = True
    for label in range(labels):
        for y in range(height):
            for x in range(width):
                out[label, y, x] = logits[label, y, x] + messages[label, y + radius, x + radius]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _softmax(logits: Any, messages: Any, out: Any) -> None:
    largest = logits[0] + messages[0]
    for label in range(len(out)):
        out[label] = logits[label] + messages[label]
        largest = max(largest, out[label])
    total = np.float32(0)
    for label in range(len(out)):
        out[label] = np.exp(out[label] - largest)
        total += out[label]
    for label in range(len(out)):
        out[label] /= total


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _send_all(colours: Any, changes: Any, occurs: Any, smoothness: Any, appearance: Any, messages: Any) -> None:
    """Add all changes to the messages around them: each pair of pixels once, for k_ij = k_ji."""
    radius = smoothness.shape[0] // 2
    width = colours.shape[2] - 2 * radius
    kernel = np.empty(width, np.float32)
    for y in range(radius, colours.shape[1] - radius):
        for down in range(radius + 1):
            for right in range(-radius if down else 1, radius + 1):
                kernel_of_row(colours, smoothness, appearance, y, down, right, kernel)
                here, there = slice(radius, radius + width), slice(radius + right, radius + right + width)
                for label in range(len(changes)):
                    if occurs[label, y + down]:
                        to, change = messages[label, y, here], changes[label, y + down, there]
                        for x in range(width):
                            to[x] += kernel[x] * change[x]
                    if occurs[label, y]:
                        to, change = messages[label, y + down, there], changes[label, y, here]
                        for x in range(width):
                            to[x] += kernel[x] * change[x]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _send(colours: Any, changes: Any, smoothness: Any, appearance: Any, messages: Any, row: int, column: int) -> None:
    """Add one pixel's changes to the messages around it."""
    side = smoothness.shape[0]
    left = column - side // 2
    own_red, own_green, own_blue = colours[0, row, column], colours[1, row, column], colours[2, row, column]
    kernel = np.empty((side, side), np.float32)
    for down in range(side):
        y = row - side // 2 + down
        reds, greens, blues = (
            colours[0, y, left : left + side],
            colours[1, y, left : left + side],
            colours[2, y, left : left + side],
        )
        for x in range(side):
            like = likeness(own_red - reds[x], own_green - greens[x], own_blue - blues[x])
            kernel[down, x] = smoothness[down, x] + appearance[down, x] * like
    for label in range(len(changes)):
        change = changes[label, row, column]
        if change == 0:
            continue
        for down in range(side):
            to, weight = messages[label, row - side // 2 + down, left : left + side], kernel[down]
            for x in range(side):
                to[x] += change * weight[x]
