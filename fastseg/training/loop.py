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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastseg.config import Config, as_config
from fastseg.errors import FastsegError
from fastseg.network.checkpoint import save_checkpoint
from fastseg.network.metrics import score_batches
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.distributed import all_reduce, any_rank, process_group
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.progress import progress_bar
from fastseg.training.augment import augment, sample_params, shrink
from fastseg.training.compile import check_compile, restore_cudnn_benchmark
from fastseg.training.recipe import learning_rate, num_small_steps, training_loss, training_size, update_ema
from fastseg.training.state import (
    Run,
    build_run,
    compile_model,
    create_run_dir,
    find_data,
    load_or_init_model,
    resolve_config,
    resume,
    save_last,
)
from fastseg.training.summary import FIRST_STEPS, TrainResult, draw_run_overlay, finish
from fastseg.training.tensorboard import import_writer, open_writer, write_epoch

__all__ = ["train"]

LOG_SECONDS = 0.5  # between looks at the loss: each makes the host wait for the device
AGREE_STEPS = 20  # between the steps at which several processes agree whether to stop

log = logging.getLogger(__name__)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    *,
    after_epoch: Callable[[dict[str, Any]], bool] | None = None,
) -> TrainResult:
    """Train a network; writes `out_dir/name/`.

    Args:
        config: a `Config`, a mapping of its fields, or the path of a JSON file such as `hyperparams.json`.
        after_epoch: called with each epoch's entry, as in metrics.jsonl; the run ends there where it returns true.

    Returns:
        The scores and where the files are: `config.json`, `metrics.jsonl` (one line an epoch), `summary.json`,
        `curves.png`, `overlay.png`, `best.pt` (weights) and `last.pt` (all that is needed to go on).

    Raises:
        ConfigError, DataError, CheckpointError: one sentence that names the field or file and the remedy. Nothing
            is written before the configuration and the data have been checked.
    """
    started = time.perf_counter()
    config = as_config(config)
    with process_group(config.device), restore_cudnn_benchmark():
        runtime = choose_runtime(config)
        check_compile(config, runtime)
        import_writer(config)  # what is missing is said before anything else is done
        model, state = load_or_init_model(config)
        train_pairs, val_pairs = find_data(config)
        config = resolve_config(config, len(train_pairs))
        log.info("%d training pairs, %d validation pairs; %s", len(train_pairs), len(val_pairs), runtime.description)
        run = build_run(config, runtime, model, train_pairs, val_pairs)
        run.started = started
        resume(run, state)
        compile_model(run)
        create_run_dir(run)
        board = open_writer(config, run.epoch) if runtime.rank == 0 else None
        run.clock["start-up"] = time.perf_counter() - started
        with _stop_on_signal(run), retain_freed_memory(runtime.device):
            while not run.stop and not _is_finished(run):
                _train_epoch(run)
                if not run.stop:
                    _validate(run)
                    if board:
                        write_epoch(board, run.history[-1], draw_run_overlay(run, run.eval_model))
                    if after_epoch and any_rank(after_epoch(dict(run.history[-1])), runtime.device):
                        log.info("ended after epoch %d, as asked", run.epoch)
                        break
        if board:
            board.close()
        if run.stop:
            save_last(run)
            log.info("stopped in epoch %d after step %d; last.pt is saved", run.epoch + 1, run.step)
        return finish(run, left_out=[*train_pairs.left_out, *val_pairs.left_out])


def _is_finished(run: Run) -> bool:
    """Whether no further epoch is to begin; says why where it is not the last one."""
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
        elapsed, epoch = time.perf_counter() - run.started, run.history[-1]["epoch_seconds"]
        if any_rank(elapsed + epoch > config.time_limit_s, run.runtime.device):
            log.info("time limit: %.0f s have gone, an epoch takes %.0f s", elapsed, epoch)
            return True
    return False


def _train_epoch(run: Run) -> None:
    """The steps that are left of an epoch, fewer if a signal asks to stop."""
    loader, config = run.train_loader, run.config
    run.model.train()
    began, logged, waited, first_step = time.perf_counter(), 0.0, loader.wait_seconds, run.step
    preparing = run.clock[FIRST_STEPS]
    with progress_bar() as bar:
        task = bar.add_task(f"epoch {run.epoch + 1}/{config.num_epochs}", total=len(loader), note="")
        for images, masks, _ in loader:
            _step_timed(run, images, masks)
            now = time.perf_counter()
            if now - logged >= LOG_SECONDS:
                logged = now
                rate = (run.step - first_step) * config.batch_size / (now - began)
                wait = 100 * (loader.wait_seconds - waited) / (now - began)
                loss = run.loss_sum.item() / run.step
                dice = f"  Dice {run.history[-1]['val_dice']:.4f}" if run.history else ""
                bar.update(
                    task, completed=run.step, note=f"loss {loss:.3f}{dice}  {rate:.0f} pairs/s  waits {wait:.0f} %"
                )
            if run.runtime.world_size == 1 or run.step % AGREE_STEPS == 0:
                run.stop = any_rank(run.signalled, run.runtime.device)
            if run.stop:
                break
    mean_loss = all_reduce(run.loss_sum.clone()).item() / max(run.step * run.runtime.world_size, 1)
    if not math.isfinite(mean_loss):
        raise FastsegError(
            f"the loss became {mean_loss} in epoch {run.epoch + 1}. Lower learning_rate ({config.learning_rate:g}) or "
            "use precision=fp32; the checkpoint of the epoch before is intact."
        )
    seconds, waited = time.perf_counter() - began, loader.wait_seconds - waited
    run.trained_pairs += (run.step - first_step) * config.batch_size
    run.clock["waiting for data"] += waited
    run.clock["steps"] += seconds - waited - (run.clock[FIRST_STEPS] - preparing)
    if run.stop:
        return
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


def _step_timed(run: Run, images: Tensor, masks: Tensor) -> None:
    """A step; the first one of each size, which compiles and chooses kernels, counts on its own."""
    size = training_size(run.config, run.steps_done, run.total_steps)
    if size in run.sizes_seen:
        _step(run, images, masks)
        return
    run.sizes_seen.add(size)
    began = time.perf_counter()
    _step(run, images, masks)
    run.loss_sum.item()  # waits for the device
    run.clock[FIRST_STEPS] += time.perf_counter() - began


def _step(run: Run, images: Tensor, masks: Tensor) -> None:
    """One step of the optimizer; nothing here waits for the device."""
    rate = learning_rate(run.config, run.steps_done, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    # Drawn for the whole batch, so that a process's slice is augmented as one process alone would do it.
    params = sample_params(run.config, run.config.batch_size, run.generator)
    mine = slice(run.runtime.rank, None, run.runtime.world_size)
    inputs, targets = augment(images, masks, params.take(mine))
    inputs, targets = shrink(inputs, targets, *training_size(run.config, run.steps_done, run.total_steps))
    with run.runtime.autocast():
        logits = run.forward(inputs)
    loss = training_loss(run.config, logits, targets)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema_model:
        update_ema(run.ema_model, run.model, run.config.ema_decay, run.steps_done)
    run.loss_sum += loss.detach()
    run.step += 1


def _validate(run: Run) -> None:
    """Score the epoch, write its line and its checkpoints, move on to the next."""
    began = time.perf_counter()
    model = run.eval_model.eval()
    scores = score_batches(model, run.val_loader, run.runtime)
    entry = run.history[-1]
    entry.update({f"val_{name}": value for name, value in scores.items()})
    scored = time.perf_counter()
    run.clock["validation"] += scored - began
    entry["epoch_seconds"] = entry["seconds"] + scored - began
    entry["elapsed_seconds"] = scored - run.started
    log.info(
        "epoch %d/%d: loss %.4f, val loss %.4f, val Dice %.4f, val IoU %.4f, %.0f pairs/s, data wait %.0f %%",
        *(entry["epoch"], run.config.num_epochs, entry["train_loss"], entry["val_loss"]),
        *(entry["val_dice"], entry["val_iou"], entry["pairs_per_s"], entry["data_wait_pct"]),
    )
    run.epoch, run.step = run.epoch + 1, 0
    run.loss_sum.zero_()
    if run.runtime.rank == 0:
        with open(run.config.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if run.best is entry:
            weights = {"config": run.config.model_dump(), "model": model.state_dict(), "scores": entry}
            save_checkpoint(run.config.run_dir / "best.pt", weights)
        save_last(run)
    run.clock["checkpoints"] += time.perf_counter() - scored


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""

    def ask_to_stop(number: int, frame: object) -> None:
        run.signalled = True
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
