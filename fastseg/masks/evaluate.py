"""Scores of a trained network on a folder of pairs, at the training size and at the photos' own size."""

import csv
import logging
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.config import Config
from fastseg.data.decode import decode_full_mask, decode_full_photo
from fastseg.data.host import decode_file, load_photo
from fastseg.data.loader import Loader, make_loader
from fastseg.data.pairs import Pairs, find_pairs
from fastseg.errors import ConfigError, DataError, OutputError
from fastseg.masks.refine import METHODS, guide_size
from fastseg.masks.refine import refine as refine_logits
from fastseg.masks.upsample import threshold_logits
from fastseg.network.checkpoint import load_model
from fastseg.network.losses import bce_dice_loss
from fastseg.network.metrics import BOUNDARY_PIXELS, Scores, boundary_iou
from fastseg.network.normalise import normalise, to_targets
from fastseg.network.unet import UNet
from fastseg.plots import Outlined, draw_worst
from fastseg.quality.headers import check_pairs
from fastseg.runtime.device import Runtime, choose_runtime, versions
from fastseg.runtime.files import atomic_write, json_text, make_folder
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.out_of_memory import halve_until_it_fits, report_out_of_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads, map_ahead

__all__ = ["evaluate"]

NUM_WORST = 8  # images in worst.png
AHEAD = 2  # images per thread that are scored ahead of the progress bar

log = logging.getLogger(__name__)


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
        """The Dice by which the worst images are chosen."""
        return self.dice if self.full_dice is None else self.full_dice


class _Output(NamedTuple):
    """The network's output for one pair, on the CPU."""

    pair: int
    logits: Tensor  # (1, 1, h, w)
    masks: Tensor  # (1, h, w) uint8


class _Scored(NamedTuple):
    """The scores of one pair."""

    row: _Row
    loss: float
    small: Tensor  # `Scores.sums` of this image at the training size
    full: Tensor  # likewise at full size
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None  # true and predicted at full size


@dataclass
class _Totals:
    """The scores of all images so far."""

    small: Scores = field(default_factory=Scores)
    full: Scores = field(default_factory=Scores)
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
    """Score a checkpoint on a folder of pairs, at the training size and at the photos' own size.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        img_dir, mask_dir: as for `find_pairs`.
        full_size: also score masks at the photo's own size.
        refine: how the photo refines the logits before they are upsampled: "crf" (a conditional random field) or
            "none".
        out: folder for `scores.csv` (one line per image), `summary.json`, and with `full_size` `worst.png` (the eight
            worst images with both outlines).
        changes: fields of `Config` that differ from the checkpoint's, such as `device` or `batch_size`.

    Returns:
        At the training size `dice` and `iou` (means over images), `dice_pixels` and `iou_pixels` (pooled) and `loss`;
        masks count as foreground where at least half of a cell is covered. At full size `full_dice`, `full_iou`,
        `full_dice_pixels`, `full_iou_pixels` and `full_boundary_iou` (mean over images) within `boundary_pixels` of
        the outlines. `images` is their number, `worst` the Dice of the eight worst by name (at full size, if that
        was scored).

    Raises:
        CheckpointError, ConfigError, DataError: a file, field or folder cannot be used.
        OutputError: `out` cannot be written; the scores are logged.
        FastsegError: the memory is full, even with one image per forward pass.
    """
    if refine not in METHODS:
        raise ConfigError(f"refine: must be one of {', '.join(METHODS)}; got {refine!r}. Use none.")
    model, trained = load_model(checkpoint)
    config = Config(**{**trained.model_dump(exclude={"device", "precision"}), **changes})
    runtime = choose_runtime(config)
    pairs = find_pairs(img_dir, mask_dir, bad_samples=config.bad_samples)
    if out is not None:
        make_folder(out)
    if config.check_data:
        pairs = check_pairs(pairs, bad_samples=config.bad_samples, num_workers=config.num_workers)
    alone = replace(runtime, rank=0, world_size=1)
    loader = make_loader(pairs, config.replace(cache="off"), alone, training=False)
    advice = "Lower batch_size or num_workers"
    with retain_freed_memory(runtime.device), report_out_of_memory(runtime.device, advice):
        score = partial(_score, pairs=pairs, config=config, full_size=full_size, refine=refine)
        totals = _score_pairs(runtime.to_device(model), loader, runtime, config, score, keep_worst=out is not None)
    scores = _summarise(totals, full_size, pairs.image_dir)
    if out is not None:
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
        _write_results(Path(out), totals, {**scores, **about})
    return scores


def _score_pairs(
    model: UNet,
    loader: Loader,
    runtime: Runtime,
    config: Config,
    score: Callable[[_Output], _Scored],
    *,
    keep_worst: bool,
) -> _Totals:
    """Run the network over all pairs, in order, and score each image in a thread: photos may differ in size."""
    pairs, totals = loader.pairs, _Totals()
    num_threads = count_threads(config.num_workers)
    with (
        progress_bar() as bar,
        ThreadPoolExecutor(num_threads, thread_name_prefix="fastseg-score") as pool,
        closing(_network_outputs(model, loader, runtime)) as outputs,
        closing(map_ahead(pool, partial(_or_error, score), outputs, AHEAD * num_threads)) as futures,
    ):
        task = bar.add_task("scoring", total=len(pairs))
        for future in futures:
            bar.advance(task)
            index, scored = future.result()
            if isinstance(scored, DataError):
                loader.bad.report(index, scored)
                continue
            totals.small.sums += scored.small
            totals.full.sums += scored.full
            totals.losses.append(scored.loss)
            totals.rows.append(scored.row)
            if keep_worst and scored.masks is not None:
                _keep_if_worst(totals.worst, scored.row, pairs.image_path(index), *scored.masks)
    return totals


def _network_outputs(model: UNet, loader: Loader, runtime: Runtime) -> Generator[_Output, None, None]:
    """The network's output for every pair that can be decoded, in order."""
    position = 0

    def predict_logits(images: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            return model(normalise(images)).float().cpu()

    forward = halve_until_it_fits(predict_logits, runtime.device)
    for images, masks, indices in loader:
        logits = forward(images)
        masks = masks.cpu()
        for i, index in enumerate(indices):
            if index == position:  # otherwise another pair replaces one that is broken
                yield _Output(position, logits[i : i + 1], masks[i : i + 1])
            position += 1


def _or_error(score: Callable[[_Output], _Scored], output: _Output) -> tuple[int, _Scored | DataError]:
    try:
        return output.pair, score(output)
    except DataError as error:
        return output.pair, error


@torch.inference_mode()
def _score(output: _Output, *, pairs: Pairs, config: Config, full_size: bool, refine: str) -> _Scored:
    """Score one pair. Called in threads.

    Raises:
        DataError: a file cannot be decoded at full size.
    """
    pair, logits, masks = output
    small, full, name = Scores(), Scores(), pairs.images[pair]
    dice = small.update(logits[:, 0] > 0, masks >= 128).item()
    loss = bce_dice_loss(logits, to_targets(masks)).item()
    row = _Row(name, dice, _iou(dice))
    if not full_size:
        return _Scored(row, loss, small.sums, full.sums, None)
    true = decode_file(pairs.mask_path(pair), decode_full_mask)
    height, width = true.shape
    if refine != "none":
        guide = load_photo(pairs.image_path(pair), guide_size(config.image_height, config.image_width))
        logits = refine_logits(logits, torch.from_numpy(guide)[None], (height, width), refine)
    predicted = threshold_logits(logits[0, 0].numpy(), height, width)
    both = torch.from_numpy(predicted)[None], torch.from_numpy(true)[None]
    dice, band = full.update(*both).item(), boundary_iou(*both).item()
    row = _Row(name, row.dice, row.iou, dice, _iou(dice), band)
    return _Scored(row, loss, small.sums, full.sums, (true, predicted))


def _keep_if_worst(
    worst: list[tuple[float, Outlined]], row: _Row, path: str, true: NDArray[np.bool_], predicted: NDArray[np.bool_]
) -> None:
    """Add an image to the worst so far, for the picture, if it is one of them."""
    if len(worst) < NUM_WORST or row.rank < worst[-1][0]:
        photo = decode_file(path, decode_full_photo)
        worst.append((row.rank, Outlined(photo, true, predicted, f"{row.image}   Dice {row.rank:.4f}")))
        worst.sort(key=lambda kept: kept[0])
        del worst[NUM_WORST:]


def _iou(dice: float) -> float:
    return dice / (2 - dice)


def _summarise(totals: _Totals, full_size: bool, folder: str) -> dict[str, Any]:
    """What `evaluate` returns."""
    rows = totals.rows
    if not rows:
        raise DataError(f"{folder}: not one of its pairs can be used.")
    scores: dict[str, Any] = {**totals.small.compute(), "loss": float(np.mean(totals.losses)), "images": len(rows)}
    if full_size:
        scores |= {f"full_{name}": value for name, value in totals.full.compute().items()}
        scores["full_boundary_iou"] = float(np.mean([row.full_boundary_iou for row in rows]))
        scores["boundary_pixels"] = BOUNDARY_PIXELS
    worst = sorted(rows, key=lambda row: row.rank)[:NUM_WORST]
    return {**scores, "worst": {row.image: row.rank for row in worst}}


def _write_results(folder: Path, totals: _Totals, summary: dict[str, Any]) -> None:
    try:
        with (
            atomic_write(folder / "scores.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(_Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in totals.rows)
        with atomic_write(folder / "summary.json") as temporary:
            temporary.write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
    except OutputError:
        log.error("scores: %s", json_text(summary))
        raise
    if totals.worst:
        try:
            draw_worst([outlined for _, outlined in totals.worst], folder / "worst.png")
        except OutputError as error:
            log.warning("%s", error)
