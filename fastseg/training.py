"""train(config): from folders of images and masks to a trained network, its scores and its pictures.

    result = fastseg.train({"train_img_dir": "data/train_images", "num_epochs": 5})
    result.val_dice, result.run_dir

The file reads in the order things happen: find the data, build, resume, epochs of steps, save, report.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.augment import augment, sample_params
from fastseg.checkpoint import build_model, load_checkpoint, load_weights, save_checkpoint
from fastseg.config import DEFAULT_VAL_DIRS, Config, as_config
from fastseg.data.check import check_pairs
from fastseg.data.loader import Loader
from fastseg.data.pairs import Pairs, find_pairs, split_by_group
from fastseg.errors import ConfigError, FastsegError
from fastseg.losses import bce_dice_loss, bce_loss
from fastseg.metrics import score_batches
from fastseg.progress import progress_bar
from fastseg.report import draw_curves, draw_overlay, versions
from fastseg.runtime import Runtime, choose_compile, choose_runtime

__all__ = ["TrainResult", "find_data", "train"]

PEAK = 30  # peak of the one-cycle schedule over `learning_rate`, where it starts
WARM_UP = 0.25  # share of the steps in which the learning rate rises
LOG_SECONDS = 0.5  # between looks at the loss: each makes the host wait for the device

NOTHING_YET = {"epoch": 0, **dict.fromkeys(("val_dice", "val_iou", "val_dice_pixels", "val_iou_pixels"), math.nan)}

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


@dataclass
class _Run:
    """Everything that changes from step to step, and what a checkpoint keeps of it."""

    config: Config
    runtime: Runtime
    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, compiled or not
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of the augmentation
    train_loader: Loader
    val_loader: Loader
    loss_sum: Tensor  # over the steps of this epoch, on the device
    epoch: int = 0
    step: int = 0  # within the epoch
    history: list[dict[str, Any]] = field(default_factory=list)
    stop: bool = False  # asked to by a signal
    trained_pairs: int = 0
    train_seconds: float = 0.0

    @property
    def total_steps(self) -> int:
        return self.config.num_epochs * len(self.train_loader)

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the epoch with the highest Dice."""
        return max(self.history, key=lambda entry: entry["val_dice"], default=NOTHING_YET)


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
    run = _build(config, runtime, train_pairs, val_pairs)
    resumed = _resume(run)
    _open_run_dir(run, resumed)
    log.info("ready after %.1f s", time.perf_counter() - started)

    with _stop_on_signal(run):
        while run.epoch < config.num_epochs and not run.stop:
            _train_epoch(run)
            if run.stop:
                break
            _validate(run)
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


def _build(config: Config, runtime: Runtime, train_pairs: Pairs, val_pairs: Pairs) -> _Run:
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to change
        torch.manual_seed(config.seed)
        model = build_model(config)
    if config.checkpoint:
        load_weights(model, load_checkpoint(config.checkpoint), config.checkpoint, config)
        log.info("weights from %s", config.checkpoint)
    model = model.to(runtime.device, memory_format=torch.channels_last)

    def loader(pairs: Pairs, training: bool) -> Loader:
        return Loader(
            pairs,
            height=config.image_height,
            width=config.image_width,
            batch_size=config.batch_size,
            shuffle=training,
            drop_last=training,
            seed=config.seed,
            device=runtime.device,
            decoder=config.decoder,
            num_workers=config.num_workers,
            mask_resize=config.mask_resize,
            cache=config.cache,
            cache_dir=config.cache_dir,
            bad_samples=config.bad_samples,
            pin_memory=config.pin_memory,
        )

    train_loader = loader(train_pairs, training=True)
    compiled = choose_compile(config, runtime.device, config.num_epochs * len(train_loader))
    return _Run(
        config=config,
        runtime=runtime,
        model=model,
        forward=torch.compile(model) if compiled else model,
        optimizer=_optimizer(config, model, fused=True),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16),
        generator=torch.Generator().manual_seed(config.seed),
        train_loader=train_loader,
        val_loader=loader(val_pairs, training=False),
        loss_sum=torch.zeros((), device=runtime.device),
    )


def _optimizer(config: Config, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    if config.recipe == "tutorial":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases and batch norms are not decayed
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Learning rate of a step: constant for the tutorial's recipe, else one cycle.

    Source: Smith and Topin 2018, Super-Convergence (arXiv:1708.07120), with cosine arcs.
    """
    if config.recipe == "tutorial":
        return config.learning_rate
    peak, warm_up = PEAK * config.learning_rate, WARM_UP * total_steps
    if step < warm_up:
        rise = (1 - math.cos(math.pi * step / warm_up)) / 2
        return config.learning_rate + (peak - config.learning_rate) * rise
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up))) / 2


def _train_epoch(run: _Run) -> None:
    """The steps that are left of an epoch."""
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
        _save_last(run)
        log.info("stopped in epoch %d at step %d of %d; last.pt is saved", run.epoch + 1, run.step, len(loader))
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


def _step(run: _Run, images: Tensor, masks: Tensor) -> None:
    """One step of the optimizer; nothing here waits for the device."""
    config = run.config
    rate = learning_rate(config, run.epoch * len(run.train_loader) + run.step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    inputs, targets = augment(images, masks, sample_params(config, len(images), run.generator))
    with run.runtime.autocast():
        logits = run.forward(inputs)
    loss = bce_loss(logits, targets) if config.recipe == "tutorial" else bce_dice_loss(logits, targets)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss_sum += loss.detach()
    run.step += 1


def _validate(run: _Run) -> None:
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
    _save_last(run)


def _save_last(run: _Run) -> None:
    state = {
        "config": run.config.model_dump(),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "generator": run.generator.get_state(),
        "loader": run.train_loader.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "loss_sum": run.loss_sum,
        "history": run.history,
    }
    save_checkpoint(run.config.run_dir / "last.pt", state)


def _resume(run: _Run) -> bool:
    """Go on from the run's last checkpoint where there is one and it is wanted; says which it did."""
    path = run.config.run_dir / "last.pt"
    if not run.config.load_model or not path.exists():
        log.info("a new run: %s", "no checkpoint to go on from" if run.config.load_model else "load_model is false")
        return False
    state = load_checkpoint(path)
    load_weights(run.model, state, path, run.config)
    try:
        run.train_loader.load_state_dict(state["loader"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.generator.set_state(state["generator"])
        run.loss_sum.copy_(state["loss_sum"])
        run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: belongs to a run of another kind ({error}). Give another name, or pass load_model=false."
        ) from None
    if run.epoch >= run.config.num_epochs:
        log.info("%s: all %d epochs are done; more need a higher num_epochs", path, run.epoch)
    else:
        log.info("going on from %s at epoch %d, step %d", path, run.epoch + 1, run.step)
    return True


def _open_run_dir(run: _Run, resumed: bool) -> None:
    folder = run.config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.config.to_json(folder / "config.json")
        # Epochs whose checkpoint was lost to a kill are trained again; their lines would stand there twice.
        lines = [json.dumps(entry) + "\n" for entry in run.history] if resumed else []
        (folder / "metrics.jsonl").write_text("".join(lines))
    except OSError as error:
        raise ConfigError(f"out_dir: {folder} cannot be written ({error.strerror}). Give another folder.") from None


@contextmanager
def _stop_on_signal(run: _Run) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once."""

    def ask_to_stop(number: int, frame: object) -> None:
        run.stop = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask_to_stop)
    except ValueError:  # not the main thread: whoever owns it decides about signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(run: _Run, left_out: list[str], started: float) -> TrainResult:
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
