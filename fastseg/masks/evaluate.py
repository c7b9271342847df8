"""How good a trained network is: scores of a folder of pairs, at the size it was trained at and at the photos' own."""

import contextlib
import csv
import itertools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.config import Config
from fastseg.data.decode import decode_full_photo
from fastseg.data.host import decode_file
from fastseg.data.loader import Loader
from fastseg.data.pairs import find_pairs
from fastseg.errors import ConfigError, DataError
from fastseg.masks import refine as refinement
from fastseg.masks.full_size import FullPair, decode_full_pairs
from fastseg.masks.upsample import upsample_logits
from fastseg.network.checkpoint import load_model
from fastseg.network.losses import bce_dice_loss
from fastseg.network.metrics import BOUNDARY_PIXELS, Scores, boundary_iou
from fastseg.network.normalise import normalise, to_targets
from fastseg.network.unet import UNet
from fastseg.plots import Outlined, draw_worst
from fastseg.quality.headers import check_pairs
from fastseg.runtime.device import Runtime, choose_runtime, versions
from fastseg.runtime.files import atomic_write
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.progress import progress_bar

__all__ = ["evaluate"]

WORST = 8  # images that worst.png shows


@dataclass(frozen=True)
class _Row:
    """Scores of one image, a line of scores.csv."""

    image: str
    dice: float
    iou: float
    full_dice: float | None = None
    full_iou: float | None = None
    full_boundary_iou: float | None = None

    @property
    def rank(self) -> float:
        """By which the worst are chosen."""
        return self.dice if self.full_dice is None else self.full_dice


@dataclass
class _Tally:
    """What is known after some images."""

    small: Scores
    full: Scores
    losses: list[float] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    worst: list[tuple[float, Outlined]] = field(default_factory=list)  # with their Dice, the lowest first


def evaluate(
    checkpoint: str | os.PathLike[str],
    img_dir: str | os.PathLike[str],
    mask_dir: str | os.PathLike[str],
    *,
    full_size: bool = True,
    refine: str = "crf",
    out: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Score a checkpoint on a folder of pairs, at the size it was trained at and at the photos' own size.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        img_dir, mask_dir: as for `find_pairs`.
        full_size: also score logits upsampled to the photo's size against the whole mask.
        refine: what corrects the logits by the photo before they are upsampled: "none" or "crf"
            (`refinement.refine`).
        out: folder for `scores.csv` (one line an image), `summary.json` and `worst.png` (the eight worst images with
            both outlines; with `full_size`).
        changes: fields of `Config` that differ from the checkpoint's, such as `device` or `batch_size`.

    Returns:
        At the training size `dice` and `iou` (means over images), `dice_pixels` and `iou_pixels` (pooled) and `loss`;
        masks count as foreground where at least half of a cell is covered. At full size `full_dice`, `full_iou`,
        `full_dice_pixels`, `full_iou_pixels` and `full_boundary_iou` (mean over images) within `boundary_pixels` of
        the outlines. `images`, their number, and `worst`, the Dice of the eight worst by name (at full size, if that
        was scored).

    Raises:
        CheckpointError, ConfigError, DataError: one sentence with the remedy.
    """
    if refine not in refinement.METHODS:
        raise ConfigError(f"refine: must be one of {', '.join(refinement.METHODS)}; got {refine!r}. Use none.")
    model, trained = load_model(checkpoint)
    config = Config(**{**trained.model_dump(exclude={"device", "precision"}), **changes})
    runtime = choose_runtime(config)
    pairs = find_pairs(img_dir, mask_dir, bad_samples=config.bad_samples)
    folder = None if out is None else _open_folder(out)
    if config.check_data:
        pairs = check_pairs(pairs, bad_samples=config.bad_samples, num_workers=config.num_workers)
    loader = Loader(
        pairs,
        height=config.image_height,
        width=config.image_width,
        batch_size=config.batch_size,
        shuffle=False,
        device=runtime.device,
        decoder=config.decoder,
        num_workers=config.num_workers,
        mask_resize=config.mask_resize,
        cache="off",
        bad_samples=config.bad_samples,
        pin_memory=config.pin_memory,
    )
    with retain_freed_memory(runtime.device):
        tally = _score_pairs(runtime.to_device(model), loader, runtime, config, full_size, refine, folder is not None)
    scores = _summarise(tally, full_size, pairs.image_dir)
    if folder is not None:
        about = {
            "checkpoint": os.fspath(checkpoint),
            "img_dir": os.fspath(img_dir),
            "mask_dir": os.fspath(mask_dir),
            "scored_at": f"{config.image_width}x{config.image_height}" + (" and full size" if full_size else ""),
            "refine": refine,
            "device": runtime.description,
            "left_out": [*pairs.left_out, *(pairs.images[index] for index in sorted(loader.bad.found))],
            "versions": versions(),
        }
        _write_results(folder, tally, {**scores, **about})
    return scores


def _score_pairs(
    model: UNet, loader: Loader, runtime: Runtime, config: Config, full_size: bool, refine: str, keep_worst: bool
) -> _Tally:
    """Run the network over all pairs, in order, and score one image at a time: photos may differ in size."""
    pairs, tally = loader.pairs, _Tally(Scores(runtime.device), Scores(runtime.device))
    photo_size = None if refine == "none" else refinement.guide_size(config.image_height, config.image_width)
    full_pairs = decode_full_pairs(pairs, num_workers=config.num_workers, photo_size=photo_size)
    with torch.inference_mode(), contextlib.closing(full_pairs), progress_bar() as bar:
        task = bar.add_task("scoring", total=len(pairs))
        decoded = enumerate(full_pairs if full_size else itertools.repeat(None, len(pairs)))
        for images, masks, indices in loader:
            inputs, targets = normalise(images), to_targets(masks)
            with runtime.autocast():
                logits = model(inputs)
            for i, (pair, waiting) in zip(range(len(indices)), decoded, strict=False):
                bar.advance(task)
                if indices[i] != pair:  # another pair stands in for one that broke
                    continue
                try:
                    full = None if waiting is None else waiting.result()
                except DataError as error:
                    loader.bad.report(pair, error)
                    continue
                one = slice(i, i + 1)
                dice = tally.small.update(logits[one, 0] > 0, masks[one] >= 128).item()
                tally.losses.append(bce_dice_loss(logits[one], targets[one]).item())
                row = _Row(pairs.images[pair], dice, _iou(dice))
                if full is not None:
                    row, predicted = _score_full(row, logits[one].float(), full, refine, tally.full)
                    if keep_worst:
                        _keep_if_worst(tally.worst, row, pairs.image_path(pair), full.mask, predicted)
                tally.rows.append(row)
    return tally


def _score_full(
    row: _Row, logits: Tensor, full: FullPair, refine: str, scores: Scores
) -> tuple[_Row, NDArray[np.bool_]]:
    """Add an image's scores at full size; returns its row and the predicted mask."""
    true = torch.from_numpy(full.mask)[None].to(logits.device)
    height, width = full.mask.shape
    if full.photo is not None:
        photos = torch.from_numpy(full.photo)[None]
        logits = refinement.refine(logits, photos, (height, width), refine)
    predicted = upsample_logits(logits, height, width)[:, 0] > 0
    dice, band = scores.update(predicted, true).item(), boundary_iou(predicted, true).item()
    return _Row(row.image, row.dice, row.iou, dice, _iou(dice), band), predicted[0].cpu().numpy()


def _keep_if_worst(
    worst: list[tuple[float, Outlined]], row: _Row, path: str, true: NDArray[np.bool_], predicted: NDArray[np.bool_]
) -> None:
    """Put an image among the worst seen so far, for the picture, if it belongs there."""
    if len(worst) < WORST or row.rank < worst[-1][0]:
        photo = decode_file(path, decode_full_photo)
        worst.append((row.rank, Outlined(photo, true, predicted, f"{row.image}   Dice {row.rank:.4f}")))
        worst.sort(key=lambda kept: kept[0])
        del worst[WORST:]


def _iou(dice: float) -> float:
    return dice / (2 - dice)


def _summarise(tally: _Tally, full_size: bool, folder: str) -> dict[str, Any]:
    """What `evaluate` returns."""
    rows = tally.rows
    if not rows:
        raise DataError(f"{folder}: not one of its pairs can be used.")
    scores: dict[str, Any] = {**tally.small.compute(), "loss": float(np.mean(tally.losses)), "images": len(rows)}
    if full_size:
        scores |= {f"full_{name}": value for name, value in tally.full.compute().items()}
        scores["full_boundary_iou"] = float(np.mean([row.full_boundary_iou for row in rows]))
        scores["boundary_pixels"] = BOUNDARY_PIXELS
    worst = sorted(rows, key=lambda row: row.rank)[:WORST]
    return {**scores, "worst": {row.image: row.rank for row in worst}}


def _open_folder(out: str | os.PathLike[str]) -> Path:
    """Make the folder for results before any work is done."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made ({error.strerror}). Name another folder.") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out: {out} cannot be written to. Name another folder.")
    return folder


def _write_results(folder: Path, tally: _Tally, summary: dict[str, Any]) -> None:
    path = folder / "scores.csv"
    try:
        with atomic_write(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(_Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in tally.rows)
        path = folder / "summary.json"
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        path = folder / "worst.png"
        if tally.worst:
            draw_worst([outlined for _, outlined in tally.worst], path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}). Make room and run again; the scores are "
            f"{json.dumps(summary)}."
        ) from None
