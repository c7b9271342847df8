"""Outlines moved to where the photo says they are: the network sees a cell of 8 x 8 pixels as one, the photo does not.

Upsampled logits know about where an outline runs. Two methods look at the colours around it: a guided filter (a linear
model of the colours in every window), and mean-field inference in a conditional random field (pixels of like colour
ask each other for their label). Both collect what they need on a grid of about `GRID` pixels, which is enough for
corrections of a few cells and keeps a photo of any size affordable, and write their answer at full size.

The constants were chosen on training photos of 1918x1280 and a network of 240x160: `python benchmarks/refine.py`.
"""

import math

import torch
from kornia.filters import guided_blur
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

__all__ = ["METHODS", "guided_filter", "mean_field_crf", "refine"]

METHODS = ("none", "guided", "crf")
GRID = 480  # pixels on the longer side of the grid: 4 x 4 pixels of a Carvana photo are one
NEAR_CERTAIN = 1e-4  # probabilities closer than this to 0 or 1 become logits as if they were this close


@torch.no_grad()
def refine(logits: Tensor, photos: Tensor, method: str) -> Tensor:
    """Logits at the photos' size, corrected by the photos; the threshold stays 0.

    Args:
        logits: (B, 1, H, W), any float dtype, such as from `upsample_logits`.
        photos: (B, H, W, 3) uint8, on the same device.
        method: "none" returns the logits; "guided" is `guided_filter`, "crf" is `mean_field_crf`.

    Returns:
        (B, 1, H, W), float32 unless the method is "none". Each image is refined as if it were alone.

    Raises:
        ValueError: the method is unknown, or the sizes differ.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if photos.shape != (len(logits), *logits.shape[2:], 3) or logits.shape[1] != 1:
        shapes = f"{tuple(logits.shape)} and {tuple(photos.shape)}"
        raise ValueError(f"logits must be (B, 1, H, W) and photos (B, H, W, 3); got {shapes}")
    if method == "none":
        return logits
    logits, photos = logits.float(), photos.permute(0, 3, 1, 2).float() / 255
    step = max(1, round(max(photos.shape[2:]) / GRID))
    if method == "guided":
        return guided_filter(logits.sigmoid(), photos, step=step).logit(NEAR_CERTAIN)
    coarse = avg_pool2d(_pad_to(logits, step), step)
    correction = mean_field_crf(coarse, avg_pool2d(_pad_to(photos, step), step)) - coarse
    fine = interpolate(correction, scale_factor=step, mode="bilinear")
    return logits + fine[..., : logits.shape[2], : logits.shape[3]]


def guided_filter(probability: Tensor, photo: Tensor, *, radius: int = 6, eps: float = 1e-4, step: int = 1) -> Tensor:
    """The probability as a linear function of the colour, fitted in every window: q = a . colour + b.

    Args:
        probability: (B, 1, H, W) in [0, 1].
        photo: (B, 3, H, W) in [0, 1], the guide.
        radius: of the window, in steps.
        eps: variance of colour, in squared units of the photo, below which a window counts as even and is averaged.
        step: the models are fitted to every `step`-th pixel, and interpolated in between.

    Returns:
        (B, 1, H, W) in [0, 1].

    Source: He et al. 2010, Guided image filtering; He & Sun 2015, Fast guided filter (arXiv:1505.00996).
    """
    height, width = photo.shape[2:]
    window = 2 * radius * step + 1
    guide, values = _pad_to(photo, step), _pad_to(probability, step)
    with torch.backends.cudnn.flags(enabled=False):  # TF32 would lose the variances, which are differences of means
        filtered = guided_blur(guide, values, window, eps, border_type="replicate", subsample=step)
    return filtered[..., :height, :width].clamp(0, 1)


def mean_field_crf(
    logits: Tensor,
    photo: Tensor,
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
        logits: (B, 1, H, W) float, u.
        photo: (B, 3, H, W) in [0, 1].
        radius, smoothness_sigma, appearance_sigma: in pixels.
        iterations: all pixels are updated at once; it begins with u.
        smoothness, appearance: weights, in units of the logits.
        colour_sigma: in units of the photo.

    Returns:
        (B, 1, H, W) logit of q. Memory: a few copies of the photo, whatever the radius.

    Source: Kraehenbuehl & Koltun 2011, Efficient inference in fully connected CRFs (arXiv:1210.5644), algorithm 1.
    """
    height, width = logits.shape[2:]
    colours = (photo / colour_sigma).split(1, dim=1)
    refined = logits
    for _ in range(iterations):
        label, message = (refined / 2).tanh(), torch.zeros_like(logits)
        for down, right in _half_window(min(radius, height - 1), min(radius, width - 1)):
            here = (..., slice(down, None), slice(max(right, 0), width + min(right, 0)))
            there = (..., slice(None, height - down), slice(max(-right, 0), width - max(right, 0)))
            distance = torch.zeros_like(label[here])
            for colour in colours:
                difference = colour[here] - colour[there]
                distance.addcmul_(difference, difference)
            distance.clamp_(max=60)  # exp(-30) is nothing; denormal numbers would slow a CPU down
            squared = down * down + right * right
            kernel = distance.mul_(-0.5).sub_(0.5 * squared / appearance_sigma**2).exp_().mul_(appearance)
            kernel.add_(smoothness * math.exp(-0.5 * squared / smoothness_sigma**2))
            message[here].addcmul_(kernel, label[there])
            message[there].addcmul_(kernel, label[here])  # k_ij = k_ji
        refined = logits + message
    return refined


def _half_window(down: int, right: int) -> list[tuple[int, int]]:
    """One of each two opposite offsets (rows, columns) within a window."""
    return [(y, x) for y in range(down + 1) for x in range(-right, right + 1) if (y, x) > (0, 0)]


def _pad_to(images: Tensor, step: int) -> Tensor:
    """Images (B, C, H, W) whose last rows and columns are repeated up to multiples of `step`."""
    return pad(images, (0, -images.shape[3] % step, 0, -images.shape[2] % step), mode="replicate")
