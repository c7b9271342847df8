"""Losses on soft targets, computed in float32."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["bce_dice_loss", "bce_loss", "dice_loss"]


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
