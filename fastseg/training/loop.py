"""Train a network: epochs of steps, each epoch validated and saved.

result = fastseg.train({"train_img_dir": "data/train_images", "num_epochs": 5})
result.val_dice, result.run_dir
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastseg.config import Config, as_config
from fastseg.messages import count_of
from fastseg.network.architecture import check_encoder, name_network, resolve_sizes
from fastseg.network.losses import check_loss
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.distributed import all_reduce, any_rank, barrier, process_group
from fastseg.runtime.files import file_version
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.signals import stop_on_signal
from fastseg.runtime.threads import core_use, warn_about_contention
from fastseg.training.budget import leave_out_step, plan_steps, start_clock
from fastseg.training.interval import stop_or_save
from fastseg.training.outline.fit import fit_refiner
from fastseg.training.outline.plan import reserve_refiner_seconds
from fastseg.training.recipe import (
    choose_optimizer,
    drop_frozen_gradients,
    learning_rate,
    make_class_weights,
    set_learning_rate,
    training_loss,
    update_ema,
)
from fastseg.training.setup import (
    build_run,
    choose_batch_size,
    choose_seed,
    find_splits,
    load_or_init_model,
    resolve_config,
)
from fastseg.training.state import Run, check_finite, resume, save_last_and_wait
from fastseg.training.step.augment import resize
from fastseg.training.step.compile import check_compile, compile_if_it_pays, compile_model, restore_cudnn_benchmark
from fastseg.training.step.micro_batch import fit_micro_batch, report_training_out_of_memory
from fastseg.training.step.pipeline import (
    Augmentation,
    Loss,
    augment_batch,
    network_rng,
    prepare_augmentation,
    prepare_loss,
)
from fastseg.training.summary import FIRST_STEPS, TrainResult, draw_val_overlay, open_run_dir, summarise
from fastseg.training.trackers.tracker import TrackerGroup, check_trackers, open_trackers
from fastseg.training.validate import validate, warn_of_black_masks, warn_of_training_masks

__all__ = ["train", "train_step"]

LOG_SECONDS = 0.5  # between readings of the loss, each of which waits for the device

log = logging.getLogger(__name__)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    augmentation: Augmentation | None = None,
    loss: Loss | None = None,
    after_epoch: Callable[[dict[str, Any]], bool] | None = None,
    start_time: float | None = None,
) -> TrainResult:
    """Train a network and write the run to `out_dir/name/`.

    Args:
        config: a `Config`, a mapping of its fields, or the path of a JSON file such as `hyperparams.json`.
        network: your own, from normalised images (B, 3, H, W) to logits (B, 1, H, W) or smaller by a whole factor;
            it is copied. By default `config.network` names the network.
        augmentation: your own in place of fastseg's, such as a `kornia.augmentation.AugmentationSequential` with
            `data_keys=["input", "mask"]`: from images (B, 3, H, W) and masks (B, 1, H, W), both float32 in [0, 1] on
            the training device, to the same. A run that resumes needs it again.
        loss: your own in place of the recipe's: from logits and targets in [0, 1], both (B, 1, H, W) float32, to a
            scalar. Validation reports BCE + Dice all the same.
        after_epoch: called with each epoch's entry of metrics.jsonl; the run ends when it returns true. The epoch's
            checkpoints may not be on disk yet.
        start_time: `time.perf_counter()` at which the run and its `time_budget` began; by default now. For the command
            that is before the import of torch.

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
    start_time = time.perf_counter() if start_time is None else start_time
    config = as_config(config, **name_network(network))
    with process_group(config.device), restore_cudnn_benchmark(), report_training_out_of_memory(config):
        runtime = choose_runtime(config)
        check_compile(config, runtime)
        check_trackers(config)  # a missing package is reported before anything else happens
        check_loss(config)
        augmentation = prepare_augmentation(augmentation, config, runtime)
        loss = prepare_loss(loss, config, runtime)
        read = file_version(config.run_dir / "last.pt")
        model, state = load_or_init_model(config, network)
        check_encoder(config, model)
        with runtime.autocast():
            config = resolve_sizes(config, runtime.to_device(model))
        config = config.replace(batch_size=choose_batch_size(config, runtime, state), seed=choose_seed(config, state))
        train_pairs, val_pairs = find_splits(config)
        config = resolve_config(config, len(train_pairs), runtime.world_size)
        config = config.replace(optimizer=choose_optimizer(config, state))
        counts = count_of(len(train_pairs), "training pair"), count_of(len(val_pairs), "validation pair")
        log.info("%s, %s; %s", *counts, runtime.description)
        run = build_run(config, runtime, model, train_pairs, val_pairs)
        run.augmentation, run.loss, run.start_time = augmentation, loss, start_time
        resume(run, state)
        run.first_step = run.steps_done
        compile_model(run)
        run.class_weights = make_class_weights(config, run.train_loader, runtime)
        reserve_refiner_seconds(run)
        warn_of_training_masks(run)
        active = runtime.rank == 0 and not run.is_finished
        trackers = open_trackers(config, run.epoch, resumes=run.first_step > 0, active=active)
        with open_run_dir(run, read), trackers as opened:
            run.seconds["start-up"] = time.perf_counter() - start_time
            start_clock(run)
            with stop_on_signal(partial(setattr, run, "stop_requested", True)):
                _train_epochs(run, opened, after_epoch)
                if not run.interrupted:
                    fit_refiner(run)
                    barrier()  # best.pt is complete when any rank returns
            return summarise(run, left_out=[*train_pairs.left_out, *val_pairs.left_out])


def _train_epochs(run: Run, trackers: TrackerGroup, after_epoch: Callable[[dict[str, Any]], bool] | None) -> None:
    """Train until the last epoch is done or the run is interrupted, and wait until its checkpoints are on disk."""
    with run.checkpoints, retain_freed_memory(run.runtime.device):  # the former waits for the last checkpoint
        while not run.interrupted and not _is_finished(run):
            _train_epoch(run)
            if run.interrupted:
                break
            validate(run)
            warn_of_black_masks(run)
            is_first = run.epoch == 1 and not run.is_finished  # shows at once whether masks and photos match
            if run.runtime.rank == 0 and (trackers or is_first):
                began = time.perf_counter()
                overlay = draw_val_overlay(run, run.eval_model)
                trackers.log_epoch(run.history[-1], overlay)
                run.seconds["pictures"] += time.perf_counter() - began
            if after_epoch and any_rank(after_epoch(dict(run.history[-1])), run.runtime.device):
                log.info("stopped after epoch %d: after_epoch returned true", run.epoch)
                break
            compile_if_it_pays(run)
        trained = time.perf_counter()
        if run.interrupted:
            save_last_and_wait(run)
    run.seconds["checkpoints"] += time.perf_counter() - trained
    if run.interrupted:
        log.info("interrupted in epoch %d after step %d; last.pt is saved", run.epoch + 1, run.step)


def train_step(run: Run, images: Tensor, masks: Tensor) -> None:
    """One step of the optimizer. Nothing here waits for the device, but the gradient scaler of fp16 with Muon.

    Args:
        images: (B, H, W, 3) uint8 on the run's device, this rank's slice of the batch.
        masks: (B, H, W) uint8, coverage 0..255, or the numbers of classes.
    """
    config, step = run.config, run.steps_done
    set_learning_rate(run.optimizer, learning_rate(config, *run.position_at(step)))
    augmented = augment_batch(run.augmentation, images, masks, config, run.runtime, run.generator, step)
    loss = fit_micro_batch(run, partial(_accumulate_gradients, run, augmented, len(images)), len(images))
    drop_frozen_gradients(config, run.model, step)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema_model is not None:
        update_ema(run.ema_model, run.model, config.ema_decay, step)
    run.loss_sum += loss
    run.step += 1


def _accumulate_gradients(
    run: Run, augmented: Callable[[slice], tuple[Tensor, Tensor]], num_pairs: int, micro_batch: int
) -> Tensor:
    """Add the gradients of the batch's mean loss to the parameters, and return that loss; see `train_step`.

    Args:
        augmented: the inputs and targets of a slice of the batch.
        micro_batch: pairs per forward pass.
    """
    size = run.size_of(run.steps_done)
    losses = []
    with network_rng(run.config, run.runtime, run.steps_done):
        for start in range(0, num_pairs, micro_batch):
            inputs, targets = resize(*augmented(slice(start, start + micro_batch)), *size)
            with run.runtime.autocast():
                logits = run.forward(inputs)
            if run.loss is None:
                loss = training_loss(run.config, logits, targets, run.class_weights)
            else:
                loss = run.loss(logits.float(), targets)
            loss = loss * (len(inputs) / num_pairs)
            run.scaler.scale(loss).backward()
            losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def _train_epoch(run: Run) -> None:
    """Take the remaining steps of an epoch, or fewer if a signal interrupts the run."""
    loader, config = run.train_loader, run.config
    run.model.train()
    began, logged, waited, first_step = time.perf_counter(), 0.0, loader.wait_seconds, run.step
    apart, cores = run.seconds[FIRST_STEPS] + run.seconds["checkpoints"], core_use()
    with progress_bar() as bar:
        task = bar.add_task(run.title, total=len(loader), note="")
        for images, masks, _ in loader:
            plan_steps(run)
            if run.budget and run.is_finished and run.step:
                break
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
                if not run.contention_checked and run.runtime.device.type == "cpu":
                    run.contention_checked = warn_about_contention(cores)
                note = f"loss {loss:.3f}{dice}  {rate:.0f} pairs/s  data wait {wait:.0f} %"
                bar.update(task, completed=run.step, note=note)
            stop_or_save(run)
            if run.interrupted or (run.budget and run.is_finished):
                break
    mean_loss = all_reduce(run.loss_sum.clone()).item() / max(run.step * run.runtime.world_size, 1)
    check_finite(run, mean_loss)
    seconds, waited = time.perf_counter() - began, loader.wait_seconds - waited
    run.trained_pairs += (run.step - first_step) * config.batch_size
    run.seconds["waiting for data"] += waited
    run.seconds["steps"] += seconds - waited - (run.seconds[FIRST_STEPS] + run.seconds["checkpoints"] - apart)
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


def _is_finished(run: Run) -> bool:
    """Whether the last epoch is done; logs the reason if that is earlier than planned."""
    config = run.config
    plan_steps(run)
    full = not run.history or run.history[-1]["val_size"] == config.image_height
    if run.is_finished and (full or not run.budget):  # a last step on large images, and the score there
        return True
    # Scores on small images are lower: they do not count, also where a longer run returns to them.
    since_best = sum(entry["val_size"] == config.image_height for entry in run.history[run.best["epoch"] :])
    if config.early_stopping and since_best >= config.early_stopping:
        log.info("early stopping: %s without a better Dice", count_of(since_best, "epoch"))
        return True
    return False


@contextmanager
def _time_first_step(run: Run) -> Iterator[None]:
    """Time the first step at each image size separately: it compiles and chooses kernels."""
    size = run.size_of(run.steps_done)
    if size in run.warm_sizes:
        yield
        return
    began = time.perf_counter()
    yield
    run.loss_sum.item()  # waits for the device
    run.warm_sizes.add(size)
    seconds = time.perf_counter() - began
    run.seconds[FIRST_STEPS] += seconds
    if run.budget and run.compiled == "on":
        leave_out_step(run.budget, seconds)
