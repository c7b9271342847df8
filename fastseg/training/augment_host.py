"""`augment.augment` on the CPU: one compiled pass from uint8 pixels to what the network sees.

The same warp and colour matrix; what torch does there in a dozen passes over float32 copies is done here pixel by
pixel, each image in its own thread. benchmarks/augment.py measures both.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["augment_on_host"]


def augment_on_host(
    images: Tensor,
    masks: Tensor,
    source: NDArray[np.float32],
    colour: NDArray[np.float32],
    share: NDArray[np.float32],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Warp, colour and normalise a batch.

    Args:
        images: (B, H, W, 3) uint8.
        masks: (B, H, W) uint8.
        source: (B, 2, 3) from pixels (x, y, 1) of the result to pixels of the source; beyond its edge the edge repeats.
        colour: (B, 3, 3) from uint8 values to what the network sees.
        share: (B, 3) of the warped image's mean red, green and blue that is added to every channel.
        low, high: what the network sees lies between; `low` is added to every channel.

    Returns:
        (B, 3, H, W) float32, channels last, and (B, 1, H, W) float32 in [0, 1].
    """
    batch, height, width = masks.shape
    inputs, targets = torch.empty((batch, height, width, 3)), torch.empty((batch, height, width))
    arrays = (images.numpy(), masks.numpy(), source, colour, share, inputs.numpy(), targets.numpy())

    def augment_one(index: int) -> None:
        _augment_image(*[array[index] for array in arrays], low, high)  # type: ignore[call-arg]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(augment_one, range(batch)))
    return inputs.permute(0, 3, 1, 2), targets.unsqueeze(1)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _augment_image(image, mask, source, colour, share, out, out_mask, low, high):  # type: ignore[no-untyped-def]
    height, width = mask.shape
    red_sum, green_sum, blue_sum = np.float32(0), np.float32(0), np.float32(0)
    last_x, last_y = np.float32(width - 1), np.float32(height - 1)
    a, b, c = source[0, 0], source[0, 1], source[0, 2]
    d, e, f = source[1, 0], source[1, 1], source[1, 2]
    for y in range(height):
        row_x, row_y = b * np.float32(y) + c, e * np.float32(y) + f
        red_row, green_row, blue_row = np.float32(0), np.float32(0), np.float32(0)
        for x in range(width):
            at_x = min(max(a * np.float32(x) + row_x, np.float32(0)), last_x)
            at_y = min(max(d * np.float32(x) + row_y, np.float32(0)), last_y)
            x0, y0 = int(at_x), int(at_y)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            right, below = at_x - np.float32(x0), at_y - np.float32(y0)
            w11 = right * below
            w10, w01 = below - w11, right - w11
            w00 = np.float32(1) - right - w10
            red = w00 * image[y0, x0, 0] + w01 * image[y0, x1, 0] + w10 * image[y1, x0, 0] + w11 * image[y1, x1, 0]
            green = w00 * image[y0, x0, 1] + w01 * image[y0, x1, 1] + w10 * image[y1, x0, 1] + w11 * image[y1, x1, 1]
            blue = w00 * image[y0, x0, 2] + w01 * image[y0, x1, 2] + w10 * image[y1, x0, 2] + w11 * image[y1, x1, 2]
            cover = w00 * mask[y0, x0] + w01 * mask[y0, x1] + w10 * mask[y1, x0] + w11 * mask[y1, x1]
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = red, green, blue
            out_mask[y, x] = cover * np.float32(1 / 255)
            red_row, green_row, blue_row = red_row + red, green_row + green, blue_row + blue
        red_sum, green_sum, blue_sum = red_sum + red_row, green_sum + green_row, blue_sum + blue_row
    pixels = np.float32(height * width)
    offset = np.float32(low) + (share[0] * red_sum + share[1] * green_sum + share[2] * blue_sum) / pixels
    low, high = np.float32(low), np.float32(high)
    rr, rg, rb = colour[0, 0], colour[0, 1], colour[0, 2]
    gr, gg, gb = colour[1, 0], colour[1, 1], colour[1, 2]
    br, bg, bb = colour[2, 0], colour[2, 1], colour[2, 2]
    for y in range(height):
        for x in range(width):
            red, green, blue = out[y, x, 0], out[y, x, 1], out[y, x, 2]
            out[y, x, 0] = min(max(rr * red + rg * green + rb * blue + offset, low), high)
            out[y, x, 1] = min(max(gr * red + gg * green + gb * blue + offset, low), high)
            out[y, x, 2] = min(max(br * red + bg * green + bb * blue + offset, low), high)
