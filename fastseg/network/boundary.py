"""How well outlines agree: IoU of bands along them, which the large even parts of two masks do not flatter."""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["BOUNDARY_PIXELS", "boundary_band", "boundary_iou"]

# Cheng et al. take 2 % of the diagonal, 46 pixels of a Carvana photo: too blunt for masks that agree to 99 %. This is
# one cell of a network of 240x160.
BOUNDARY_PIXELS = 8


def boundary_iou(predicted: Tensor, target: Tensor, pixels: int = BOUNDARY_PIXELS) -> Tensor:
    """IoU of the bands of two masks within `pixels` of their outlines.

    Args:
        predicted, target: (B, H, W) bool.
        pixels: width of the band, at least 1.

    Returns:
        (B,) float64 on the device; 1 where both bands are empty.

    Source: Cheng et al. 2021, Boundary IoU (arXiv:2103.16562).
    """
    predicted, target = boundary_band(predicted, pixels), boundary_band(target, pixels)
    intersection = (predicted & target).sum((1, 2), dtype=torch.float64)
    union = (predicted | target).sum((1, 2), dtype=torch.float64)
    return torch.where(union > 0, intersection / union, 1.0)


def boundary_band(masks: Tensor, pixels: int) -> Tensor:
    """The foreground that lies within `pixels` of the background, rows and columns counted apart (Chebyshev).

    As in the authors' code, what lies beyond the picture is background.

    Args:
        masks: (B, H, W) bool.
        pixels: at least 1.

    Returns:
        (B, H, W) bool. The time taken does not depend on `pixels`.
    """
    # How much foreground a window of 2 pixels + 1 holds is a difference of sums over all that is above and left of it.
    window = 2 * pixels + 1
    sums = pad(masks.int(), (pixels + 1, pixels, pixels + 1, pixels)).cumsum(2, dtype=torch.int32)
    sums = sums[..., window:] - sums[..., :-window]
    sums = sums.cumsum(1, dtype=torch.int32)
    return masks & (sums[:, window:] - sums[:, :-window] < window * window)
