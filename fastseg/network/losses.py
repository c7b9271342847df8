"""Losses of two values, on soft targets, and of classes, on their numbers; computed in float32.

Every loss is a mean over images, so that a batch may be split over processes and micro-batches.
"""

from importlib import metadata

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fastseg.classes import IGNORED
from fastseg.config import Config
from fastseg.errors import ConfigError

__all__ = [
    "bce_dice_loss",
    "bce_loss",
    "check_loss",
    "class_dice_loss",
    "class_loss",
    "cross_entropy_loss",
    "dice_loss",
    "focal_loss",
    "lovasz_loss",
    "tversky_loss",
]

FOCUS = 2.0  # gamma of the focal loss, as in its paper
FALSE_POSITIVES, FALSE_NEGATIVES = 0.3, 0.7  # alpha and beta of the Tversky loss: a missed pixel costs more
CERTAIN = 1e4  # a logit whose softmax is exactly 0 or 1


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy.

    Args:
        logits: (B, 1, H, W), any float dtype.
        target: (B, 1, H, W) coverage in [0, 1].

    Returns:
        Scalar float32.
    """
    return binary_cross_entropy_with_logits(logits.float(), target.float())


def dice_loss(logits: Tensor, target: Tensor, *, eps: float = 1.0) -> Tensor:
    """Soft Dice loss of each image, averaged over the batch.

    Args:
        logits: (B, 1, H, W), any float dtype.
        target: (B, 1, H, W) coverage in [0, 1].
        eps: in pixels, added to numerator and denominator; an empty mask that is predicted empty has loss 0.

    Returns:
        Scalar float32 in [0, 1]. No host synchronisation.

    Raises:
        ValueError: the shapes differ.

    Source: Milletari et al. 2016, V-Net (arXiv:1606.04797), without the squares.
    """
    if logits.shape != target.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"logits and target must have the same shape; got {shapes}")
    probability, target = logits.float().sigmoid(), target.float()
    intersection = (probability * target).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + target.sum(dim=(1, 2, 3))
    return (1 - (2 * intersection + eps) / (total + eps)).mean()


def bce_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of `bce_loss`, which calibrates each pixel, and `dice_loss`, which resembles the score; scalar float32."""
    return bce_loss(logits, target) + dice_loss(logits, target)


def cross_entropy_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of each image's pixels, averaged over the batch.

    Args:
        logits: (B, C, H, W), any float dtype.
        target: (B, H, W) numbers of the classes, any integer dtype. Pixels of `IGNORED` do not count; an image of
            nothing else has loss 0.
        weights: (C,) float32, factors of the classes' pixels. The sum is divided by the number of pixels, not by the
            sum of their weights, so that images of common classes only stay light.

    Returns:
        Scalar float32. No host synchronisation.
    """
    loss = cross_entropy(logits.float(), target.long(), weights, ignore_index=IGNORED, reduction="none")
    return _mean_over_images(loss, target)


def class_dice_loss(logits: Tensor, target: Tensor, *, eps: float = 1.0) -> Tensor:
    """Soft Dice loss, averaged over the classes that occur in an image's target, then over the batch.

    Args:
        logits, target: as for `cross_entropy_loss`.
        eps: in pixels, added to numerator and denominator.

    Returns:
        Scalar float32 in [0, 1]. No host synchronisation.
    """
    probability = logits.float().softmax(1) * (target != IGNORED).unsqueeze(1)
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    one_hot = target.unsqueeze(1) == classes
    pixels = one_hot.sum(dim=(2, 3))
    intersection = (probability * one_hot).sum(dim=(2, 3))
    loss = 1 - (2 * intersection + eps) / (probability.sum(dim=(2, 3)) + pixels + eps)
    present = pixels > 0
    return ((loss * present).sum(1) / present.sum(1).clamp(min=1)).mean()


def focal_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy in which pixels that are already right count little; arguments as for `cross_entropy_loss`.

    Source: Lin et al. 2017, Focal Loss (arXiv:1708.02002); `kornia.losses.focal_loss`.
    """
    from kornia.losses import focal_loss as of_classes  # here, because only training needs kornia

    loss = of_classes(logits.float(), target.long(), None, FOCUS, "none", weights, IGNORED)
    return _mean_over_images(loss.sum(1), target)


def tversky_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Like `class_dice_loss`, but a missed pixel costs more than a false one; arguments as there.

    Source: Salehi et al. 2017, Tversky loss (arXiv:1706.05721); `kornia.losses.tversky_loss`.
    """
    from kornia.losses import tversky_loss as of_classes

    loss = of_classes(logits.float(), target.long(), FALSE_POSITIVES, FALSE_NEGATIVES, ignore_index=IGNORED)
    empty = (target == IGNORED).flatten(1).all(1)  # kornia gives such an image a loss of 1
    return loss - empty.float().mean()


def lovasz_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The Lovász extension of 1 - IoU, averaged over all classes; arguments as for `class_dice_loss`.

    Source: Berman et al. 2018, Lovász-Softmax (arXiv:1705.08790); `kornia.losses.lovasz_softmax_loss`.
    """
    from kornia.losses import lovasz_softmax_loss

    # kornia ignores no pixels: these get a class of their own, which is predicted with certainty and adds no loss.
    num_classes = logits.shape[1]
    ignored = target == IGNORED
    certainty = torch.where(ignored, CERTAIN, -CERTAIN).unsqueeze(1)
    target = torch.where(ignored, num_classes, target.long())
    loss = lovasz_softmax_loss(torch.cat([logits.float(), certainty], 1), target)
    return loss * ((num_classes + 1) / num_classes)


def class_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None, name: str = "auto") -> Tensor:
    """The sum of a loss that calibrates each pixel and of one that resembles the score.

    Args:
        logits, target, weights: as for `cross_entropy_loss`.
        name: "auto" is cross-entropy + Dice; "focal" replaces the former, "tversky" and "lovasz" the latter.
    """
    of_pixels = focal_loss if name == "focal" else cross_entropy_loss
    of_regions = {"tversky": tversky_loss, "lovasz": lovasz_loss}.get(name, class_dice_loss)
    return of_pixels(logits, target, weights) + of_regions(logits, target)


def check_loss(config: Config) -> None:
    """ConfigError if kornia is too old for the loss: before 0.9 it computed these two differently."""
    version = metadata.version("kornia")
    if config.loss in ("tversky", "lovasz") and tuple(map(int, version.split(".")[:2])) < (0, 9):
        raise ConfigError(
            f"loss: {config.loss} needs kornia 0.9, which needs Python 3.11 or newer; this is {version}. "
            "Use auto or focal."
        )


def _mean_over_images(loss: Tensor, target: Tensor) -> Tensor:
    """The mean over each image's pixels that are not ignored, then over images; `loss` is 0 where they are."""
    return (loss.sum(dim=(1, 2)) / (target != IGNORED).sum(dim=(1, 2)).clamp(min=1)).mean()
