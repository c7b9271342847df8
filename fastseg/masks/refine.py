"""Outlines moved to where the photo says they are: the network sees a cell of 8 x 8 pixels as one, the photo does not.

The network's logits know about where an outline runs. Two methods look at the colours around it: a guided filter (a
linear model of the colours in every window), and mean-field inference in a conditional random field (pixels of like
colour ask each other for their label). Both work on a grid finer than the network's cells and coarser than the photo,
to which a JPEG is decoded at a fraction of the cost of all its pixels; what they return is upsampled as cells are.

It is done on the CPU, where each thread refines a photo; a GPU has the network. The constants were chosen on training
photos of 1918x1280 and a network of 240x160: `python benchmarks/refine.py`.
"""

import numpy as np
import torch
from kornia.filters import guided_blur
from torch import Tensor

from fastseg.data.decode import Size
from fastseg.masks.refine_host import mean_field_on_host
from fastseg.masks.upsample import upsample_logits

__all__ = ["METHODS", "guide_size", "guided_filter", "mean_field_crf", "refine"]

METHODS = ("none", "guided", "crf")
GRID = 480  # pixels on the longer side of the grid, at least half of them: 4 x 4 pixels of a Carvana photo are one
NEAR_CERTAIN = 1e-4  # probabilities closer than this to 0 or 1 become logits as if they were this close


def guide_size(height: int, width: int) -> Size:
    """Height and width of the grid on which photos correct a network of `height` x `width` cells.

    It has whole numbers of pixels a cell: as many as make up 480 on the longer side, and at least one.

    >>> guide_size(160, 240)
    (320, 480)
    """
    pixels = max(1, GRID // max(height, width))
    return height * pixels, width * pixels


@torch.no_grad()
def refine(logits: Tensor, photos: Tensor, size: Size, method: str) -> Tensor:
    """Logits corrected by the photos; the threshold stays 0.

    Args:
        logits: (B, 1, h, w), any float dtype, on any device.
        photos: (B, H, W, 3) uint8, decoded onto a grid of `guide_size` by `decode_image`.
        size: height and width of the photos before that, by which both grids know what they cover.
        method: "none" returns the logits; "guided" is `guided_filter`, "crf" is `mean_field_crf`.

    Returns:
        (B, 1, H, W) float32 on the logits' device, for `upsample_logits` or `cut_logits`; the logits themselves if the
        method is "none". Each image is refined as if it were alone.

    Raises:
        ValueError: the method is unknown, shapes or dtype differ, or the photos are coarser than the logits.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "none":
        return logits
    shapes = f"{tuple(logits.shape)} and {photos.dtype} {tuple(photos.shape)}"
    if logits.ndim != 4 or logits.shape[1] != 1 or photos.dtype != torch.uint8 or photos.shape[3:] != (3,):
        raise ValueError(f"logits must be (B, 1, h, w) and photos uint8 (B, H, W, 3); got {shapes}")
    grid = (photos.shape[1], photos.shape[2])
    if len(photos) != len(logits) or grid[0] < logits.shape[2] or grid[1] < logits.shape[3]:
        raise ValueError(f"photos must be as many as logits, and no coarser; got {shapes}")
    fine, photos = upsample_logits(logits.float().cpu(), *size, onto=grid), photos.cpu()
    if method == "guided":
        refined = guided_filter(fine.sigmoid(), photos.permute(0, 3, 1, 2).float() / 255).logit(NEAR_CERTAIN)
    else:
        refined = mean_field_crf(fine, photos)
    return refined.to(logits.device)


def guided_filter(probability: Tensor, photo: Tensor, *, radius: int = 6, eps: float = 1e-4) -> Tensor:
    """The probability as a linear function of the colour, fitted in every window: q = a . colour + b.

    Args:
        probability: (B, 1, H, W) in [0, 1].
        photo: (B, 3, H, W) in [0, 1], the guide.
        radius: of the window, in pixels.
        eps: variance of colour, in squared units of the photo, below which a window counts as even and is averaged.

    Returns:
        (B, 1, H, W) in [0, 1].

    Source: He et al. 2010, Guided image filtering.
    """
    return guided_blur(photo, probability, 2 * radius + 1, eps, border_type="replicate").clamp(0, 1)


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
    return mean_field_on_host(logits, photos, by_place, by_colour, 255 * colour_sigma, iterations)
