"""The files of a run besides its checkpoints: `config.json`, `metrics.jsonl`, plots and `summary.json`."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastseg.config import Config
from fastseg.errors import DataError, FastsegError, OutputError
from fastseg.network.checkpoint import load_checkpoint, load_weights
from fastseg.plots import draw_curves, draw_overlay
from fastseg.runtime.device import versions
from fastseg.runtime.files import (
    FileVersion,
    atomic_write,
    file_version,
    json_text,
    lock_folder,
    make_folder,
    remove_dead_temporaries,
)
from fastseg.training.state import Run

__all__ = ["FIRST_STEPS", "TrainResult", "draw_val_overlay", "log_epoch", "open_run_dir", "summarise"]

FIRST_STEPS = "first step of each size"  # a part of the time: it compiles and chooses kernels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. Scores are those of the best epoch, on validation masks at the training size.

    A run that is interrupted in its first epoch has `best_epoch` 0 and scores of NaN.
    """

    run_dir: Path
    val_dice: float  #: mean over images; with classes, mean over those of all images
    val_iou: float
    best_epoch: int  #: counted from 1
    pairs_per_s: float  #: training only, decoding included
    seconds: float  #: of this call
    interrupted: bool  #: by Ctrl-C or SIGTERM; the same call resumes the run
    history: list[dict[str, Any]]  #: one entry per epoch, as in metrics.jsonl


@contextmanager
def open_run_dir(run: Run, read: FileVersion) -> Iterator[None]:
    """Make the run's folder with `config.json` and `metrics.jsonl`, and hold it for the block; only rank 0 writes.

    Args:
        read: version of the `last.pt` that the run has read.

    Raises:
        FastsegError: another process trains in the folder, or has since `last.pt` was read.
        OutputError: it cannot be written.
    """
    if run.runtime.rank > 0:
        yield
        return
    folder = run.config.run_dir
    make_folder(folder)
    with lock_folder(folder, "Wait for its end, or choose another name"):
        if file_version(folder / "last.pt") != read:
            raise FastsegError(f"{folder / 'last.pt'}: another process has just written it. Start again to resume.")
        remove_dead_temporaries(folder)
        _write_run_files(run, folder)
        yield


def _write_run_files(run: Run, folder: Path) -> None:
    with atomic_write(folder / "config.json") as temporary:
        run.config.to_json(temporary)
    # A killed run may have logged an epoch after its last checkpoint. It is trained again, so its line is removed.
    with atomic_write(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(map(_json_line, run.history)))


def log_epoch(run_dir: Path, entry: dict[str, Any]) -> None:
    """Append an epoch's entry to `metrics.jsonl`.

    Raises:
        OutputError: it cannot be written.
    """
    path = run_dir / "metrics.jsonl"
    try:
        with open(path, "a") as file:
            file.write(_json_line(entry))
    except OSError as error:
        raise OutputError(path, error) from None


def _json_line(entry: dict[str, Any]) -> str:
    return json_text(entry) + "\n"


def draw_val_overlay(run: Run, model: nn.Module) -> Path | None:
    """Draw eight validation images with the true and the predicted masks.

    Returns:
        The path of the PNG; None, with a warning, if it cannot be written.
    """
    path = run.config.run_dir / "overlay.png"
    usable = run.val_loader.pairs.without(run.val_loader.bad.found)
    return path if _draw(draw_overlay, model.eval(), usable, run.config, run.runtime, path) else None


def _draw(draw: Callable[..., None], *arguments: Any) -> bool:
    """Draw a picture; warn if its photos cannot be read or it cannot be written: a run is worth more than pictures."""
    try:
        draw(*arguments)
    except (DataError, OutputError) as error:
        log.warning("%s", error)
        return False
    return True


def _other_scores(config: Config, best: dict[str, Any]) -> dict[str, Any]:
    """The best epoch's other scores, and how they were measured."""
    size = f"{config.image_width}x{config.image_height}"
    if not config.classes:
        pixels = {name: best[name] for name in ("val_dice_pixels", "val_iou_pixels")}
        return {**pixels, "scored": f"{size}, mask cells at least half covered"}
    ious, dices = (best.get(f"val_class_{name}", [None] * len(config.classes)) for name in ("iou", "dice"))
    return {
        "val_pixel_accuracy": best.get("val_pixel_accuracy", math.nan),
        "classes": {
            item.name: {"iou": iou, "dice": dice} for item, iou, dice in zip(config.classes, ious, dices, strict=True)
        },
        "scored": f"{size}, means over classes",
    }


def summarise(run: Run, left_out: list[str]) -> TrainResult:
    """Draw the plots with the best epoch's weights, write `summary.json` and log the times.

    Args:
        left_out: images that the checks before training have excluded.

    Raises:
        OutputError: a file cannot be written.
    """
    folder, best = run.config.run_dir, run.best
    for loader in (run.train_loader, run.val_loader):
        left_out += [loader.pairs.images[index] for index in loader.bad.found]
    began = time.perf_counter()
    refiner_scores = None
    if run.history and run.runtime.rank == 0:
        state = load_checkpoint(folder / "best.pt")
        load_weights(run.model, state, folder / "best.pt", run.config)
        refiner_scores = state.get("refiner_scores")
        _draw(draw_curves, run.history, folder / "curves.png", run.config.classes)
        draw_val_overlay(run, run.model)
    run.seconds["pictures"] += time.perf_counter() - began
    stepping = sum(run.seconds[part] for part in ("steps", FIRST_STEPS, "waiting for data"))
    result = TrainResult(
        run_dir=folder,
        val_dice=best["val_dice"],
        val_iou=best["val_iou"],
        best_epoch=best["epoch"],
        pairs_per_s=run.trained_pairs / stepping if stepping else run.history[-1]["pairs_per_s"],
        seconds=time.perf_counter() - run.start_time,
        interrupted=run.interrupted,
        history=run.history,
    )
    summary = {
        **{name: value for name, value in asdict(result).items() if name not in ("history", "run_dir")},
        **_other_scores(run.config, best),
        "outline_refiner": refiner_scores,
        "epochs": run.epoch,
        "seconds_by_part": {part: round(seconds, 3) for part, seconds in run.seconds.items()},
        "device": run.runtime.description,
        "processes": run.runtime.world_size,
        "train_pairs": len(run.train_loader.pairs),
        "val_pairs": len(run.val_loader.pairs),
        "bad_samples": {"count": len(left_out), "images": left_out[:100]},
        "versions": versions(),
    }
    if run.runtime.rank == 0:
        with atomic_write(folder / "summary.json") as temporary:
            temporary.write_text(json_text(summary, indent=2) + "\n")
    parts = ", ".join(
        f"{part} {seconds:.1f} s" for part, seconds in sorted(run.seconds.items(), key=lambda item: -item[1])
    )
    log.info("%.0f s: %s; trained at %.0f pairs/s", result.seconds, parts, result.pairs_per_s)
    return result
