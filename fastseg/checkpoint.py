"""Checkpoints: written whole or not at all, read without running code, with plain state-dict keys."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import CheckpointError, ConfigError
from fastseg.unet import UNet

__all__ = ["build_model", "load_checkpoint", "load_model", "load_weights", "save_checkpoint"]

FORMAT = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint: beside its name first, then renamed, so that a reader finds the old or the new one whole."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}). The last checkpoint is intact.") from None
    finally:
        draft.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only`: tensors and plain values, no code.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of fastseg.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Name an existing checkpoint.") from None
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise CheckpointError(f"{path}: is damaged or no checkpoint. Use another, such as best.pt.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model" not in state:
        raise CheckpointError(f"{path}: was not written by this version of fastseg (format {FORMAT}).")
    return state


def build_model(config: Config) -> UNet:
    """A new network as configured."""
    return UNet(config.base_channels, config.depth)


def load_weights(model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], config: Config) -> None:
    """Put a checkpoint's weights into a network built from `config`.

    Raises:
        CheckpointError: they belong to a network of other channels or depth.
    """
    saved = state["config"]
    for field in ("base_channels", "depth"):
        if saved[field] != getattr(config, field):
            raise CheckpointError(
                f"{path}: holds a network with {field} {saved[field]}; the configuration asks for "
                f"{getattr(config, field)}. Set {field} to {saved[field]}, give another name, or pass load_model=false."
            )
    try:
        model.load_state_dict(plain_keys(state["model"]))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the network ({str(error).splitlines()[0]}).") from None


def load_model(path: str | os.PathLike[str]) -> tuple[UNet, Config]:
    """The network a checkpoint holds, in evaluation mode on the CPU, and the configuration it was trained with.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint of fastseg.
    """
    state = load_checkpoint(path)
    try:
        config = Config(**state["config"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: holds a configuration that cannot be used ({error}).") from None
    model = build_model(config)
    load_weights(model, state, path, config)
    return model.eval(), config


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State-dict keys without what `torch.compile` and DistributedDataParallel put in front of them."""
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in weights.items()}
