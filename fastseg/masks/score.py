"""The scores of one pair, at the training size and at the photo's own: of two values, or of classes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.config import Config
from fastseg.data.decode import decode_full_mask
from fastseg.data.host import decode_file
from fastseg.data.labels.decode import decode_full_classes
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.data.pairs import Pairs
from fastseg.masks.refine import refine_by_crf
from fastseg.network.losses import bce_dice_loss, class_loss
from fastseg.network.metrics import ClassScores, Scores, boundary_iou, class_boundary_iou
from fastseg.network.normalise import to_targets
from fastseg.network.outline.upsample import label_logits, threshold_logits
from fastseg.plots import Outlined
from fastseg.runtime.distributed import all_gather

__all__ = ["NUM_WORST", "Output", "Row", "Scored", "Totals", "choose_score", "mean_of"]

NUM_WORST = 8  # images in worst.png


@dataclass(frozen=True)
class Row:
    """Scores of one image, a line of scores.csv."""

    image: str
    dice: float
    iou: float
    full_dice: float | None = None
    full_iou: float | None = None
    full_boundary_iou: float | None = None

    @property
    def rank(self) -> float:
        """The Dice by which the worst images are chosen."""
        return self.dice if self.full_dice is None else self.full_dice


class Output(NamedTuple):
    """The network's output for one pair, on the CPU."""

    pair: int
    logits: Tensor  # (1, 1, h, w), or (1, C, h, w) with classes
    masks: Tensor  # (1, h, w) uint8
    refined: Tensor | None = None  # (1 or C, H, W), the logits after the outline refiner


class Scored(NamedTuple):
    """The scores of one pair."""

    row: Row
    loss: float
    small: Tensor  # `Scores.sums`, or those of `ClassScores`, of this image at the training size
    full: Tensor  # likewise at full size
    masks: tuple[NDArray[Any], NDArray[Any]] | None  # true and predicted at full size: bool, or uint8 classes
    bands: list[float | None] | None = None  # boundary IoU of each class at full size


@dataclass
class Totals:
    """The scores of all images so far."""

    small: Scores | ClassScores
    full: Scores | ClassScores
    pairs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    bands: list[list[float | None]] = field(default_factory=list)  # boundary IoU of each class in each image
    worst: list[tuple[float, int, Outlined]] = field(default_factory=list)  # Dice, pair; the lowest first
    left_out: list[int] = field(default_factory=list)  # pairs that cannot be decoded

    def add(self, pair: int, scored: Scored) -> None:
        self.small.sums += scored.small
        self.full.sums += scored.full
        self.pairs.append(pair)
        self.losses.append(scored.loss)
        self.rows.append(scored.row)
        if scored.bands is not None:
            self.bands.append(scored.bands)

    def gather(self) -> None:
        """Add the scores of all ranks, in the order of the pairs. All ranks must call this."""
        theirs = all_gather(
            (self.pairs, self.losses, self.rows, self.bands, self.small.sums, self.full.sums, self.left_out)
        )
        pairs, losses, rows, bands, small, full, left_out = zip(*theirs, strict=True)
        order = np.argsort(np.concatenate(pairs), kind="stable")

        def in_order(parts: Iterable[list[Any]]) -> list[Any]:
            joined = list(chain.from_iterable(parts))
            return [joined[place] for place in order] if joined else []

        self.pairs, self.losses, self.rows, self.bands = map(in_order, (pairs, losses, rows, bands))
        self.small.sums, self.full.sums = (torch.stack(sums).sum(0) for sums in (small, full))
        self.left_out = sorted(chain.from_iterable(left_out))
        # Only the photos that will be drawn travel between the ranks.
        chosen = sorted(chain.from_iterable(all_gather([kept[:2] for kept in self.worst])))[:NUM_WORST]
        drawn = all_gather([kept for kept in self.worst if kept[:2] in chosen])
        self.worst = sorted(chain.from_iterable(drawn), key=lambda kept: kept[:2])


def choose_score(pairs: Pairs, config: Config, *, full_size: bool, refine: str) -> Callable[[Output], Scored]:
    """The function that scores a pair; called in threads. It raises a DataError if a file cannot be decoded."""
    if config.classes:
        encoding = ClassEncoding(config.classes, config.ignore_value)
        return partial(_score_classes, pairs, encoding, full_size=full_size, refine=refine)
    return partial(_score, pairs, full_size=full_size, refine=refine)


@torch.inference_mode()
def _score(pairs: Pairs, output: Output, *, full_size: bool, refine: str) -> Scored:
    """Score one pair of two values."""
    pair, logits, masks, refined = output
    small, full, name = Scores(), Scores(), pairs.images[pair]
    dice = small.update(logits[:, 0] > 0, masks >= 128).item()
    loss = bce_dice_loss(logits, to_targets(masks)).item()
    row = Row(name, dice, _iou(dice))
    if not full_size:
        return Scored(row, loss, small.sums, full.sums, None)
    true = decode_file(pairs.mask_path(pair), decode_full_mask)
    height, width = true.shape
    if refine == "crf":
        refined = refine_by_crf(logits[0], pairs.image_path(pair), (height, width))
    predicted = threshold_logits((logits[0] if refined is None else refined)[0].numpy(), height, width)
    both = torch.from_numpy(predicted)[None], torch.from_numpy(true)[None]
    dice, band = full.update(*both).item(), boundary_iou(*both).item()
    row = Row(name, row.dice, row.iou, dice, _iou(dice), band)
    return Scored(row, loss, small.sums, full.sums, (true, predicted))


@torch.inference_mode()
def _score_classes(pairs: Pairs, encoding: ClassEncoding, output: Output, *, full_size: bool, refine: str) -> Scored:
    """Score one pair of classes."""
    pair, logits, masks, refined = output
    num_classes = logits.shape[1]
    small, full, name = ClassScores(num_classes), ClassScores(num_classes), pairs.images[pair]
    small.update(logits.argmax(1), masks)
    loss = class_loss(logits, masks).item()
    row = Row(name, *small.means())
    if not full_size:
        return Scored(row, loss, small.sums, full.sums, None)
    true = decode_file(pairs.mask_path(pair), decode_full_classes, encoding)
    height, width = true.shape
    if refine == "crf":
        refined = refine_by_crf(logits[0], pairs.image_path(pair), (height, width))
    predicted = label_logits((logits[0] if refined is None else refined).numpy(), height, width)
    both = torch.from_numpy(predicted)[None], torch.from_numpy(true)[None]
    full.update(*both)
    bands = class_boundary_iou(both[0][0], both[1][0], num_classes)
    row = Row(name, row.dice, row.iou, *full.means(), mean_of(bands))
    return Scored(row, loss, small.sums, full.sums, (true, predicted), bands)


def mean_of(scores: Iterable[float | None]) -> float:
    """The mean of the scores that are not None; 1 if there is none."""
    found = [score for score in scores if score is not None]
    return sum(found) / len(found) if found else 1.0


def _iou(dice: float) -> float:
    return dice / (2 - dice)
