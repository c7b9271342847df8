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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.data.decode import Size
from fastseg.network.outline.mean_field import ROOT, mean_field
from fastseg.network.outline.potts import potts_mean_field
from fastseg.network.outline.upsample import upsample_logits

__all__ = ["guide_size", "mean_field_crf", "refine_with_crf"]

GRID = 480  # pixels on the longer side of the grid, at least half of them: 4 x 4 pixels of a Carvana photo are one


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
    """Refine logits by the photos; the threshold stays 0, and of classes the largest is the label.

    Args:
        logits: (B, C, h, w), any float dtype, on any device; C is 1 for two labels.
        photos: (B, H, W, 3) uint8, decoded onto a grid of `guide_size` by `decode_image`.
        size: height and width of the photos themselves, which determine what both grids cover.

    Returns:
        (B, C, H, W) float32 on the logits' device, for `upsample_logits`, `threshold_logits` or `label_logits`. Images
        do not influence each other.

    Raises:
        ValueError: shapes or dtype differ, or the photos are coarser than the logits.
    """
    shapes = f"{tuple(logits.shape)} and {photos.dtype} {tuple(photos.shape)}"
    if logits.ndim != 4 or photos.ndim != 4 or photos.dtype != torch.uint8 or photos.shape[3:] != (3,):
        raise ValueError(f"logits must be (B, C, h, w) and photos uint8 (B, H, W, 3); got {shapes}")
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

    With C labels, whose logits are u_i(l) = -psi_i(l), one message a label is left:

        Q_i(l) = softmax over l of u_i(l) + sum_j k_ij Q_j(l)

    Args:
        logits: (B, 1, H, W) float32, u of two labels; or (B, C, H, W), u of C labels.
        photos: (B, H, W, 3) uint8.
        radius, smoothness_sigma, appearance_sigma: in pixels.
        iterations: all pixels are updated at once; it begins with u.
        smoothness, appearance: weights, in units of the logits.
        colour_sigma: where colours lie in [0, 1].

    Returns:
        The shape of the logits, float32: logit of q, or what the last softmax would be taken of. Memory: a few copies
        of the photo and of the logits, whatever the radius. One thread does it. Probabilities are within 1e-4 of the
        exact ones, with C labels within 1e-3.

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
        logits: (B, C, H, W) float32.
        photos: (B, H, W, 3) uint8.
        smoothness, appearance: (2 radius + 1, 2 radius + 1), kernel weights by offset, the latter for equal colours;
            0 in the middle.
        colour_sigma: in units of uint8 values.
        iterations: all labels are updated at once.

    Returns:
        (B, C, H, W) float32, the refined logits.
    """
    (height, width), radius = logits.shape[2:], len(smoothness) // 2
    colours = np.zeros((3, height + 2 * radius, width + 2 * radius), np.float32)
    scale = np.float32(1 / (np.sqrt(2 * ROOT) * colour_sigma))
    refined = torch.empty(logits.shape)
    infer = mean_field if logits.shape[1] == 1 else potts_mean_field
    for one, photo, out in zip(logits, photos, refined, strict=True):
        inside = colours[:, radius : radius + height, radius : radius + width]
        np.multiply(photo.permute(2, 0, 1).numpy(), scale, out=inside)
        if logits.shape[1] == 1:
            one, out = one[0], out[0]
        infer(one.contiguous().numpy(), colours, smoothness, appearance, iterations, out.numpy())
    return refined
