"""Plots of a run: learning curves, outlines or classes drawn over images, and the confusion matrix.

matplotlib is imported when the first plot is drawn, so that the first training step does not wait for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.classes import SegClass
from fastseg.config import Config
from fastseg.data.batch import BadSamples
from fastseg.data.gif import Bytes
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.network.metrics import ClassScores, Scores, best_epoch
from fastseg.network.normalise import normalise
from fastseg.runtime.device import Runtime
from fastseg.runtime.files import atomic_write
from fastseg.runtime.out_of_memory import halve_until_it_fits

__all__ = [
    "Outlined",
    "draw_classes",
    "draw_confusion",
    "draw_curves",
    "draw_outlines",
    "draw_overlay",
    "draw_worst",
    "tint_classes",
]

TRUE, PREDICTED = "#00d5ff", "#ff2e88"  # outlines that stand out from each other and from most photographs
MARGIN = 40  # pixels of the photo around its outlines
CLASS_SHARE = 0.5  # of a class's colour; black ones, such as most backgrounds, leave the photo as it is
MAX_CURVES, MAX_NUMBERS = 20, 15  # classes with a curve each, and with numbers in the confusion matrix


class Outlined(NamedTuple):
    """A photo and two masks, whose outlines at 0.5 are drawn over it, or the numbers of their classes in colour."""

    photo: NDArray[np.uint8]  # (H, W, 3)
    true: NDArray[Any]  # (H, W) bool, or in [0, 1], or uint8 classes
    predicted: NDArray[Any]  # likewise
    title: str


def draw_curves(history: list[dict[str, Any]], path: Path, classes: Sequence[SegClass] = ()) -> None:
    """Plot loss, IoU and Dice by epoch, and the IoU of each class in its colour; a PNG.

    Args:
        history: one entry per epoch, as in metrics.jsonl.
        classes: empty for masks of two values.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    epochs = [entry["epoch"] for entry in history]
    best = best_epoch(history)
    figure = Figure(figsize=(15 if classes else 10, 4), layout="constrained")
    losses, scores, *of_classes = figure.subplots(1, 3 if classes else 2)
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        losses.plot(epochs, [entry[name] for entry in history], marker="o", markersize=3, label=label)
    losses.set(title=f"Loss ({'cross-entropy' if classes else 'BCE'} + Dice)", xlabel="epoch", yscale="log")
    for name, label in (("val_dice", "Dice"), ("val_iou", "IoU")):
        scores.plot(epochs, [entry[name] for entry in history], marker="o", markersize=3, label=label)
    title = f"Validation: best Dice {best['val_dice']:.4f}, IoU {best['val_iou']:.4f}"
    scores.set(title=title, xlabel="epoch", ylabel=f"mean over {'classes' if classes else 'images'}")
    scores.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
    for axes in of_classes:
        axes.set(title="IoU of each class", xlabel="epoch", facecolor="0.85")  # black and white curves stand out
        for number, item in enumerate(classes[:MAX_CURVES]):
            values = [
                np.nan if entry["val_class_iou"][number] is None else entry["val_class_iou"][number]
                for entry in history
            ]
            axes.plot(epochs, values, marker="o", markersize=3, label=_label(item.name), color=_colour(item))
    for axes in (losses, scores, *of_classes):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small" if axes in of_classes else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_overlay(
    model: Callable[[Tensor], Tensor], pairs: Pairs, config: Config, runtime: Runtime, path: Path, count: int = 8
) -> None:
    """Draw validation images with the true and the predicted outline, or classes, and their Dice; a PNG.

    Args:
        model: in evaluation mode, on the runtime's device.
        pairs: `count` of them are drawn, evenly spread over the list.

    Raises:
        OutputError: the file cannot be written.
    """
    shown = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(np.int64))
    options = {"mask_resize": config.mask_resize, "classes": config.classes, "ignore_value": config.ignore_value}
    bad = BadSamples(pairs, config.bad_samples)  # those that another process has found are not known here
    decoder = HostDecoder(pairs, config.image_height, config.image_width, bad=bad, **options)  # type: ignore[arg-type]
    images, masks, shown = next(decoder.decode([shown]))

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            logits = model(normalise(images.to(runtime.device)))
            return (logits.argmax(1).to(torch.uint8) if config.classes else logits[:, 0].float().sigmoid()).cpu()

    predicted = halve_until_it_fits(predict, runtime.device)(images)
    if config.classes:
        true, dice = masks.numpy(), ClassScores(len(config.classes)).update(predicted, masks)
    else:
        true, dice = masks.numpy() / 255, Scores().update(predicted > 0.5, masks >= 128)
    titles = [f"{Path(pairs.images[index]).stem}   Dice {dice[i]:.4f}" for i, index in enumerate(shown)]
    drawn = list(map(Outlined, images.numpy(), true, predicted.numpy(), titles))
    if config.classes:
        draw_classes(drawn, config.classes, path)
    else:
        draw_outlines(drawn, path)


def draw_worst(wrong: Sequence[Outlined], path: Path) -> None:
    """Draw photos cropped to their outlines, large enough to see the errors; a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    parts = []
    for photo, true, predicted, title in wrong:
        part = _part_around((true > 0.5) | (predicted > 0.5))
        parts.append(Outlined(photo[part], true[part], predicted[part], title))
    draw_outlines(parts, path, columns=2, width=7.0)


def _part_around(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of a mask's foreground with a margin, in the photo's aspect ratio; all if it is empty."""
    if not mask.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    needed = [(span[-1] - span[0] + 1 + 2 * MARGIN) / size for span, size in zip(spans, mask.shape, strict=True)]
    sizes = [round(min(max(needed), 1) * size) for size in mask.shape]
    starts = [
        min(max((span[0] + span[-1] + 1 - size) // 2, 0), whole - size)
        for span, size, whole in zip(spans, sizes, mask.shape, strict=True)
    ]
    return slice(starts[0], starts[0] + sizes[0]), slice(starts[1], starts[1] + sizes[1])


def draw_outlines(shown: Sequence[Outlined], path: Path, *, columns: int = 4, width: float = 3.2) -> None:
    """Draw photos in rows, each with the true and the predicted outline; a PNG.

    Args:
        columns: photos per row, at most.
        width: width of a photo, in inches.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(shown))
    heights = _row_heights(shown, columns, width)
    figure = Figure(figsize=(width * columns, sum(heights) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(heights), columns, height_ratios=heights, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for axes, (photo, true, predicted, title) in zip(all_axes, shown, strict=False):
        axes.imshow(photo)
        for values, colour, line in ((true, TRUE, 1.4), (predicted, PREDICTED, 0.9)):
            if values.min() < 0.5 <= values.max() and min(values.shape) > 1:  # matplotlib draws no line in a line
                axes.contour(values, levels=[0.5], colors=[colour], linewidths=line)
        axes.set_title(_label(title), fontsize=max(8, 1.7 * width))
    handles = [figure.axes[0].plot([], [], color=colour)[0] for colour in (TRUE, PREDICTED)]
    figure.legend(handles, ["true outline", "predicted outline"], loc="outside lower center", ncols=2, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def draw_classes(
    shown: Sequence[Outlined], classes: Sequence[SegClass], path: Path, *, columns: int = 2, width: float = 3.2
) -> None:
    """Draw photos in rows, each with its true classes beside the predicted ones, and a legend; a PNG.

    Args:
        shown: masks are uint8 numbers of classes; others are left as the photo is.
        columns: photos per row, at most.
        width: width of a photo, in inches.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(columns, len(shown))
    heights = _row_heights(shown, columns, width)
    numbers = sorted(set().union(*(np.unique(mask).tolist() for item in shown for mask in (item.true, item.predicted))))
    handles = [
        Patch(facecolor=_colour(classes[number]), edgecolor="grey", label=_label(classes[number].name))
        for number in numbers
        if number < len(classes)
    ]
    per_row = max(1, round(2 * columns * width / 1.6))
    legend_height = 0.25 * -(-len(handles) // per_row) + 0.15
    figure = Figure(figsize=(2 * width * columns, sum(heights) + legend_height), layout="constrained")
    all_axes = figure.subplots(len(heights), 2 * columns, height_ratios=heights, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for (true_axes, predicted_axes), item in zip(all_axes.reshape(-1, 2), shown, strict=False):
        true_axes.imshow(tint_classes(item.photo, item.true, classes))
        predicted_axes.imshow(tint_classes(item.photo, item.predicted, classes))
        true_axes.set_title("truth", fontsize=max(8, 1.7 * width))
        predicted_axes.set_title(_label(item.title), fontsize=max(8, 1.7 * width))
    figure.legend(handles=handles, loc="outside lower center", ncols=per_row, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def tint_classes(photo: Bytes, labels: Bytes, classes: Sequence[SegClass]) -> Bytes:
    """A photo in the colours of its classes, with full colour along their outlines.

    Args:
        photo: (H, W, 3).
        labels: (H, W) uint8 numbers of classes; others, such as `IGNORED`, leave the photo as it is.
    """
    table = np.zeros((256, 3), np.float32)
    table[: len(classes)] = [item.colour for item in classes]
    strength = np.where(table.any(1), np.float32(CLASS_SHARE), np.float32(0))
    outline = np.zeros(labels.shape, np.bool_)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        outline |= np.pad(differs, [(0, 1 - axis), (0, axis)]) | np.pad(differs, [(1 - axis, 0), (axis, 0)])
    share = strength[labels]
    share[outline & (share > 0)] = 1
    return (photo + share[..., None] * (table[labels] - photo)).astype(np.uint8)


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[SegClass], path: Path) -> None:
    """Draw a confusion matrix in percent of each true class; a PNG.

    Args:
        confusion: (C, C) pixels of a true class (row) with a predicted class (column).

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    pixels = confusion.sum(1, keepdims=True)
    share = 100 * confusion / np.maximum(pixels, 1)
    names, count = [_label(item.name) for item in classes], len(classes)
    size = min(2.5 + 0.5 * count, 20)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    every = range(0, count, -(-count // 40))  # labels that fit
    axes.set_xticks(every, [names[number] for number in every], rotation=90)
    axes.set_yticks(every, [names[number] for number in every])
    axes.set(xlabel="predicted", ylabel="true", title="Percent of each true class's pixels")
    if count <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(share):
            if pixels[row]:
                colour = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, shrink=0.8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _row_heights(shown: Sequence[Outlined], columns: int, width: float) -> list[float]:
    """Inches of each row of photos that are `width` inches wide, with their titles."""
    aspects = [item.photo.shape[0] / item.photo.shape[1] for item in shown]
    return [width * max(aspects[i : i + columns]) + 0.35 for i in range(0, len(shown), columns)]


def _label(name: str) -> str:
    """The name of a file or class for matplotlib: it need not be UTF-8, and its dollar signs begin no formula."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def _colour(item: SegClass) -> str:
    """A class's colour as matplotlib takes it."""
    return "#{:02x}{:02x}{:02x}".format(*item.colour)
