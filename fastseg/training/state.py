"""The state of a training run: its parts and its progress, saved to `last.pt` and resumed from it."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.data.loader import Loader
from fastseg.errors import ConfigError, FastsegError
from fastseg.messages import count_of
from fastseg.network.checkpoint import has_finite_weights
from fastseg.network.metrics import best_epoch
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import all_reduce, barrier
from fastseg.training.budget import Budget, restore_budget, used_seconds
from fastseg.training.recipe import choose_optimizer, make_optimizer, training_size
from fastseg.training.step.muon import MUON
from fastseg.training.step.pipeline import Augmentation, Loss
from fastseg.training.writer import CheckpointWriter

__all__ = [
    "Run",
    "check_finite",
    "resume",
    "save_epoch",
    "save_last",
    "save_last_and_wait",
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
    class_weights: Tensor | None = None  # (C,) on the device, in the loss
    augmentation: Augmentation | None = None  # a user's own, in place of fastseg's
    loss: Loss | None = None  # likewise
    budget: Budget | None = None  # with config.time_budget
    checkpoints: CheckpointWriter = field(default_factory=CheckpointWriter)
    save_time: float = field(default_factory=time.perf_counter)  # of the last save
    epoch: int = 0
    step: int = 0  # within the epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch, as in metrics.jsonl
    stop_requested: bool = False  # this process has received Ctrl-C or SIGTERM
    interrupted: bool = False  # all ranks have agreed to stop
    contention_checked: bool = False
    compiled: str = "off"  # what `forward` is: "on" (torch.compile), "graphs" (CUDA graphs) or "off"
    first_step: int = 0  # of this call, as `steps_done` counts
    warm_sizes: set[tuple[int, int]] = field(default_factory=set)  # image sizes at which a step has run in this call
    mask_shares: list[float] = field(default_factory=list)  # foreground in some training masks; only rank 0 has them
    warned: bool = False  # of predictions that are no better than guessing
    micro_batch: int = 0  # pairs per forward pass that fit in memory; 0: the whole batch
    trained_pairs: int = 0  # in this call
    start_time: float = 0.0  # time.perf_counter() at the beginning of this call
    refiner_start: float = 0.0  # the same at the beginning of the outline refiner
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by part of the run

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, if it has no time budget."""
        return self.config.num_epochs * len(self.train_loader)

    @property
    def steps_done(self) -> int:
        """Steps since the beginning of the run."""
        return self.epoch * len(self.train_loader) + self.step

    def position_at(self, step: int) -> tuple[float, float]:
        """A step's place in the run, and the run's length: in steps, or with a time budget in shares of the run."""
        return (step, self.total_steps) if self.budget is None else (self.budget.position_at(step), 1.0)

    def size_of(self, step: int) -> tuple[int, int]:
        """Height and width of the images of a step."""
        return training_size(self.config, *self.position_at(step))

    @property
    def last_size(self) -> tuple[int, int]:
        """Height and width of the images of the last step."""
        return training_size(self.config, 1.0, 1.0) if self.budget else self.size_of(self.total_steps - 1)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        if self.budget is None:
            return self.epoch >= self.config.num_epochs
        return self.budget.position_at(self.steps_done) >= 1

    @property
    def title(self) -> str:
        """The current epoch, for people."""
        if self.budget is None:
            return f"epoch {self.epoch + 1}/{self.config.num_epochs}"
        return f"epoch {self.epoch + 1} ({100 * self.budget.position_at(self.steps_done):.0f} %)"

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and saved: the averaged one if there is one."""
        return self.model if self.ema_model is None else self.ema_model

    @property
    def best(self) -> dict[str, Any]:
        """The entry of `best_epoch`; epoch 0 before the first validation."""
        return best_epoch(self.history) if self.history else NO_SCORES


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
    run.save_time = time.perf_counter()
    if run.runtime.rank > 0:
        return
    folder, last = run.config.run_dir, _last_state(run, run.loss_sum)
    states = {folder / "last.pt": last}
    if run.best is run.history[-1]:
        # The same tensors as in last.pt, which are copied once.
        weights = last["model"] if run.ema_model is None else last["ema_model"]
        best = {"config": last["config"], "model": weights, "scores": run.best}
        states = {folder / "best.pt": best, **states}
    run.checkpoints.save(states)


def save_last(run: Run, *, if_finite: bool = False) -> None:
    """Start writing the complete state of the run to `last.pt`; only rank 0 writes. All ranks must call this.

    Args:
        if_finite: as for `CheckpointWriter.save`.

    Raises:
        OutputError: the save before this one failed.
    """
    run.save_time = time.perf_counter()
    loss_sums = _gather_loss_sums(run)
    if run.runtime.rank == 0:
        run.checkpoints.save({run.config.run_dir / "last.pt": _last_state(run, loss_sums)}, if_finite=if_finite)


def save_last_and_wait(run: Run) -> None:
    """Write `last.pt` before any rank continues: torchrun ends all ranks as soon as one has ended.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        save_last(run)
        run.checkpoints.wait()
    finally:
        barrier()


def _gather_loss_sums(run: Run) -> Tensor:
    """`loss_sum` of each rank (W,), the only part of the state in which ranks differ; a scalar in a single process."""
    if run.runtime.world_size == 1:
        return run.loss_sum
    sums = run.loss_sum.new_zeros(run.runtime.world_size)
    sums[run.runtime.rank] = run.loss_sum
    return all_reduce(sums)


def _last_state(run: Run, loss_sums: Tensor) -> dict[str, Any]:
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
        "loss_sum": loss_sums,
        "history": run.history,
        "budget": run.budget.state_dict(used_seconds(run), run.steps_done) if run.budget else None,
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
        if run.ema_model and state["ema_model"]:  # an average that begins now begins at the weights
            run.ema_model.load_state_dict(state["ema_model"])
        _load_optimizer(run, state)
        if state["scaler"]:  # empty where the precision needed none
            run.scaler.load_state_dict(state["scaler"])
        run.generator.set_state(state["generator"])
        run.loss_sum.copy_(_own_loss_sum(state["loss_sum"], run.runtime))
        run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
        for entry in run.history:  # older versions scored all epochs at full size, and did not say so
            entry.setdefault("val_size", run.config.image_height)
        if run.budget:
            restore_budget(run.budget, state.get("budget"), run.steps_done)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: does not fit this configuration ({error}). Choose another name, or pass load_model=false."
        ) from None
    if run.is_finished:
        field = "time_budget" if run.budget else "num_epochs"
        log.info("%s: finished after %s; raise %s to train longer", path, count_of(run.epoch, "epoch"), field)
    else:
        log.info("resuming from %s at epoch %d, step %d", path, run.epoch + 1, run.step)


def _own_loss_sum(sums: Tensor, runtime: Runtime) -> Tensor:
    """This rank's part of the saved sums: its own if there are as many ranks as before, otherwise their mean."""
    if sums.ndim > 1:
        raise ValueError(f"its loss has the shape {tuple(sums.shape)}")
    sums = sums.reshape(-1)
    return sums[runtime.rank] if len(sums) == runtime.world_size else sums.mean()


def _check_progress(state: dict[str, Any], num_batches: int) -> None:
    """ValueError if a state's counts contradict each other: somebody has changed the file."""
    loader, history = state["loader"], state["history"]
    counts = {"epoch": state["epoch"], "step": state["step"], "seed": loader["seed"]}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}")
    if (loader["epoch"], loader["step"]) != (state["epoch"], state["step"]) or state["step"] > num_batches:
        raise ValueError(f"it ends at epoch {state['epoch']}, step {state['step']}; its loader disagrees")
    numbers = [entry[name] for entry in history for name in ("epoch", "val_dice", "val_iou", "train_loss", "val_loss")]
    if len(history) != state["epoch"] or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("its history is not that of its epochs")


def _load_optimizer(run: Run, state: dict[str, Any]) -> None:
    """Load the values that an optimizer holds of each parameter; its options are those of the present configuration.

    torch's fused step would read beyond tensors of other shapes.
    """
    saved = state["config"]
    for name, before in (("recipe", saved["recipe"]), ("optimizer", choose_optimizer(Config(), state))):
        now = getattr(run.config, name)
        if before != now and (name, run.config.recipe) != ("optimizer", "tutorial"):
            raise ConfigError(
                f"{name}: is {before} in this run; got {now}. Set it to {before}, choose another name, or pass "
                "load_model=false."
            )
    # torch matches groups by their position, and an encoder with its own learning rate has groups of its own.
    optimizer = make_optimizer(run.config.replace(encoder_lr=saved.get("encoder_lr", 1.0)), run.model)
    own = [{name: type(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, options in zip(optimizer.param_groups, own, strict=True):
        if {name: type(value) for name, value in group.items() if name != "params"} != options:
            raise ValueError("its optimizer has other options")
    filters = {parameter for group in optimizer.param_groups if group.get(MUON) for parameter in group["params"]}
    for parameter, values in optimizer.state.items():
        shapes = {name: value.shape for name, value in values.items()}
        names = ("momentum",) if parameter in filters else ("exp_avg", "exp_avg_sq")
        if shapes != {"step": (), **dict.fromkeys(names, parameter.shape)}:
            raise ValueError("its optimizer has other shapes")
    run.optimizer.state = optimizer.state
