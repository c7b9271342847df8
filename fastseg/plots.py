"""Plots of a run: learning curves, and outlines drawn over images.

matplotlib is imported when the first plot is drawn, so that the first training step does not wait for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.config import Config
from fastseg.data.batch import BadSamples
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.network.metrics import Scores
from fastseg.network.normalise import normalise
from fastseg.runtime.device import Runtime
from fastseg.runtime.files import atomic_write
from fastseg.runtime.out_of_memory import halve_until_it_fits

__all__ = ["Outlined", "draw_curves", "draw_outlines", "draw_overlay", "draw_worst"]

TRUE, PREDICTED = "#00d5ff", "#ff2e88"  # outlines that stand out from each other and from most photographs
MARGIN = 40  # pixels of the photo around its outlines


class Outlined(NamedTuple):
    """A photo and two masks, whose outlines at 0.5 are drawn over it."""

    photo: NDArray[np.uint8]  # (H, W, 3)
    true: NDArray[Any]  # (H, W) bool, or in [0, 1]
    predicted: NDArray[Any]  # likewise
    title: str


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, IoU and Dice by epoch; a PNG.

    Args:
        history: one entry per epoch, as in metrics.jsonl.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    epochs = [entry["epoch"] for entry in history]
    best = max(history, key=lambda entry: entry["val_dice"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        losses.plot(epochs, [entry[name] for entry in history], marker="o", markersize=3, label=label)
    losses.set(title="Loss (BCE + Dice)", xlabel="epoch", yscale="log")
    for name, label in (("val_dice", "Dice"), ("val_iou", "IoU")):
        scores.plot(epochs, [entry[name] for entry in history], marker="o", markersize=3, label=label)
    title = f"Validation: best Dice {best['val_dice']:.4f}, IoU {best['val_iou']:.4f}"
    scores.set(title=title, xlabel="epoch", ylabel="mean over images")
    scores.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_overlay(
    model: Callable[[Tensor], Tensor], pairs: Pairs, config: Config, runtime: Runtime, path: Path, count: int = 8
) -> None:
    """Draw validation images with the true and the predicted outline and their Dice; a PNG.

    Args:
        model: in evaluation mode, on the runtime's device.
        pairs: `count` of them are drawn, evenly spread over the list.

    Raises:
        OutputError: the file cannot be written.
    """
    shown = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(np.int64))
    bad = BadSamples(pairs, config.bad_samples)  # those that another process has found are not known here
    decoder = HostDecoder(pairs, config.image_height, config.image_width, mask_resize=config.mask_resize, bad=bad)
    images, masks, shown = next(decoder.decode([shown]))

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            return model(normalise(images.to(runtime.device)))[:, 0].float().sigmoid().cpu()

    probability = halve_until_it_fits(predict, runtime.device)(images)
    dice = Scores().update(probability > 0.5, masks >= 128)
    titles = [f"{Path(pairs.images[index]).stem}   Dice {dice[i]:.4f}" for i, index in enumerate(shown)]
    draw_outlines(list(map(Outlined, images.numpy(), masks.numpy() / 255, probability.numpy(), titles)), path)


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
    aspects = [photo.shape[0] / photo.shape[1] for photo, *_ in shown]
    heights = [width * max(aspects[i : i + columns]) + 0.35 for i in range(0, len(shown), columns)]
    figure = Figure(figsize=(width * columns, sum(heights) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(heights), columns, height_ratios=heights, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for axes, (photo, true, predicted, title) in zip(all_axes, shown, strict=False):
        axes.imshow(photo)
        for values, colour, line in ((true, TRUE, 1.4), (predicted, PREDICTED, 0.9)):
            if values.min() < 0.5 <= values.max():
                axes.contour(values, levels=[0.5], colors=[colour], linewidths=line)
        # Names of files need not be UTF-8, and their dollar signs begin no formula.
        axes.set_title(title.encode(errors="replace").decode(), fontsize=max(8, 1.7 * width), parse_math=False)
    handles = [figure.axes[0].plot([], [], color=colour)[0] for colour in (TRUE, PREDICTED)]
    figure.legend(handles, ["true outline", "predicted outline"], loc="outside lower center", ncols=2, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
