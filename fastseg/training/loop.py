"""Train a network: epochs of steps, each epoch validated and saved.

result = fastseg.train({"train_img_dir": "data/train_images", "num_epochs": 5})
result.val_dice, result.run_dir
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from fastseg.config import Config, as_config
from fastseg.errors import FastsegError
from fastseg.network.metrics import score_batches
from fastseg.quality.diagnosis import explain_predictions, foreground_shares, warn_of_uniform_masks
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.distributed import all_reduce, any_rank, process_group
from fastseg.runtime.files import file_version
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.progress import progress_bar
from fastseg.training.augment import AugmentParams, augment, resize, sample_params
from fastseg.training.compile import check_compile, compile_if_it_pays, compile_model, restore_cudnn_benchmark
from fastseg.training.micro_batch import fit_micro_batch, report_training_out_of_memory
from fastseg.training.recipe import (
    learning_rate,
    num_small_steps,
    set_learning_rate,
    training_loss,
    training_size,
    update_ema,
)
from fastseg.training.state import (
    Run,
    build_run,
    check_finite,
    find_splits,
    load_or_init_model,
    resolve_config,
    resume,
    save_epoch,
    save_last,
)
from fastseg.training.summary import FIRST_STEPS, TrainResult, draw_val_overlay, log_epoch, open_run_dir, summarise
from fastseg.training.tensorboard import close_writer, import_writer, open_writer, write_epoch

__all__ = ["train", "train_step"]

LOG_SECONDS = 0.5  # between readings of the loss, each of which waits for the device
AGREE_STEPS = 20  # between the steps at which several ranks agree whether to stop

log = logging.getLogger(__name__)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    *,
    after_epoch: Callable[[dict[str, Any]], bool] | None = None,
) -> TrainResult:
    """Train a network and write the run to `out_dir/name/`.

    Args:
        config: a `Config`, a mapping of its fields, or the path of a JSON file such as `hyperparams.json`.
        after_epoch: called with each epoch's entry of metrics.jsonl; the run ends when it returns true. The epoch's
            checkpoints may not be on disk yet.

    Returns:
        The scores and the run's folder. It holds `config.json`, `metrics.jsonl` (one line per epoch), `summary.json`,
        `curves.png`, `overlay.png`, `best.pt` (weights) and `last.pt` (everything needed to resume).

    Raises:
        ConfigError, DataError, CheckpointError: the configuration, the data or a checkpoint cannot be used. Nothing is
            written before all of them have been checked.
        OutputError: the run's folder cannot be written, which is checked before any data is read; or the disk is full.
        FastsegError: the loss or a weight became infinite or NaN, which no checkpoint contains; the memory is full,
            even with one pair at a time; or another process trains in the run's folder.
    """
    start_time = time.perf_counter()
    config = as_config(config)
    with process_group(config.device), restore_cudnn_benchmark(), report_training_out_of_memory(config):
        runtime = choose_runtime(config)
        check_compile(config, runtime)
        import_writer(config)  # a missing package is reported before anything else happens
        read = file_version(config.run_dir / "last.pt")
        model, state = load_or_init_model(config)
        train_pairs, val_pairs = find_splits(config)
        config = resolve_config(config, len(train_pairs), runtime.world_size)
        log.info("%d training pairs, %d validation pairs; %s", len(train_pairs), len(val_pairs), runtime.description)
        run = build_run(config, runtime, model, train_pairs, val_pairs)
        run.start_time = start_time
        resume(run, state)
        run.first_step = run.steps_done
        compile_model(run)
        run.mask_shares = foreground_shares(train_pairs) if runtime.rank == 0 else []
        if message := warn_of_uniform_masks(run.mask_shares):
            log.warning("%s", message)
        with open_run_dir(run, read):
            run.seconds["start-up"] = time.perf_counter() - start_time
            _train_epochs(run, after_epoch)
            return summarise(run, left_out=[*train_pairs.left_out, *val_pairs.left_out])


def _train_epochs(run: Run, after_epoch: Callable[[dict[str, Any]], bool] | None) -> None:
    """Train until the last epoch is done or the run is interrupted, and wait until its checkpoints are on disk."""
    writer = open_writer(run.config, run.epoch) if run.runtime.rank == 0 else None
    with run.checkpoints:  # which waits for the last checkpoint at its end
        with _stop_on_signal(run), retain_freed_memory(run.runtime.device):
            while not run.interrupted and not _is_finished(run):
                _train_epoch(run)
                if run.interrupted:
                    break
                _validate(run)
                _warn_of_black_masks(run)
                if writer:
                    write_epoch(writer, run.history[-1], draw_val_overlay(run, run.eval_model))
                elif run.runtime.rank == 0 and run.epoch == 1 < run.config.num_epochs:
                    draw_val_overlay(run, run.eval_model)  # shows at once whether masks and photos match
                if after_epoch and any_rank(after_epoch(dict(run.history[-1])), run.runtime.device):
                    log.info("stopped after epoch %d: after_epoch returned true", run.epoch)
                    break
                compile_if_it_pays(run)
        if writer:
            close_writer(writer)
        trained = time.perf_counter()
        if run.interrupted:
            save_last(run)
    run.seconds["checkpoints"] += time.perf_counter() - trained
    if run.interrupted:
        log.info("interrupted in epoch %d after step %d; last.pt is saved", run.epoch + 1, run.step)


def train_step(run: Run, images: Tensor, masks: Tensor) -> None:
    """One step of the optimizer. Nothing here waits for the device.

    Args:
        images: (B, H, W, 3) uint8 on the run's device, this rank's slice of the batch.
        masks: (B, H, W) uint8, coverage 0..255.
    """
    config, step, total = run.config, run.steps_done, run.total_steps
    set_learning_rate(run.optimizer, learning_rate(config, step, total))
    # Drawn for the whole batch, so that several ranks augment as a single process does.
    params = sample_params(config, config.batch_size, run.generator).take(run.runtime.rank_slice)
    loss = fit_micro_batch(run, partial(_accumulate_gradients, run, images, masks, params), len(images))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema_model is not None:
        update_ema(run.ema_model, run.model, config.ema_decay, step)
    run.loss_sum += loss
    run.step += 1


def _accumulate_gradients(run: Run, images: Tensor, masks: Tensor, params: AugmentParams, micro_batch: int) -> Tensor:
    """Add the gradients of the batch's mean loss to the parameters, and return that loss; see `train_step`.

    Args:
        micro_batch: pairs per forward pass.
    """
    size = training_size(run.config, run.steps_done, run.total_steps)
    losses = []
    for start in range(0, len(images), micro_batch):
        part = slice(start, start + micro_batch)
        inputs, targets = augment(images[part], masks[part], params.take(part))
        inputs, targets = resize(inputs, targets, *size)
        with run.runtime.autocast():
            logits = run.forward(inputs)
        loss = training_loss(run.config, logits, targets) * (len(inputs) / len(images))
        run.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def _train_epoch(run: Run) -> None:
    """Take the remaining steps of an epoch, or fewer if a signal interrupts the run."""
    loader, config = run.train_loader, run.config
    run.model.train()
    began, logged, waited, first_step = time.perf_counter(), 0.0, loader.wait_seconds, run.step
    first_steps = run.seconds[FIRST_STEPS]
    with progress_bar() as bar:
        task = bar.add_task(f"epoch {run.epoch + 1}/{config.num_epochs}", total=len(loader), note="")
        for images, masks, _ in loader:
            with _time_first_step(run):
                train_step(run, images, masks)
            now = time.perf_counter()
            if now - logged >= LOG_SECONDS:
                logged = now
                rate = (run.step - first_step) * config.batch_size / (now - began)
                wait = 100 * (loader.wait_seconds - waited) / (now - began)
                loss = run.loss_sum.item() / run.step
                if not math.isfinite(loss):
                    check_finite(run, loss)
                dice = f"  Dice {run.history[-1]['val_dice']:.4f}" if run.history else ""
                note = f"loss {loss:.3f}{dice}  {rate:.0f} pairs/s  data wait {wait:.0f} %"
                bar.update(task, completed=run.step, note=note)
            if run.runtime.world_size == 1 or run.step % AGREE_STEPS == 0:
                run.interrupted = any_rank(run.stop_requested, run.runtime.device)
            if run.interrupted:
                break
    mean_loss = all_reduce(run.loss_sum.clone()).item() / max(run.step * run.runtime.world_size, 1)
    check_finite(run, mean_loss)
    seconds, waited = time.perf_counter() - began, loader.wait_seconds - waited
    run.trained_pairs += (run.step - first_step) * config.batch_size
    run.seconds["waiting for data"] += waited
    run.seconds["steps"] += seconds - waited - (run.seconds[FIRST_STEPS] - first_steps)
    if not run.interrupted:
        run.history.append(
            {
                "epoch": run.epoch + 1,
                "train_loss": mean_loss,
                "learning_rate": run.optimizer.param_groups[0]["lr"],
                "pairs_per_s": (run.step - first_step) * config.batch_size / seconds,
                "data_wait_pct": 100 * waited / seconds,
                "seconds": seconds,
            }
        )


def _validate(run: Run) -> None:
    """Score the epoch, write its line, start writing its checkpoints, and advance to the next."""
    began = time.perf_counter()
    model = run.eval_model.eval()
    try:
        scores = score_batches(model, run.val_loader, run.runtime)
    except FastsegError:  # such as a broken file: the epoch's steps must not be lost
        run.history.pop()
        save_last(run)
        log.info("%s is saved; the same command scores epoch %d again", run.config.run_dir / "last.pt", run.epoch + 1)
        raise
    entry = run.history[-1]
    entry.update({f"val_{name}": value for name, value in scores.items()})
    scored = time.perf_counter()
    run.seconds["validation"] += scored - began
    entry["epoch_seconds"] = entry["seconds"] + scored - began
    entry["elapsed_seconds"] = scored - run.start_time
    log.info(
        "epoch %d/%d: loss %.4f, val loss %.4f, val Dice %.4f, val IoU %.4f, %.0f pairs/s, data wait %.0f %%",
        *(entry["epoch"], run.config.num_epochs, entry["train_loss"], entry["val_loss"]),
        *(entry["val_dice"], entry["val_iou"], entry["pairs_per_s"], entry["data_wait_pct"]),
    )
    run.epoch, run.step = run.epoch + 1, 0
    run.loss_sum.zero_()
    save_epoch(run)
    if run.runtime.rank == 0:  # after the checkpoint, which a full disk must not cost
        log_epoch(run.config.run_dir, entry)
    run.seconds["checkpoints"] += time.perf_counter() - scored


def _warn_of_black_masks(run: Run) -> None:
    """Warn after the first of several epochs whose predictions are no better than guessing."""
    if run.runtime.rank > 0 or run.warned:
        return
    message = explain_predictions(run.history[-1], run.mask_shares, run.config.learning_rate, run.steps_done)
    run.warned = bool(message)
    if message:
        log.warning("%s", message)


def _is_finished(run: Run) -> bool:
    """Whether the last epoch is done; logs the reason if that is earlier than `num_epochs`."""
    config = run.config
    if run.epoch >= config.num_epochs:
        return True
    # While steps see small images, the score at full size rises and falls: patience begins after them.
    small_epochs = math.ceil(num_small_steps(config, run.total_steps) / len(run.train_loader))
    since_best = run.epoch - max(run.best["epoch"], small_epochs)
    if config.early_stopping and run.history and since_best >= config.early_stopping:
        log.info("early stopping: %d epochs without a better Dice", since_best)
        return True
    if config.time_limit_s and run.history:
        elapsed, epoch = time.perf_counter() - run.start_time, run.history[-1]["epoch_seconds"]
        if any_rank(elapsed + epoch > config.time_limit_s, run.runtime.device):
            log.info("time limit: %.0f s elapsed, and an epoch takes %.0f s", elapsed, epoch)
            return True
    return False


@contextmanager
def _time_first_step(run: Run) -> Iterator[None]:
    """Time the first step at each image size separately: it compiles and chooses kernels."""
    size = training_size(run.config, run.steps_done, run.total_steps)
    if size in run.warm_sizes:
        yield
        return
    began = time.perf_counter()
    yield
    run.loss_sum.item()  # waits for the device
    run.warm_sizes.add(size)
    run.seconds[FIRST_STEPS] += time.perf_counter() - began


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the current step; a second signal ends it at once."""

    def request_stop(number: int, frame: object) -> None:
        run.stop_requested = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            previous[number] = signal.signal(number, request_stop)
    except ValueError:  # not the main thread: the main program handles signals
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
