"""IoU, Dice and boundary IoU; sums stay on the device until they are read."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastseg.data.batch import Batch
from fastseg.network.losses import bce_dice_loss
from fastseg.network.normalise import normalise, to_targets
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import all_reduce

__all__ = ["BOUNDARY_PIXELS", "Scores", "boundary_band", "boundary_iou", "score_batches"]

# Cheng et al. take 2 % of the diagonal, 46 pixels of a Carvana photo: too blunt for masks that agree to 99 %. This is
# one cell of a network of 240x160.
BOUNDARY_PIXELS = 8


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


def score_batches(model: Callable[[Tensor], Tensor], batches: Iterable[Batch], runtime: Runtime) -> dict[str, float]:
    """Score a network in evaluation mode on decoded batches, at their resolution, those of all processes together.

    Masks count as foreground where at least half of a cell is covered, predictions where the logit is above 0.

    Args:
        model: normalised images (B, 3, H, W) to logits (B, 1, H, W).

    Returns:
        `loss` (BCE + Dice, mean over images), `dice`, `iou`, `dice_pixels`, `iou_pixels`.
    """
    scores = Scores(runtime.device)
    loss = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # sum over images, and their number
    with torch.inference_mode():
        for images, masks, _ in batches:
            if not len(images):  # this process's slice of a last batch smaller than the group
                continue
            inputs, targets = normalise(images), to_targets(masks)
            with runtime.autocast():
                logits = model(inputs)
            loss[0] += bce_dice_loss(logits, targets) * len(images)
            loss[1] += len(images)
            scores.update(logits[:, 0] > 0, masks >= 128)
    all_reduce(scores.sums)
    total, images_seen = all_reduce(loss).tolist()
    return {"loss": total / max(images_seen, 1), **scores.compute()}


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
