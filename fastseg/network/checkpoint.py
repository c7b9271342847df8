"""Checkpoints: written atomically, read without running code, with plain state-dict keys."""

import json
import os
import zipfile
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import CheckpointError, ConfigError, OutputError
from fastseg.network.architecture import build_model, is_own, name_network
from fastseg.network.unet import init_weights
from fastseg.runtime.device import seeded
from fastseg.runtime.files import atomic_write, check_regular

__all__ = [
    "build_model",
    "has_finite_weights",
    "init_model",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "save_checkpoint",
    "saved_config",
]

FORMAT = 1
REFINER = "refiner."  # prefix of the outline refiner's weights in a safetensors file


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
        check_regular(path)
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Name an existing checkpoint.") from None
    try:
        if start[8:] == b"{":  # safetensors: 8 bytes with the header's length, then the header, a JSON object
            state = _read_safetensors(path)
        else:
            state = _read_zip(path)
    except Exception:  # torch's reader raises many kinds of error on damaged bytes
        raise CheckpointError(f"{path}: is damaged or not a checkpoint. Use another, or remove it.") from None
    if not isinstance(state, dict) or not _is_complete(state):
        raise CheckpointError(
            f"{path}: is not a checkpoint of this version of fastseg (format {FORMAT}). Use one that it wrote."
        )
    return state


def init_model(config: Config, network: nn.Module | None = None, *, pretrained: bool = False) -> nn.Module:
    """A new network with the initial weights of `config.seed`; arguments as for `build_model`.

    torch's global generator is as before. The UNet does not even use it, so that threads do not disturb each other.
    """
    if config.network != "unet":
        with seeded(torch.device("cpu"), config.seed):
            return build_model(config, network, pretrained=pretrained)
    with torch.device("meta"):  # shapes without memory
        model = build_model(config)
    _allocate(model)
    init_weights(model, torch.Generator().manual_seed(config.seed))
    return model


def _allocate(model: nn.Module) -> None:
    """Move a network from the meta device to the CPU; its values are undefined.

    `to_empty` does the same, and its first call takes 0.4 s.
    """
    values = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no weight or batch statistic is infinite or NaN; waits for the device."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())


def load_weights(model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], config: Config) -> None:
    """Load a checkpoint's weights into a network built from `config`.

    Raises:
        CheckpointError: they belong to a network with another number of channels, another depth or other classes.
    """
    saved = {"network": "unet", **state["config"]}
    named = os.fspath(path) == config.checkpoint
    remedy = "choose another checkpoint" if named else "choose another name, or pass load_model=false"
    if is_own(config):  # the class may have another name by now
        fields = []
    else:
        fields = ["network", *(("base_channels", "depth") if config.network == "unet" else ())]
    for field in fields:
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
    model.load_state_dict(_matching_weights(model, state, path, config, remedy))


def _describe(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
    return f"{len(names)} classes ({shown})" if names else "no classes"


def _matching_weights(
    model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], config: Config, remedy: str
) -> dict[str, Any]:
    """The checkpoint's weights; CheckpointError if they do not fit the network, which may be on the meta device."""
    weights, saved = state["model"], state["config"]
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    if weights.keys() != expected.keys():
        weights = plain_keys(weights)
    found = {key: (value.shape, value.dtype) for key, value in weights.items() if isinstance(value, Tensor)}
    if found != expected or len(weights) != len(expected):
        if config.network != "unet":
            key = next((key for key in {**expected, **found} if expected.get(key) != found.get(key)), "other values")
            raise CheckpointError(
                f"{path}: its weights do not fit the network {config.network}; it was trained with "
                f"{saved['network']} (first difference: {key}). Pass the module that it was trained with, or {remedy}."
            )
        raise CheckpointError(
            f"{path}: its weights do not fit its configuration (base_channels {saved['base_channels']}, depth "
            f"{saved['depth']}). Use another checkpoint."
        )
    return weights


def saved_config(state: dict[str, Any], path: str | os.PathLike[str]) -> Config:
    """The configuration of the training of a checkpoint.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        return Config(**state["config"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used ({error}). Use another checkpoint.") from None


def load_model(path: str | os.PathLike[str], network: nn.Module | None = None) -> tuple[nn.Module, Config]:
    """A checkpoint's network, in evaluation mode on the CPU, and the configuration of its training.

    Args:
        network: a module like the one that was given to `fastseg.train`; it is copied.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg; or it needs `network`.
        ConfigError: the package of its network is not installed.
    """
    state = load_checkpoint(path)
    config = saved_config(state, path)
    if is_own(config) and network is None:
        raise CheckpointError(
            f"{path}: was trained with a module of your own program, {config.network.removeprefix('own:')}, which "
            "fastseg does not import. Pass an instance of it in Python, network=MODULE."
        )
    if network is not None and not is_own(config):
        raise CheckpointError(f"{path}: was trained with the network {config.network}. Leave out network.")
    name_network(network)  # whether it is a module
    if config.network == "unet":
        with torch.device("meta"):
            model = build_model(config)
        # before memory is allocated for a network that the file may only claim
        _matching_weights(model, state, path, config, "use another checkpoint")
        _allocate(model)
    else:
        model = build_model(config, network)
    load_weights(model, state, path, config)
    return model.eval(), config


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "null"))  # files of other programs have none
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file itself does not iterate)
    refiner = {key.removeprefix(REFINER): value for key, value in weights.items() if key.startswith(REFINER)}
    model = {key: value for key, value in weights.items() if not key.startswith(REFINER)}
    return {"format": FORMAT, "config": config, "model": model, "refiner": refiner or None}


def _read_zip(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, which takes no more memory than the file.

    Raises:
        Exception: of any kind; the file is damaged, or its content is larger than the file.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("has compressed entries, which torch does not write")
    # Mapped, because torch then checks that tensors lie within the file.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    places = _find_tensors(state)
    tensors = {id(tensor): tensor for _, _, tensor in places}
    if sum(tensor.nbytes for tensor in tensors.values()) > size:
        raise ValueError("has tensors that share their values, which fastseg does not write")
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    for container, key, tensor in places:
        container[key] = copies[id(tensor)]
    return state


def _find_tensors(state: Any) -> list[tuple[Any, Any, Tensor]]:
    """The tensors in nested dictionaries and lists, each with its container and its key there."""
    places, pending, seen = [], [state], set()
    while pending:
        container = pending.pop()
        if id(container) in seen or not isinstance(container, dict | list):
            continue
        seen.add(id(container))
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, Tensor):
                places.append((container, key, value))
            pending.append(value)
    return places


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether a checkpoint has this format, a configuration and weights."""
    version, config, weights = state.get("format"), state.get("config"), state.get("model")
    if type(version) is not int or version != FORMAT:  # a tensor has no truth value
        return False
    if not isinstance(config, dict) or not isinstance(weights, dict):
        return False
    return {"base_channels", "depth"} <= config.keys() and all(isinstance(key, str) for key in weights)


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that `torch.compile` and DistributedDataParallel add to its keys."""
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in weights.items()}
