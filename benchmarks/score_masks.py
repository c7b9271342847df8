"""Mean IoU of two folders of masks of classes: one count of pixels for every program, by Pillow and numpy alone."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL = 8  # photo pixels along the side of a cell at 160x240


def score_folders(true: Path, predicted: Path, num_classes: int) -> dict[str, list[float | None]]:
    """IoU of each class, pooled over the pixels of all masks.

    Args:
        true: masks NAME_mask.png whose pixels are classes, 0 to num_classes - 1.
        predicted: a mask of the same name and size for each.

    Returns:
        `full`: at the size of the masks. `cells`: of cells of 8x8 pixels, each with the class of most of its pixels, in
        both masks. None where a class occurs in neither.

    Raises:
        ValueError: a mask is missing, or has another size or other classes.
    """
    full = np.zeros((num_classes, num_classes), np.int64)
    cells = np.zeros_like(full)
    for path in sorted(true.glob("*_mask.png")):
        if not (predicted / path.name).exists():
            raise ValueError(f"{path.name}: no mask was predicted")
        masks = [np.asarray(Image.open(folder / path.name)) for folder in (true, predicted)]
        if masks[0].shape != masks[1].shape:
            raise ValueError(f"{path.name}: predicted at {masks[1].shape}, not at {masks[0].shape}")
        if max(mask.max() for mask in masks) >= num_classes:
            raise ValueError(f"{path.name}: has classes above {num_classes - 1}")
        full += count_pairs(*masks, num_classes)
        cells += count_pairs(*(vote(mask, num_classes) for mask in masks), num_classes)
    return {"full": class_iou(full), "cells": class_iou(cells)}


def vote(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """(H, W) to (ceil(H / 8), ceil(W / 8)): the class of most pixels of each cell; the edge is repeated."""
    rows, columns = (-(-size // CELL) for size in mask.shape)
    padding = [(0, size * CELL - found) for size, found in zip((rows, columns), mask.shape, strict=True)]
    blocks = np.pad(mask, padding, "edge").reshape(rows, CELL, columns, CELL)
    return np.argmax([(blocks == number).sum((1, 3)) for number in range(num_classes)], 0)


def count_pairs(true: NDArray[np.integer], predicted: NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
    """The confusion matrix: rows are true classes, columns predicted ones."""
    pairs = true.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(matrix: NDArray[np.int64]) -> list[float | None]:
    """IoU of each class of a confusion matrix; None for a class without pixels."""
    common = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - common
    return [int(a) / int(b) if b else None for a, b in zip(common, union, strict=True)]


def mean_iou(ious: list[float | None]) -> float:
    """The mean over the classes that occur."""
    return float(np.mean([iou for iou in ious if iou is not None]))
