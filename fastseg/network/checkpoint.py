"""Checkpoints: written atomically, read without running code, with plain state-dict keys."""

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import CheckpointError, ConfigError, OutputError
from fastseg.network.unet import UNet
from fastseg.runtime.files import atomic_write

__all__ = ["build_model", "load_checkpoint", "load_model", "load_weights", "save_checkpoint"]

FORMAT = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        OutputError: it cannot be written; the previous file is intact.
    """
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):  # torch's writer wraps the file's OSError
            raise
        raise OutputError(path, error.__context__) from None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only`: tensors and plain values, no code.

    A safetensors file from `fastseg.export` is also a checkpoint, but a run cannot resume from it.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of fastseg.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Name an existing checkpoint.") from None
    try:
        if start[8:] == b"{":  # safetensors: 8 bytes with the header's length, then the header, a JSON object
            state = _read_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's reader raises many kinds of error on damaged bytes
        raise CheckpointError(f"{path}: is damaged or not a checkpoint. Use another, or remove it.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not _is_complete(state):
        raise CheckpointError(
            f"{path}: is not a checkpoint of this version of fastseg (format {FORMAT}). Use one that it wrote."
        )
    return state


def build_model(config: Config) -> UNet:
    """A new network with random weights, as configured."""
    return UNet(config.base_channels, config.depth, out_channels=config.num_outputs)


def load_weights(model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], config: Config) -> None:
    """Load a checkpoint's weights into a network built from `config`.

    Raises:
        CheckpointError: they belong to a network with another number of channels, another depth or other classes.
    """
    saved = state["config"]
    named = os.fspath(path) == config.checkpoint
    remedy = "choose another checkpoint" if named else "choose another name, or pass load_model=false"
    for field in ("base_channels", "depth"):
        if saved[field] != getattr(config, field):
            raise CheckpointError(
                f"{path}: must hold a network with {field} {getattr(config, field)}, as configured; it has "
                f"{saved[field]}. Set {field} to {saved[field]}, or {remedy}."
            )
    names, own = [item["name"] for item in saved.get("classes", ())], [item.name for item in config.classes]
    if len(names) != len(own) or (names != own and not named):
        raise CheckpointError(
            f"{path}: must hold a network of {_describe(own)}, as configured; it has {_describe(names)}. Set classes "
            f"to its own, or {remedy}."
        )
    try:
        model.load_state_dict(plain_keys(state["model"]))
    except (RuntimeError, TypeError):
        raise CheckpointError(
            f"{path}: its weights do not fit its configuration (base_channels {saved['base_channels']}, depth "
            f"{saved['depth']}). Use another checkpoint."
        ) from None


def _describe(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
    return f"{len(names)} classes ({shown})" if names else "no classes"


def load_model(path: str | os.PathLike[str]) -> tuple[UNet, Config]:
    """A checkpoint's network, in evaluation mode on the CPU, and the configuration of its training.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg.
    """
    state = load_checkpoint(path)
    try:
        config = Config(**state["config"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used ({error}). Use another checkpoint.") from None
    model = build_model(config)
    load_weights(model, state, path, config)
    return model.eval(), config


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "null"))  # files of other programs have none
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file itself does not iterate)
        return {"format": FORMAT, "config": config, "model": weights}


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether a checkpoint has a configuration and weights."""
    config, weights = state.get("config"), state.get("model")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        return False
    return {"base_channels", "depth"} <= config.keys() and all(isinstance(key, str) for key in weights)


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that `torch.compile` and DistributedDataParallel add to its keys."""
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in weights.items()}
