"""The state of a training run: built from a configuration, saved to `last.pt` and resumed from it."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.config import DEFAULT_VAL_DIRS, Config
from fastseg.data.loader import Loader, make_loader
from fastseg.data.pairs import Pairs, find_pairs, split_by_group
from fastseg.errors import CheckpointError, ConfigError, FastsegError
from fastseg.network.checkpoint import has_finite_weights, init_model, load_checkpoint, load_weights
from fastseg.quality.headers import check_sets
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import wrap_ddp
from fastseg.runtime.files import check_writable
from fastseg.training.recipe import make_ema_model, make_optimizer
from fastseg.training.writer import CheckpointWriter

__all__ = [
    "Run",
    "build_run",
    "check_finite",
    "find_splits",
    "load_or_init_model",
    "resolve_config",
    "resume",
    "save_epoch",
    "save_last",
]

SCORES = ("val_dice", "val_iou", "val_dice_pixels", "val_iou_pixels")
NO_SCORES = {"epoch": 0, **dict.fromkeys(SCORES, math.nan)}

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts and the progress of a run."""

    config: Config
    runtime: Runtime
    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, compiled or not
    ema_model: nn.Module | None  # with the moving average of the weights; validated and saved instead of the model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of the augmentation
    train_loader: Loader
    val_loader: Loader
    loss_sum: Tensor  # scalar float32 on the device, over the steps of this epoch
    checkpoints: CheckpointWriter = field(default_factory=CheckpointWriter)
    epoch: int = 0
    step: int = 0  # within the epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch, as in metrics.jsonl
    stop_requested: bool = False  # this process has received Ctrl-C or SIGTERM
    interrupted: bool = False  # all ranks have agreed to stop
    compiled: str = "off"  # what `forward` is: "on" (torch.compile), "graphs" (CUDA graphs) or "off"
    first_step: int = 0  # of this call, as `steps_done` counts
    warm_sizes: set[tuple[int, int]] = field(default_factory=set)  # image sizes at which a step has run in this call
    mask_shares: list[float] = field(default_factory=list)  # foreground in some training masks; only rank 0 has them
    warned: bool = False  # of predictions that are no better than guessing
    micro_batch: int = 0  # pairs per forward pass that fit in memory; 0: the whole batch
    trained_pairs: int = 0  # in this call
    start_time: float = 0.0  # time.perf_counter() at the beginning of this call
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by part of the run

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.num_epochs * len(self.train_loader)

    @property
    def steps_done(self) -> int:
        """Steps since the beginning of the run."""
        return self.epoch * len(self.train_loader) + self.step

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and saved: the averaged one if there is one."""
        return self.model if self.ema_model is None else self.ema_model

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the epoch with the highest Dice; epoch 0 before the first validation."""
        return max(self.history, key=lambda entry: entry["val_dice"], default=NO_SCORES)


def find_splits(config: Config) -> tuple[Pairs, Pairs]:
    """Find the training and the validation pairs, and check their files.

    Validation pairs come from their own folders. If the default folders do not exist, or `val_img_dir` is empty, whole
    cars are held out of the training folders instead.

    Raises:
        DataError: see `find_pairs` and `check_sets`.
    """
    pairs = find_pairs(config.train_img_dir, config.train_mask_dir, bad_samples=config.bad_samples)
    val_dirs = (config.val_img_dir, config.val_mask_dir)
    missing = val_dirs == DEFAULT_VAL_DIRS and not any(map(_has_files, val_dirs))
    if missing or not config.val_img_dir:
        train_pairs, val_pairs = split_by_group(pairs, config.val_fraction, config.seed)
        log.info("no validation folders: %d pairs of whole cars are held out", len(val_pairs))
    else:
        train_pairs, val_pairs = pairs, find_pairs(*val_dirs, bad_samples=config.bad_samples)
    if config.check_data:
        splits = check_sets([train_pairs, val_pairs], bad_samples=config.bad_samples, num_workers=config.num_workers)
        train_pairs, val_pairs = splits
    return train_pairs, val_pairs


def _has_files(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entries)


def resolve_config(config: Config, num_pairs: int, world_size: int = 1) -> Config:
    """Fit batch size and number of epochs to the number of training pairs; changes are logged.

    A batch size that is lowered stays divisible by the number of processes.

    Raises:
        ConfigError: there are fewer pairs than processes.
    """
    if num_pairs < world_size:
        raise ConfigError(
            f"batch_size: each process needs a pair of every batch; got {num_pairs} training pair(s) for {world_size} "
            "processes. Start fewer processes, or add pairs."
        )
    if config.batch_size > num_pairs:
        batch_size = num_pairs // world_size * world_size
        log.info("batch_size: lowered to %d, because there are %d training pairs", batch_size, num_pairs)
        config = config.replace(batch_size=batch_size)
    if "num_epochs" not in config.model_fields_set:
        epochs = max(config.num_epochs, math.ceil(config.min_steps / (num_pairs // config.batch_size)))
        if epochs > config.num_epochs:
            log.info("num_epochs: raised to %d, for at least %d steps (min_steps)", epochs, config.min_steps)
        config = config.replace(num_epochs=epochs)
    return config


def load_or_init_model(config: Config) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network at the beginning of a run, and the state to resume from; None for a new run. Logs a new run's origin.

    Raises:
        CheckpointError: a checkpoint is damaged, belongs to another network, or `config.checkpoint` is missing.
        OutputError: the run's folder cannot be written.
    """
    check_writable(config.run_dir)
    model = init_model(config)
    if config.checkpoint:
        load_weights(model, load_checkpoint(config.checkpoint), config.checkpoint, config)
    path = config.run_dir / "last.pt"
    if config.load_model and path.exists():
        state = load_checkpoint(path)
        load_weights(model, state, path, config)
        if not has_finite_weights(model):
            raise CheckpointError(
                f"{path}: its weights are not finite, so the run cannot resume from it. Pass load_model=false to start "
                "from scratch, and a lower learning_rate."
            )
        return model, state
    origin = f"weights from {config.checkpoint}" if config.checkpoint else "random weights"
    log.info("new run from %s (%s)", origin, "no last.pt yet" if config.load_model else "load_model is false")
    return model, None


def build_run(config: Config, runtime: Runtime, model: nn.Module, train_pairs: Pairs, val_pairs: Pairs) -> Run:
    """A run at its beginning."""
    model = runtime.to_device(model)
    return Run(
        config=config,
        runtime=runtime,
        model=model,
        forward=wrap_ddp(model, runtime.device),
        ema_model=make_ema_model(config, model),
        optimizer=make_optimizer(config, model),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16),
        generator=torch.Generator().manual_seed(config.seed),
        train_loader=make_loader(train_pairs, config, runtime, training=True),
        val_loader=make_loader(val_pairs, config, runtime, training=False),
        loss_sum=torch.zeros((), device=runtime.device),
    )


def check_finite(run: Run, loss: float = 0.0) -> None:
    """Check the loss and, where it is finite, the weights of the last step.

    Raises:
        FastsegError: one of them is infinite or NaN. The message tells how to continue.
    """
    if not math.isfinite(loss):
        problem = f"the loss became {loss}"
    elif not all(has_finite_weights(model) for model in (run.model, run.ema_model) if model):
        problem = "the weights are not finite"
    else:
        return
    config = run.config
    advice = f"Lower it, for example to {config.learning_rate / 10:g}"
    if config.precision != "fp32":
        advice += ", or pass precision=fp32"
    if run.epoch or run.first_step:
        advice += "; and pass load_model=false to start from scratch, because last.pt comes from the same learning rate"
    raise FastsegError(
        f"learning_rate: {problem} in epoch {run.epoch + 1}; learning_rate is {config.learning_rate:g}. {advice}."
    )


def save_epoch(run: Run) -> None:
    """Start writing `best.pt`, if the last epoch is the best, and then `last.pt`; only rank 0 writes.

    Raises:
        OutputError: the save before this one failed.
    """
    if run.runtime.rank > 0:
        return
    folder, last = run.config.run_dir, _last_state(run)
    states = {folder / "last.pt": last}
    if run.best is run.history[-1]:
        # The same tensors as in last.pt, which are copied once.
        weights = last["model"] if run.ema_model is None else last["ema_model"]
        best = {"config": last["config"], "model": weights, "scores": run.best}
        states = {folder / "best.pt": best, **states}
    run.checkpoints.save(states)


def save_last(run: Run) -> None:
    """Start writing the complete state of the run to `last.pt`; only rank 0 writes.

    Raises:
        OutputError: the save before this one failed.
    """
    if run.runtime.rank == 0:
        run.checkpoints.save({run.config.run_dir / "last.pt": _last_state(run)})


def _last_state(run: Run) -> dict[str, Any]:
    """The content of `last.pt`. Its tensors are those of the run, not copies."""
    return {
        "config": run.config.model_dump(),
        "model": run.model.state_dict(),
        "ema_model": run.ema_model.state_dict() if run.ema_model else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "generator": run.generator.get_state(),
        # At the end of an epoch that is not scored yet, the loader already stands at the next one.
        "loader": {**run.train_loader.state_dict(), "epoch": run.epoch, "step": run.step},
        "epoch": run.epoch,
        "step": run.step,
        "loss_sum": run.loss_sum,
        "history": run.history,
    }


def resume(run: Run, state: dict[str, Any] | None) -> None:
    """Restore a run from `state`, the content of its `last.pt`; None leaves it at its beginning.

    Raises:
        ConfigError: the state belongs to another recipe or to other data.
    """
    if state is None:
        return
    path = run.config.run_dir / "last.pt"
    try:
        _check_progress(state, len(run.train_loader))
        run.train_loader.load_state_dict(state["loader"])
        if run.ema_model:
            run.ema_model.load_state_dict(state["ema_model"])
        _load_optimizer(run.optimizer, state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.generator.set_state(state["generator"])
        run.loss_sum.copy_(state["loss_sum"])
        run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: does not fit this configuration ({error}). Choose another name, or pass load_model=false."
        ) from None
    if run.epoch >= run.config.num_epochs:
        log.info("%s: all %d epochs are done; raise num_epochs to train longer", path, run.epoch)
    else:
        log.info("resuming from %s at epoch %d, step %d", path, run.epoch + 1, run.step)


def _check_progress(state: dict[str, Any], num_batches: int) -> None:
    """ValueError if a state's counts contradict each other: somebody has changed the file."""
    loader, history = state["loader"], state["history"]
    counts = {"epoch": state["epoch"], "step": state["step"], "seed": loader["seed"]}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}")
    if (loader["epoch"], loader["step"]) != (state["epoch"], state["step"]) or state["step"] > num_batches:
        raise ValueError(f"it ends at epoch {state['epoch']}, step {state['step']}; its loader disagrees")
    numbers = [entry[name] for entry in history for name in ("epoch", *SCORES, "train_loss", "val_loss")]
    if len(history) != state["epoch"] or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("its history is not that of its epochs")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state. torch's fused step would read beyond tensors of other shapes."""
    options = [{name: type(option) for name, option in group.items()} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if [{name: type(option) for name, option in group.items()} for group in optimizer.param_groups] != options:
        raise ValueError("its optimizer has other options")
    for parameter, values in optimizer.state.items():
        shapes = {name: value.shape for name, value in values.items()}
        if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise ValueError("its optimizer has other shapes")
