"""Pictures and facts of a run: learning curves, outlines over validation images, versions."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastseg.augment import normalise
from fastseg.config import Config
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.metrics import Scores
from fastseg.runtime import Runtime

__all__ = ["draw_curves", "draw_overlay", "versions"]

TRUE, PREDICTED = "#00d5ff", "#ff2e88"  # outlines that stand out from each other and from most photographs
PACKAGES = ("fastseg-dali", "torch", "nvidia-dali-cuda120", "kornia", "numba", "numpy", "simplejpeg", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about speed; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss, and IoU and Dice, by epoch; a PNG.

    Args:
        history: one entry an epoch, as in metrics.jsonl.
    """
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
    figure.savefig(path, dpi=120)


def draw_overlay(
    model: Callable[[Tensor], Tensor], pairs: Pairs, config: Config, runtime: Runtime, path: Path, count: int = 8
) -> None:
    """Validation images with the true and the predicted outline and their Dice; a PNG.

    Args:
        model: in evaluation mode, on the runtime's device.
        pairs: of which `count` are shown, evenly spread over the list.
    """
    shown = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(np.int64))
    decoder = HostDecoder(pairs, config.image_height, config.image_width, mask_resize=config.mask_resize)
    images, masks, _ = next(decoder.decode([shown]))
    with torch.inference_mode(), runtime.autocast():
        inputs, _ = normalise(images.to(runtime.device), masks.to(runtime.device))
        probability = model(inputs)[:, 0].float().sigmoid().cpu()
    dice = Scores().update(probability > 0.5, masks >= 128)

    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    height = 3.2 * config.image_height / config.image_width + 0.35
    figure = Figure(figsize=(3.2 * columns, height * rows + 0.4), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for i, index in enumerate(shown):
        axes = all_axes[i]
        axes.imshow(images[i].numpy())
        for values, colour, width in ((masks[i].numpy() / 255, TRUE, 1.4), (probability[i].numpy(), PREDICTED, 0.9)):
            if values.min() < 0.5 <= values.max():
                axes.contour(values, levels=[0.5], colors=[colour], linewidths=width)
        axes.set_title(f"{Path(pairs.images[index]).stem}   Dice {dice[i]:.4f}", fontsize=8)
    handles = [figure.axes[0].plot([], [], color=colour)[0] for colour in (TRUE, PREDICTED)]
    figure.legend(handles, ["true outline", "predicted outline"], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
