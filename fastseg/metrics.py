"""IoU and Dice, accumulated on the device; the host waits only when they are asked for."""

import torch
from torch import Tensor

__all__ = ["Scores"]


class Scores:
    """IoU and Dice over the images of an epoch, both as the mean over images and pooled over all pixels.

    An image whose mask and prediction are both empty scores 1.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # images, sum of Dice, sum of IoU, and pixels: intersection, predicted, true
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def update(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Add a batch.

        Args:
            predicted: (B, ...) bool.
            target: (B, ...) bool, of the same shape.

        Returns:
            (B,) Dice of each image, float64 on the device.
        """
        predicted, target = predicted.flatten(1), target.flatten(1)
        intersection = (predicted & target).sum(1, dtype=torch.float64)
        predicted_pixels = predicted.sum(1, dtype=torch.float64)
        true_pixels = target.sum(1, dtype=torch.float64)
        total = predicted_pixels + true_pixels
        dice = torch.where(total > 0, 2 * intersection / total, 1.0)
        iou = torch.where(total > 0, intersection / (total - intersection), 1.0)
        images = torch.ones_like(dice)
        per_image = torch.stack([images, dice, iou, intersection, predicted_pixels, true_pixels])
        self.sums += per_image.sum(1)
        return dice

    def compute(self) -> dict[str, float]:
        """`dice` and `iou` (means over images), `dice_pixels` and `iou_pixels` (pooled); waits for the device.

        Raises:
            ValueError: nothing was added.
        """
        images, dice, iou, intersection, predicted, true = self.sums.tolist()
        if not images:
            raise ValueError("there are no images to score")
        total = predicted + true
        return {
            "dice": dice / images,
            "iou": iou / images,
            "dice_pixels": 2 * intersection / total if total else 1.0,
            "iou_pixels": intersection / (total - intersection) if total else 1.0,
        }
