"""Scores of a trained network on a folder of pairs, at the training size and at the photos' own size."""

import csv
import logging
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.data.decode import Size, decode_full_photo
from fastseg.data.host import decode_file
from fastseg.data.loader import Loader, make_loader
from fastseg.data.pairs import find_pairs
from fastseg.errors import DataError, OutputError
from fastseg.masks.refine import check_method, choose_refinement, load_guide
from fastseg.masks.score import NUM_WORST, Output, Row, Scored, Totals, choose_score, mean_of
from fastseg.network.checkpoint import load_model
from fastseg.network.metrics import BOUNDARY_PIXELS, ClassScores, Scores
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import Refiner, refine_outline
from fastseg.plots import Outlined, draw_classes, draw_confusion, draw_worst
from fastseg.quality.headers import check_pairs
from fastseg.runtime.device import Runtime, choose_inference_runtime, versions
from fastseg.runtime.distributed import barrier, process_group
from fastseg.runtime.files import atomic_write, json_text, make_folder
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.out_of_memory import halve_until_it_fits, report_out_of_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads, map_ahead

__all__ = ["evaluate"]

AHEAD = 2  # images per thread that are scored ahead of the progress bar

log = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | os.PathLike[str],
    img_dir: str | os.PathLike[str],
    mask_dir: str | os.PathLike[str],
    *,
    full_size: bool = True,
    refine: str = "auto",
    out: str | os.PathLike[str] | None = None,
    network: nn.Module | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Score a checkpoint on a folder of pairs, at the training size and at the photos' own size.

    Under torchrun each rank scores its share of the batches; every rank returns the scores of all images.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        img_dir, mask_dir: as for `find_pairs`.
        full_size: also score masks at the photo's own size.
        refine: as for `predict`; about the scores at full size.
        out: folder for `scores.csv` (one line per image), `summary.json`, with `full_size` `worst.png` (the eight
            worst images with both outlines, or with the true and the predicted classes), and with classes
            `confusion.png`.
        network: as for `fastseg.load`.
        changes: fields of `Config` that differ from the checkpoint's, such as `device` or `batch_size`.

    Returns:
        At the training size `dice` and `iou` (means over images), `dice_pixels` and `iou_pixels` (pooled) and `loss`;
        masks count as foreground where at least half of a cell is covered. At full size `full_dice`, `full_iou`,
        `full_dice_pixels`, `full_iou_pixels` and `full_boundary_iou` (mean over images) within `boundary_pixels` of
        the outlines. `images` is their number, `worst` the Dice of the eight worst by name (at full size, if that
        was scored).

        With classes, all scores are pooled over the pixels of all images that are not ignored, and `dice`, `iou` and
        `full_boundary_iou` are means over the classes that occur. `pixel_accuracy`, `class_dice` and `class_iou` (by
        name; None for a class that does not occur) take the place of `dice_pixels` and `iou_pixels`; likewise at full
        size, with `full_class_boundary_iou` (for each class the mean over its images).

    Raises:
        CheckpointError, ConfigError, DataError: a file, field or folder cannot be used.
        OutputError: `out` cannot be written; the scores are logged.
        FastsegError: the memory is full, even with one image per forward pass.
    """
    check_method(refine)  # a wrong name is reported before the checkpoint is read
    model, trained = load_model(checkpoint, network)
    refine, refiner = choose_refinement(refine if full_size else "none", checkpoint, trained)
    with process_group(changes.get("device", "auto")):
        runtime, config = choose_inference_runtime(trained, changes)
        pairs = find_pairs(img_dir, mask_dir, bad_samples=config.bad_samples)
        if out is not None:
            make_folder(out)
        if config.check_data:
            names = ("bad_samples", "num_workers", "classes", "ignore_value")
            pairs = check_pairs(pairs, **{name: getattr(config, name) for name in names})
        # Whole batches, because the logits of an image depend in their last bits on the size of its batch.
        loader = make_loader(pairs, config.replace(cache="off"), runtime, training=False, whole_batches=True)
        advice = "Lower batch_size or num_workers"
        with retain_freed_memory(runtime.device), report_out_of_memory(runtime.device, advice):
            score = choose_score(pairs, config, full_size=full_size, refine=refine)
            if refiner:
                refiner = refiner.to(runtime.device)
            model = runtime.to_device(model)
            totals = _score_pairs(model, refiner, loader, runtime, config, score, keep_worst=out is not None)
        totals.gather()
        scores = _summarise(totals, config, full_size, pairs.image_dir) | {"refine": refine}
        if out is not None and runtime.rank == 0:
            about = {
                "checkpoint": os.fspath(checkpoint),
                "img_dir": os.fspath(img_dir),
                "mask_dir": os.fspath(mask_dir),
                "scored_at": f"{config.image_width}x{config.image_height}" + (" and full size" if full_size else ""),
                "device": runtime.description,
                "left_out": [*pairs.left_out, *(pairs.images[index] for index in totals.left_out)],
                "versions": versions(),
            }
            _write_results(Path(out), totals, {**scores, **about}, config)
        barrier()  # no rank returns before the files exist
    return scores


def _score_pairs(
    model: nn.Module,
    refiner: Refiner | None,
    loader: Loader,
    runtime: Runtime,
    config: Config,
    score: Callable[[Output], Scored],
    *,
    keep_worst: bool,
) -> Totals:
    """Run the network over all pairs, in order, and score each image in a thread: photos may differ in size."""
    pairs, num_classes = loader.pairs, len(config.classes)
    small, full = (ClassScores(num_classes) if num_classes else Scores() for _ in range(2))
    totals = Totals(small, full)
    num_threads = count_threads(config.num_workers)
    with (
        progress_bar(shown=runtime.rank == 0) as bar,
        ThreadPoolExecutor(num_threads, thread_name_prefix="fastseg-score") as pool,
        closing(_network_outputs(model, loader, runtime)) as outputs,
        closing(_refine_outputs(outputs, refiner, loader, config, pool)) as refined,
        closing(map_ahead(pool, partial(_or_error, score), refined, AHEAD * num_threads)) as futures,
    ):
        task = bar.add_task("scoring", total=sum(map(len, loader.batches(0))))
        for future in futures:
            bar.advance(task)
            index, scored = future.result()
            if isinstance(scored, DataError):
                loader.bad.report(index, scored)
                continue
            totals.add(index, scored)
            if keep_worst and scored.masks is not None:
                _keep_if_worst(totals.worst, scored.row, index, pairs.image_path(index), *scored.masks)
    totals.left_out = list(loader.bad.found)
    return totals


def _network_outputs(model: nn.Module, loader: Loader, runtime: Runtime) -> Generator[Output, None, None]:
    """The network's output for every pair that can be decoded, in order."""

    def predict_logits(images: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            return model(normalise(images)).float().cpu()

    forward = halve_until_it_fits(predict_logits, runtime.device)
    for (images, masks, indices), wanted in zip(loader, loader.batches(0), strict=True):
        logits = forward(images)
        masks = masks.cpu()
        for i in np.flatnonzero(indices == wanted):  # at the others, a pair replaces one that is broken
            yield Output(int(wanted[i]), logits[i : i + 1], masks[i : i + 1])


def _refine_outputs(
    outputs: Generator[Output, None, None],
    refiner: Refiner | None,
    loader: Loader,
    config: Config,
    pool: ThreadPoolExecutor,
) -> Generator[Output, None, None]:
    """The network's outputs with their refined logits; pairs whose photo cannot be decoded are reported."""
    if refiner is None:
        yield from outputs
        return

    def read_guide(output: Output) -> tuple[Output, Size, NDArray[np.uint8]] | None:
        try:
            return output, *load_guide(loader.pairs.image_path(output.pair), config, refiner)
        except DataError as error:
            loader.bad.report(output.pair, error)
            return None

    with closing(map_ahead(pool, read_guide, outputs, config.batch_size)) as futures:
        for future in futures:
            if guided := future.result():
                output, size, guide = guided
                refined = refine_outline(refiner, output.logits[0], torch.from_numpy(guide), size)
                yield output._replace(refined=refined)


def _or_error(score: Callable[[Output], Scored], output: Output) -> tuple[int, Scored | DataError]:
    try:
        return output.pair, score(output)
    except DataError as error:
        return output.pair, error


def _keep_if_worst(
    worst: list[tuple[float, int, Outlined]],
    row: Row,
    pair: int,
    path: str,
    true: NDArray[Any],
    predicted: NDArray[Any],
) -> None:
    """Add an image to the worst so far, for the picture, if it is one of them."""
    if len(worst) < NUM_WORST or row.rank < worst[-1][0]:
        photo = decode_file(path, decode_full_photo)
        worst.append((row.rank, pair, Outlined(photo, true, predicted, f"{row.image}   Dice {row.rank:.4f}")))
        worst.sort(key=lambda kept: kept[:2])
        del worst[NUM_WORST:]


def _summarise(totals: Totals, config: Config, full_size: bool, folder: str) -> dict[str, Any]:
    """What `evaluate` returns."""
    rows = totals.rows
    if not rows:
        raise DataError(f"{folder}: not one of its pairs can be used.")
    scores = _by_name(totals.small.compute(), config) | {"loss": float(np.mean(totals.losses)), "images": len(rows)}
    if full_size:
        full = _by_name(totals.full.compute(), config)
        bands: list[Any] = [row.full_boundary_iou for row in rows]
        if config.classes:
            bands = [None if set(ious) == {None} else mean_of(ious) for ious in zip(*totals.bands, strict=True)]
            full |= _by_name({"class_boundary_iou": bands}, config)
        scores |= {f"full_{name}": value for name, value in full.items()}
        scores["full_boundary_iou"] = float(np.mean([iou for iou in bands if iou is not None]))
        scores["boundary_pixels"] = BOUNDARY_PIXELS
    worst = sorted(rows, key=lambda row: row.rank)[:NUM_WORST]
    return {**scores, "worst": {row.image: row.rank for row in worst}}


def _by_name(scores: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The scores with those of each class by its name."""
    names = [item.name for item in config.classes]
    return {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value for key, value in scores.items()
    }


def _write_results(folder: Path, totals: Totals, summary: dict[str, Any], config: Config) -> None:
    try:
        with (
            atomic_write(folder / "scores.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in totals.rows)
        with atomic_write(folder / "summary.json") as temporary:
            temporary.write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
    except OutputError:
        log.error("scores: %s", json_text(summary))
        raise
    try:
        _draw_pictures(folder, totals, config)
    except OutputError as error:  # the scores are worth more than their pictures
        log.warning("%s", error)


def _draw_pictures(folder: Path, totals: Totals, config: Config) -> None:
    worst = [outlined for *_, outlined in totals.worst]
    if config.classes:
        confusion = (totals.full if worst else totals.small).sums.numpy()
        draw_confusion(confusion, config.classes, folder / "confusion.png")
    if worst and config.classes:
        draw_classes(worst, config.classes, folder / "worst.png", width=3.6)
    elif worst:
        draw_worst(worst, folder / "worst.png")
