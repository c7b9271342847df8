"""From uint8 pixels to the network's input and the loss's targets."""

from torch import Tensor

__all__ = ["GAIN", "OFFSET", "normalise", "to_targets"]

# (value / 255 - 0.5) / 0.25, in [-2, 2]: about zero mean and unit variance for photographs
GAIN, OFFSET = 4 / 255, -2.0


def normalise(images: Tensor) -> Tensor:
    """The network's input.

    Args:
        images: (B, H, W, 3) uint8 RGB.

    Returns:
        (B, 3, H, W) float32 in [-2, 2], channels last.
    """
    return images.permute(0, 3, 1, 2).float() * GAIN + OFFSET


def to_targets(masks: Tensor) -> Tensor:
    """The targets of the loss.

    Args:
        masks: (B, H, W) uint8, coverage 0..255.

    Returns:
        (B, 1, H, W) float32 in [0, 1].
    """
    return masks.unsqueeze(1).float().div_(255)
