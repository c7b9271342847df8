"""The state of a training run: its data, what is built from a configuration, saved to `last.pt` and taken up again."""

import json
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
from fastseg.errors import ConfigError
from fastseg.network.checkpoint import build_model, load_checkpoint, load_weights, save_checkpoint
from fastseg.quality.headers import check_sets
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import wrap_ddp
from fastseg.runtime.files import atomic_write, check_writable, make_folder
from fastseg.training.compile import capture_graphs, choose_compile
from fastseg.training.recipe import make_ema_model, make_optimizer, training_size

__all__ = [
    "Run",
    "build_run",
    "compile_model",
    "find_data",
    "load_or_init_model",
    "resolve_config",
    "create_run_dir",
    "resume",
    "save_last",
]

NO_SCORES = {"epoch": 0, **dict.fromkeys(("val_dice", "val_iou", "val_dice_pixels", "val_iou_pixels"), math.nan)}

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that changes from step to step."""

    config: Config
    runtime: Runtime
    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, compiled or not
    ema_model: nn.Module | None  # with the moving average of the weights; scored and saved in place of the model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of the augmentation
    train_loader: Loader
    val_loader: Loader
    loss_sum: Tensor  # over the steps of this epoch, on the device
    epoch: int = 0
    step: int = 0  # within the epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch, as in metrics.jsonl
    signalled: bool = False  # Ctrl-C or SIGTERM has come
    stop: bool = False  # to end after this step; all processes agree on it
    sizes_seen: set[tuple[int, int]] = field(default_factory=set)  # of training images, in this call
    trained_pairs: int = 0
    started: float = 0.0  # time.perf_counter() when this call began
    clock: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds by what they went into

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.num_epochs * len(self.train_loader)

    @property
    def steps_done(self) -> int:
        """Steps since the run began."""
        return self.epoch * len(self.train_loader) + self.step

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.model if self.ema_model is None else self.ema_model

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the epoch with the highest Dice."""
        return max(self.history, key=lambda entry: entry["val_dice"], default=NO_SCORES)


def find_data(config: Config) -> tuple[Pairs, Pairs]:
    """Training and validation pairs as configured, with their files checked.

    Validation has folders of its own; only where the default ones do not exist, or val_img_dir is empty, whole cars
    are held out of the training folders.

    Raises:
        DataError: see `find_pairs` and `check_sets`.
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
        both = check_sets([train_pairs, val_pairs], bad_samples=config.bad_samples, num_workers=config.num_workers)
        train_pairs, val_pairs = both
    return train_pairs, val_pairs


def _holds_files(folder: str) -> bool:
    return os.path.isdir(folder) and any(os.scandir(folder))


def resolve_config(config: Config, pairs: int) -> Config:
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


def load_or_init_model(config: Config) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network a run begins with, and the state it goes on from where there is one and it is wanted; says which.

    Raises:
        CheckpointError: a checkpoint is damaged, belongs to another network, or is named and missing.
        OutputError: the run's folder cannot be written.
    """
    check_writable(config.run_dir)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to change
        torch.manual_seed(config.seed)
        model = build_model(config)
    if config.checkpoint:
        load_weights(model, load_checkpoint(config.checkpoint), config.checkpoint, config)
    path = config.run_dir / "last.pt"
    if config.load_model and path.exists():
        state = load_checkpoint(path)
        load_weights(model, state, path, config)
        return model, state
    origin = f"weights from {config.checkpoint}" if config.checkpoint else "random weights"
    log.info("a new run from %s (%s)", origin, "no last.pt yet" if config.load_model else "load_model is false")
    return model, None


def build_run(config: Config, runtime: Runtime, model: nn.Module, train_pairs: Pairs, val_pairs: Pairs) -> Run:
    """A run at its beginning."""
    model = runtime.to_device(model)
    forward = wrap_ddp(model, runtime.device)
    train_loader = make_loader(train_pairs, config, runtime, training=True)
    return Run(
        config=config,
        runtime=runtime,
        model=model,
        forward=forward,
        ema_model=make_ema_model(config, model),
        optimizer=make_optimizer(config, model),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16),
        generator=torch.Generator().manual_seed(config.seed),
        train_loader=train_loader,
        val_loader=make_loader(val_pairs, config, runtime, training=False),
        loss_sum=torch.zeros((), device=runtime.device),
    )


def compile_model(run: Run) -> None:
    """Compile the forward and backward pass if the steps that remain win back the time it takes, or record them."""
    config, total = run.config, run.total_steps
    if run.steps_done >= total:
        return
    choice = choose_compile(config, run.runtime, total - run.steps_done)
    if choice == "on":
        # Its two sizes at most have their own code. Who has time to compile has time to try cuDNN's algorithms too.
        torch.backends.cudnn.benchmark = True
        run.forward = torch.compile(run.forward, dynamic=False)
    elif choice == "graphs":
        sizes = {training_size(config, step, total) for step in (run.steps_done, total - 1)}
        run.forward = capture_graphs(run.model, run.runtime, [(config.batch_size, 3, *size) for size in sizes])


def save_last(run: Run) -> None:
    """Write all that is needed to go on as if nothing had happened; the first process does."""
    if run.runtime.rank:
        return
    state = {
        "config": run.config.model_dump(),
        "model": run.model.state_dict(),
        "ema_model": run.ema_model.state_dict() if run.ema_model else None,
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


def resume(run: Run, state: dict[str, Any] | None) -> None:
    """Put a run where `state`, from its `last.pt`, was taken; says where that is.

    Raises:
        ConfigError: the state belongs to another recipe or to other data.
    """
    if state is None:
        return
    path = run.config.run_dir / "last.pt"
    try:
        run.train_loader.load_state_dict(state["loader"])
        if run.ema_model:
            run.ema_model.load_state_dict(state["ema_model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.generator.set_state(state["generator"])
        run.loss_sum.copy_(state["loss_sum"])
        run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{path}: belongs to a run of another kind ({error}). Give another name, or pass load_model=false."
        ) from None
    if run.epoch >= run.config.num_epochs:
        log.info("%s: all %d epochs are done; a higher num_epochs goes on", path, run.epoch)
    else:
        log.info("going on from %s at epoch %d, step %d", path, run.epoch + 1, run.step)


def create_run_dir(run: Run) -> None:
    """Make the run's folder and write what is known at its beginning.

    Raises:
        OutputError: it cannot be written.
    """
    if run.runtime.rank:
        return
    folder = run.config.run_dir
    make_folder(folder)
    with atomic_write(folder / "config.json") as temporary:
        run.config.to_json(temporary)
    # Epochs after the checkpoint that a killed run wrote are trained again: their lines must go.
    with atomic_write(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in run.history))
