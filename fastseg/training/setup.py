"""A run at its beginning: its data, its configuration fitted to them, its network and its optimizer."""

import logging
import math
import os
from typing import Any

import torch
from torch import nn

from fastseg.config import DEFAULT_VAL_DIRS, Config
from fastseg.data.loader import make_loader
from fastseg.data.pairs import Pairs, find_pairs, split_by_group
from fastseg.errors import CheckpointError, ConfigError
from fastseg.messages import count_of
from fastseg.network.checkpoint import has_finite_weights, init_model, load_checkpoint, load_weights
from fastseg.quality.headers import check_sets
from fastseg.runtime.device import Runtime, default_batch_size
from fastseg.runtime.distributed import local_batch_size, wrap_ddp
from fastseg.runtime.files import check_writable
from fastseg.training.budget import open_budget
from fastseg.training.recipe import make_ema_model, make_optimizer
from fastseg.training.state import Run

__all__ = ["build_run", "choose_batch_size", "choose_seed", "find_splits", "load_or_init_model", "resolve_config"]

# One core, 192 pairs, 16 channels: the table of docs/train.md, by benchmarks/time_budget.py.
MORE_TIME = "on generated photos 10 minutes instead of 5 raised boundary IoU at full size from 0.91 to 0.93"

MIN_STEPS, MIN_PAIRS = 240, 3840  # of a run whose length nobody has set

log = logging.getLogger(__name__)


def find_splits(config: Config) -> tuple[Pairs, Pairs]:
    """Find the training and the validation pairs, and check their files.

    Validation pairs come from their own folders. If the default folders do not exist, or `val_img_dir` is empty, some
    are held out of the training folders instead; see `split_by_group`.

    Raises:
        DataError: see `find_pairs` and `check_sets`.
    """
    pairs = find_pairs(config.train_img_dir, config.train_mask_dir, bad_samples=config.bad_samples)
    val_dirs = (config.val_img_dir, config.val_mask_dir)
    missing = val_dirs == DEFAULT_VAL_DIRS and not any(map(_has_files, val_dirs))
    if missing or not config.val_img_dir:
        train_pairs, val_pairs = split_by_group(pairs, config.val_fraction, config.seed)
        log.info("no validation folders: held out %s", count_of(len(val_pairs), "pair"))
    else:
        train_pairs, val_pairs = pairs, find_pairs(*val_dirs, bad_samples=config.bad_samples)
    if config.check_data:
        names = ("bad_samples", "num_workers", "classes", "ignore_value")
        splits = check_sets([train_pairs, val_pairs], **{name: getattr(config, name) for name in names})
        train_pairs, val_pairs = splits
    return train_pairs, val_pairs


def _has_files(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entries)


def choose_batch_size(config: Config, runtime: Runtime, state: dict[str, Any] | None) -> int:
    """What a `batch_size` of 0 means for a run: that of the checkpoint to resume from, else the device's default.

    The tutorial recipe has 16 everywhere.

    Args:
        state: of `last.pt`; None for a new run.

    Raises:
        ConfigError: the number of processes does not divide the batch size of the checkpoint.
    """
    if config.batch_size:
        return config.batch_size
    if state is not None and isinstance(state.get("config"), dict) and state["config"].get("batch_size"):
        size = config.replace(batch_size=state["config"]["batch_size"]).batch_size
        local_batch_size(size, runtime.world_size)
        return size
    size = 16 if config.recipe == "tutorial" else default_batch_size(runtime.device)
    return max(size // runtime.world_size, 1) * runtime.world_size


def choose_seed(config: Config, state: dict[str, Any] | None) -> int:
    """The seed of a run: a run that resumes keeps its own, which decides what is held out, and logs it.

    Args:
        state: of `last.pt`; None for a new run.
    """
    loader = state.get("loader") if state is not None else None
    seed = loader.get("seed") if isinstance(loader, dict) else None
    if type(seed) is not int or not 0 <= seed < 2**63:  # none, or a damaged file, which is reported later
        return config.seed
    if seed != config.seed:
        log.info("seed: %d, which the run has had from its beginning; load_model=false starts from scratch", seed)
    return seed


def resolve_config(config: Config, num_pairs: int, world_size: int = 1) -> Config:
    """Fit batch size and number of epochs to the number of training pairs; changes are logged.

    A batch size that is lowered stays divisible by the number of processes.

    Raises:
        ConfigError: there are fewer pairs than processes.
    """
    if num_pairs < world_size:
        raise ConfigError(
            f"batch_size: each process needs a pair of every batch; got {count_of(num_pairs, 'training pair')} for "
            f"{world_size} processes. Start fewer processes, or add pairs."
        )
    min_steps = config.min_steps or max(MIN_STEPS, MIN_PAIRS // config.batch_size)
    if config.batch_size > num_pairs:
        batch_size = num_pairs // world_size * world_size
        log.info("batch_size: lowered to %d, for %s", batch_size, count_of(num_pairs, "training pair"))
        config = config.replace(batch_size=batch_size)
    if "num_epochs" not in config.model_fields_set and not config.time_budget:
        epochs = max(config.num_epochs, math.ceil(min_steps / (num_pairs // config.batch_size)))
        if epochs > config.num_epochs:
            log.info(
                "num_epochs: raised to %d, for at least %d steps (min_steps). A time_budget may give better masks: %s",
                *(epochs, min_steps, MORE_TIME),
            )
        config = config.replace(num_epochs=epochs)
    return config


def load_or_init_model(config: Config, network: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network at the beginning of a run, and the state to resume from; None for a new run. Logs a new run's origin.

    Args:
        network: a user's own; it is copied.

    Raises:
        CheckpointError: a checkpoint is damaged, belongs to another network, or `config.checkpoint` is missing.
        OutputError: the run's folder cannot be written.
    """
    check_writable(config.run_dir)
    path = config.run_dir / "last.pt"
    resumes = config.load_model and path.exists()
    model = init_model(config, network, pretrained=not resumes and not config.checkpoint)
    if config.checkpoint and not resumes:
        load_weights(model, load_checkpoint(config.checkpoint), config.checkpoint, config)
    if resumes:
        state = load_checkpoint(path)
        load_weights(model, state, path, config)
        if not has_finite_weights(model):
            raise CheckpointError(
                f"{path}: its weights are not finite, so the run cannot resume from it. Pass load_model=false to start "
                "from scratch, and a lower learning_rate."
            )
        return model, state
    random = "the module's weights" if network is not None else "random weights"
    origin = f"weights from {config.checkpoint}" if config.checkpoint else random
    log.info("new run from %s (%s)", origin, "no last.pt yet" if config.load_model else "load_model is false")
    return model, None


def build_run(config: Config, runtime: Runtime, model: nn.Module, train_pairs: Pairs, val_pairs: Pairs) -> Run:
    """A run at its beginning."""
    model = runtime.to_device(model)
    return Run(
        config=config,
        runtime=runtime,
        model=model,
        forward=wrap_ddp(model, runtime.device, may_skip_parameters=config.network != "unet"),
        ema_model=make_ema_model(config, model),
        optimizer=make_optimizer(config, model),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16),
        generator=torch.Generator().manual_seed(config.seed),
        train_loader=make_loader(train_pairs, config, runtime, training=True),
        val_loader=make_loader(val_pairs, config, runtime, training=False),
        loss_sum=torch.zeros((), device=runtime.device),
        budget=open_budget(config),
    )
