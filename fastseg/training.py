"""train(config): from folders of images and masks to a trained network, its scores and its pictures.

    result = fastseg.train({"train_img_dir": "data/train_images", "num_epochs": 5})
    result.val_dice, result.run_dir

The file reads in the order things happen: find the data, epochs of steps, validation, report.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastseg.augment import augment, sample_params
from fastseg.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastseg.config import DEFAULT_VAL_DIRS, Config, as_config
from fastseg.data.check import check_pairs
from fastseg.data.pairs import Pairs, find_pairs, split_by_group
from fastseg.errors import FastsegError
from fastseg.metrics import score_batches
from fastseg.progress import progress_bar
from fastseg.recipe import learning_rate, training_loss
from fastseg.report import draw_curves, draw_overlay, versions
from fastseg.run import Run, build_run, open_run_dir, resume, save_last
from fastseg.runtime import choose_runtime

__all__ = ["TrainResult", "find_data", "train"]

LOG_SECONDS = 0.5  # between looks at the loss: each makes the host wait for the device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run reached. Scores are of the best epoch, on validation masks at the training size.

    A run that was interrupted before its first epoch ended has `best_epoch` 0 and scores of nan.
    """

    run_dir: Path
    val_dice: float  # mean over images
    val_iou: float
    best_epoch: int  # counted from 1
    pairs_per_s: float  # training only, decoding included
    seconds: float  # of this call
    interrupted: bool  # by Ctrl-C or SIGTERM; the same call goes on where it stopped
    history: list[dict[str, Any]]  # one entry an epoch, as in metrics.jsonl


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> TrainResult:
    """Train a network; writes `out_dir/name/`.

    Args:
        config: a `Config`, a mapping of its fields, or the path of a JSON file such as `hyperparams.json`.

    Returns:
        The scores and where the files are: `config.json`, `metrics.jsonl` (one line an epoch), `summary.json`,
        `curves.png`, `overlay.png`, `best.pt` (weights) and `last.pt` (all that is needed to go on).

    Raises:
        ConfigError, DataError, CheckpointError: one sentence that names the field or file and the remedy. Nothing
            is written before the configuration and the data have been checked.
    """
    started = time.perf_counter()
    config = as_config(config)
    runtime = choose_runtime(config)
    train_pairs, val_pairs = find_data(config)
    config = _fit_to_data(config, len(train_pairs))
    log.info("%d training pairs, %d validation pairs; %s", len(train_pairs), len(val_pairs), runtime.describe)
    run = build_run(config, runtime, train_pairs, val_pairs)
    resume(run)
    open_run_dir(run)
    log.info("ready after %.1f s", time.perf_counter() - started)

    with _stop_on_signal(run):
        while run.epoch < config.num_epochs and not run.stop:
            _train_epoch(run)
            if not run.stop:
                _validate(run)
    if run.stop:
        save_last(run)
        log.info("stopped in epoch %d after step %d; last.pt is saved", run.epoch + 1, run.step)
    return _finish(run, left_out=[*train_pairs.left_out, *val_pairs.left_out], started=started)


def find_data(config: Config) -> tuple[Pairs, Pairs]:
    """Training and validation pairs as configured, with their files checked.

    Validation has folders of its own; only where the default ones do not exist, or val_img_dir is empty, whole cars
    are held out of the training folders.

    Raises:
        DataError: see `find_pairs` and `check_pairs`.
    """
    pairs = find_pairs(config.train_img_dir, config.train_mask_dir, bad_samples=config.bad_samples)
    val_dirs = (config.val_img_dir, config.val_mask_dir)
    missing = val_dirs == DEFAULT_VAL_DIRS and not any(map(_holds_files, val_dirs))
    if missing or not config.val_img_dir:
        train_pairs, val_pairs = split_by_group(pairs, config.val_fraction, config.seed)
        log.info("no validation folders: %d pairs held out, whole cars at a time", len(val_pairs))
    else:
        train_pairs, val_pairs = pairs, find_pairs(*val_dirs, bad_samples=config.bad_samples)
    if config.check_data:
        train_pairs = check_pairs(train_pairs, bad_samples=config.bad_samples, num_workers=config.num_workers)
        val_pairs = check_pairs(val_pairs, bad_samples=config.bad_samples, num_workers=config.num_workers)
    return train_pairs, val_pairs


def _holds_files(folder: str) -> bool:
    return os.path.isdir(folder) and any(os.scandir(folder))


def _fit_to_data(config: Config, pairs: int) -> Config:
    """Make batch size and number of epochs definite; both are said when they change."""
    if config.batch_size > pairs:
        log.info("batch_size: %d, because there are no more training pairs than that", pairs)
        config = config.replace(batch_size=pairs)
    if "num_epochs" not in config.model_fields_set:
        epochs = max(config.num_epochs, math.ceil(config.min_steps / (pairs // config.batch_size)))
        if epochs > config.num_epochs:
            log.info("num_epochs: %d, to take the %d steps of min_steps", epochs, config.min_steps)
        config = config.replace(num_epochs=epochs)
    return config


def _train_epoch(run: Run) -> None:
    """The steps that are left of an epoch, fewer if a signal asks to stop."""
    loader, config = run.train_loader, run.config
    run.model.train()
    began, logged, waited = time.perf_counter(), 0.0, loader.wait_seconds
    first_step = run.step
    with progress_bar() as bar:
        title = f"epoch {run.epoch + 1}/{config.num_epochs}"
        task = bar.add_task(title, total=len(loader), completed=run.step, note="")
        for images, masks, _ in loader:
            _step(run, images, masks)
            now = time.perf_counter()
            if now - logged >= LOG_SECONDS:
                logged = now
                loss, seconds = run.loss_sum.item() / run.step, now - began
                rate = (run.step - first_step) * config.batch_size / seconds
                wait = 100 * (loader.wait_seconds - waited) / seconds
                note = f"loss {loss:.3f}  {rate:.0f} pairs/s  waits {wait:.0f} %"
                bar.update(task, completed=run.step, note=note)
            if run.stop:
                break
    mean_loss = run.loss_sum.item() / max(run.step, 1)
    if not math.isfinite(mean_loss):
        raise FastsegError(
            f"the loss became {mean_loss} in epoch {run.epoch + 1}. Lower learning_rate ({config.learning_rate:g}) or "
            "use precision=fp32; the checkpoint of the epoch before is intact."
        )
    seconds = time.perf_counter() - began
    run.trained_pairs += (run.step - first_step) * config.batch_size
    run.train_seconds += seconds
    if run.stop:
        return
    run.history.append(
        {
            "epoch": run.epoch + 1,
            "train_loss": mean_loss,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "pairs_per_s": (run.step - first_step) * config.batch_size / seconds,
            "data_wait_pct": 100 * (loader.wait_seconds - waited) / seconds,
            "seconds": seconds,
        }
    )


def _step(run: Run, images: Tensor, masks: Tensor) -> None:
    """One step of the optimizer; nothing here waits for the device."""
    rate = learning_rate(run.config, run.steps_done, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    inputs, targets = augment(images, masks, sample_params(run.config, len(images), run.generator))
    with run.runtime.autocast():
        logits = run.forward(inputs)
    loss = training_loss(run.config, logits, targets)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss_sum += loss.detach()
    run.step += 1


def _validate(run: Run) -> None:
    """Score the epoch, write its line and its checkpoints, move on to the next."""
    run.model.eval()
    scores = score_batches(run.model, run.val_loader, run.runtime)
    entry = run.history[-1]
    entry.update({f"val_{name}": value for name, value in scores.items()})
    with open(run.config.run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    log.info(
        "epoch %d/%d: loss %.4f, val loss %.4f, val Dice %.4f, val IoU %.4f, %.0f pairs/s, data wait %.0f %%",
        *(entry["epoch"], run.config.num_epochs, entry["train_loss"], entry["val_loss"]),
        *(entry["val_dice"], entry["val_iou"], entry["pairs_per_s"], entry["data_wait_pct"]),
    )
    if run.best is entry:
        weights = {"config": run.config.model_dump(), "model": run.model.state_dict(), "scores": entry}
        save_checkpoint(run.config.run_dir / "best.pt", weights)
    run.epoch, run.step = run.epoch + 1, 0
    run.loss_sum.zero_()
    save_last(run)


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once."""

    def ask_to_stop(number: int, frame: object) -> None:
        run.stop = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, ask_to_stop)
    except ValueError:  # not the main thread: whoever owns it decides about signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(run: Run, left_out: list[str], started: float) -> TrainResult:
    """Draw the pictures and write the summary, from the best epoch's weights."""
    folder, best = run.config.run_dir, run.best
    if run.history:
        load_weights(run.model, load_checkpoint(folder / "best.pt"), folder / "best.pt", run.config)
        draw_curves(run.history, folder / "curves.png")
        draw_overlay(run.model.eval(), run.val_loader.pairs, run.config, run.runtime, folder / "overlay.png")
    for loader in (run.train_loader, run.val_loader):
        left_out += [loader.pairs.images[index] for index in loader.bad.found]
    result = TrainResult(
        run_dir=folder,
        val_dice=best["val_dice"],
        val_iou=best["val_iou"],
        best_epoch=best["epoch"],
        pairs_per_s=run.trained_pairs / run.train_seconds if run.train_seconds else run.history[-1]["pairs_per_s"],
        seconds=time.perf_counter() - started,
        interrupted=run.stop,
        history=run.history,
    )
    summary = {
        **{name: value for name, value in asdict(result).items() if name not in ("history", "run_dir")},
        "val_dice_pixels": best["val_dice_pixels"],
        "val_iou_pixels": best["val_iou_pixels"],
        "epochs": run.epoch,
        "scored": f"{run.config.image_width}x{run.config.image_height}, mask cells at least half covered",
        "device": run.runtime.describe,
        "train_pairs": len(run.train_loader.pairs),
        "val_pairs": len(run.val_loader.pairs),
        "bad_samples": {"count": len(left_out), "images": left_out[:100]},
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return result
