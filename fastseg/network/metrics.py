"""IoU, Dice and boundary IoU, summed on the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastseg.data.batch import Batch
from fastseg.network.losses import bce_dice_loss
from fastseg.network.normalise import normalise, to_targets
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import all_reduce
from fastseg.runtime.out_of_memory import halve_until_it_fits

__all__ = ["BOUNDARY_PIXELS", "Scores", "boundary_band", "boundary_iou", "score_batches"]

# Cheng et al. use 2 % of the diagonal, which is 46 pixels of a Carvana photo: too coarse for masks that agree to 99 %.
# 8 pixels are one cell of a network that sees 240x160.
BOUNDARY_PIXELS = 8


class Scores:
    """IoU and Dice, as the mean over images and pooled over all pixels.

    An image whose mask and prediction are both empty has score 1.
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
            ValueError: no batch has been added.
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
    """Score a network in evaluation mode on decoded batches, at their resolution, over all ranks.

    A mask cell is foreground if at least half of it is covered, a predicted cell if its logit is above 0.

    Args:
        model: normalised images (B, 3, H, W) to logits (B, 1, H, W).

    Returns:
        `loss` (BCE + Dice, mean over images), `dice`, `iou`, `dice_pixels`, `iou_pixels`, and the shares of the cells
        that are `predicted` and true `foreground`.

    Raises:
        FastsegError: one image does not fit in memory. Batches that do not fit are halved.
    """

    def predict_logits(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model(normalise(images))

    forward = halve_until_it_fits(predict_logits, runtime.device)
    device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device  # which has no float64
    scores = Scores(device)
    cells = 1  # of an image
    loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum over images, and their number
    with torch.inference_mode():
        for images, masks, _ in batches:
            if not len(images):  # this rank's slice of a last batch that is smaller than the number of ranks
                continue
            logits, cells = forward(images), masks[0].numel()
            loss[0] += bce_dice_loss(logits, to_targets(masks)) * len(images)
            loss[1] += len(images)
            scores.update((logits[:, 0] > 0).to(device), (masks >= 128).to(device))
    all_reduce(scores.sums)
    total, images_seen = all_reduce(loss).tolist()
    predicted, true = (scores.sums[4:] / (cells * max(images_seen, 1))).tolist()
    return {"loss": total / max(images_seen, 1), **scores.compute(), "predicted": predicted, "foreground": true}


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
    """The foreground within `pixels` of the background (Chebyshev distance).

    As in the authors' code, everything outside the image is background.

    Args:
        masks: (B, H, W) bool.
        pixels: at least 1.

    Returns:
        (B, H, W) bool. Run time does not depend on `pixels`.
    """
    # The number of foreground pixels in each window of 2 * pixels + 1 is a difference of cumulative sums.
    window = 2 * pixels + 1
    sums = pad(masks.int(), (pixels + 1, pixels, pixels + 1, pixels)).cumsum(2, dtype=torch.int32)
    sums = sums[..., window:] - sums[..., :-window]
    sums = sums.cumsum(1, dtype=torch.int32)
    return masks & (sums[:, window:] - sums[:, :-window] < window * window)
