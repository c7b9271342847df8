"""IoU, Dice and boundary IoU of two values and of classes, summed on the device."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastseg.classes import IGNORED
from fastseg.data.batch import Batch
from fastseg.errors import DataError
from fastseg.network.losses import bce_dice_loss, class_loss
from fastseg.network.normalise import normalise, to_targets
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import all_reduce, fail_together
from fastseg.runtime.out_of_memory import halve_until_it_fits

__all__ = [
    "BOUNDARY_PIXELS",
    "ClassScores",
    "Scores",
    "best_epoch",
    "boundary_band",
    "boundary_iou",
    "class_boundary_iou",
    "score_batches",
]

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


class ClassScores:
    """IoU and Dice of each class, pooled over all pixels but those of `IGNORED`.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # the confusion matrix: pixels of a true class (row) with a predicted class (column)
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Add a batch.

        Args:
            predicted: (B, ...) numbers of classes, any integer dtype.
            target: likewise, of the same shape; pixels of `IGNORED` do not count.

        Returns:
            (B,) Dice of each image, the mean over its classes, float64 on the device; 1 if all its pixels are ignored.
        """
        size, images = self.num_classes, len(target)
        rows = target.flatten(1).long().clamp(max=size)  # those ignored have a row of their own
        rows += (size + 1) * torch.arange(images, device=target.device)[:, None]
        cells = rows.mul_(size).add_(predicted.flatten(1)).flatten()
        counts = torch.bincount(cells, minlength=images * (size + 1) * size).view(images, size + 1, size)[:, :size]
        self.sums += counts.sum(0)
        return _mean_of_present(_overlaps(counts)[1])

    def means(self) -> tuple[float, float]:
        """Dice and IoU, means over the classes that occur; 1 if all pixels are ignored. Waits for the device."""
        iou, dice = _overlaps(self.sums.cpu())
        return _mean_of_present(dice).item(), _mean_of_present(iou).item()

    def compute(self) -> dict[str, Any]:
        """The scores; waits for the device.

        Returns:
            `dice` and `iou`, means over the classes that occur in the truth or in the predictions; `pixel_accuracy`;
            and `class_dice` and `class_iou`, lists with None for classes that do not occur.

        Raises:
            DataError: all pixels are ignored.
        """
        confusion = self.sums.cpu()
        pixels = confusion.sum().item()
        if not pixels:
            raise DataError("masks: every pixel that could be scored is ignored. Check ignore_value and the classes.")
        iou, dice = _overlaps(confusion)
        mean_dice, mean_iou = self.means()
        return {
            "dice": mean_dice,
            "iou": mean_iou,
            "pixel_accuracy": confusion.diagonal().sum().item() / pixels,
            "class_dice": none_for_nan(dice),
            "class_iou": none_for_nan(iou),
        }


def none_for_nan(values: Tensor) -> list[float | None]:
    """The values (C,), which JSON can hold."""
    return [None if value != value else value for value in values.tolist()]


def _overlaps(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and Dice (..., C) float64 of confusion matrices (..., C, C); NaN for classes that do not occur."""
    intersection = confusion.diagonal(dim1=-2, dim2=-1).double()
    total = (confusion.sum(-1) + confusion.sum(-2)).double()
    return intersection / (total - intersection), 2 * intersection / total


def _mean_of_present(scores: Tensor) -> Tensor:
    """The mean over the last dimension without NaN; 1 if there is nothing else."""
    return scores.nanmean(-1).nan_to_num(1.0)


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry of metrics.jsonl with the highest Dice among those that were scored on the largest images."""
    return max(history, key=lambda entry: (entry.get("val_size", math.inf), entry["val_dice"]))


def score_batches(
    model: Callable[[Tensor], Tensor], batches: Iterable[Batch], runtime: Runtime, num_classes: int = 0
) -> dict[str, Any]:
    """Score a network in evaluation mode on decoded batches, at their resolution, over all ranks.

    A mask cell is foreground if at least half of it is covered, a predicted cell if its logit is above 0. With classes,
    the largest logit decides.

    Args:
        model: normalised images (B, 3, H, W) to logits (B, 1, H, W) or (B, C, H, W).
        num_classes: C; 0 for masks of two values.

    Returns:
        `loss` (BCE + Dice, mean over images), `dice`, `iou`, `dice_pixels`, `iou_pixels`, and the shares of the cells
        that are `predicted` and true `foreground`. With classes `loss` (cross-entropy + Dice) and the scores of
        `ClassScores`.

    Raises:
        DataError: all pixels are ignored.
        FastsegError: one image does not fit in memory. Batches that do not fit are halved.
    """

    def predict_logits(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model(normalise(images))

    forward = halve_until_it_fits(predict_logits, runtime.device)
    device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device  # which has no float64
    scores = ClassScores(num_classes, device) if num_classes else Scores(device)
    cells = 1  # of an image
    loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum over images, and their number
    with fail_together(runtime.device), torch.inference_mode():
        for images, masks, _ in batches:
            if not len(images):  # this rank's slice of a last batch that is smaller than the number of ranks
                continue
            logits, cells = forward(images), masks[0].numel()
            loss[1] += len(images)
            if num_classes:
                loss[0] += class_loss(logits, masks) * len(images)
                scores.update(logits.argmax(1).to(device), masks.to(device))
            else:
                loss[0] += bce_dice_loss(logits, to_targets(masks)) * len(images)
                scores.update((logits[:, 0] > 0).to(device), (masks >= 128).to(device))
    all_reduce(scores.sums)
    total, images_seen = all_reduce(loss).tolist()
    found = {"loss": total / max(images_seen, 1), **scores.compute()}
    if num_classes:
        return found
    predicted, true = (scores.sums[4:] / (cells * max(images_seen, 1))).tolist()
    return {**found, "predicted": predicted, "foreground": true}


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


def class_boundary_iou(
    predicted: Tensor, target: Tensor, num_classes: int, pixels: int = BOUNDARY_PIXELS
) -> list[float | None]:
    """`boundary_iou` of each class of one image; None for classes that do not occur in it.

    Args:
        predicted, target: (H, W) numbers of classes. Pixels of `IGNORED` in the target are so in the prediction, too.
    """
    predicted = torch.where(target == IGNORED, IGNORED, predicted)
    scores: list[float | None] = [None] * num_classes
    for number in torch.cat([predicted.unique(), target.unique()]).unique().tolist():
        if number != IGNORED:
            scores[number] = boundary_iou((predicted == number)[None], (target == number)[None], pixels).item()
    return scores


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
