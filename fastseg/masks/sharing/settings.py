"""What the masks of a folder were made with, so that `--resume` adds no masks of another network to them.

A hidden file in the output folder says it, and by its time of change which of the masks there are older.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.errors import ConfigError
from fastseg.runtime.files import atomic_write

__all__ = ["checksum", "record_settings", "refuse_other_settings", "time_of_settings"]

NAME = ".fastseg.json"  # in the output folder

Settings = Mapping[str, Any]


def checksum(network: nn.Module) -> str:
    """Eight hexadecimal digits of the weights and buffers (CRC-32)."""
    value = 0
    for tensor in network.state_dict().values():
        if isinstance(tensor, Tensor):
            value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def refuse_other_settings(out: str, settings: Settings) -> None:
    """Raise a ConfigError if the masks in `out` were made with others, or if that cannot be read."""
    found = _read(out)
    if found is None:
        return
    names = [name for name in settings if found.get(name) != settings[name]]
    if names in ([], ["checkpoint"]):  # a copy of a checkpoint gives the same masks
        return
    before, now = (", ".join(f"{name} {some.get(name)}" for name in names) for some in (found, settings))
    raise ConfigError(
        f"resume: the masks in {out}/ were made with {before}; got {now}. Leave out resume to overwrite them, or "
        "choose another folder for out."
    )


def record_settings(out: str, settings: Settings, *, resume: bool) -> None:
    """Write down what the masks in `out` are made with from now on.

    Args:
        resume: masks that are there count as made with these settings, also those of older versions, without such a
            file. Else they are older than the file, and count as results only once they are overwritten.

    Raises:
        OutputError: the file cannot be written.
    """
    if resume and _read(out) is not None:  # which `refuse_other_settings` compares
        return
    with atomic_write(os.path.join(out, NAME)) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        if resume:
            os.utime(temporary, (0, 0))


def time_of_settings(out: str) -> int:
    """Nanoseconds: masks that are older were made with other settings."""
    try:
        return os.stat(os.path.join(out, NAME)).st_mtime_ns
    except FileNotFoundError:  # somebody has removed it
        return 0


def _read(out: str) -> dict[str, Any] | None:
    path = Path(out, NAME)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Make it readable, or choose another folder for out."
        ) from None
    return found if isinstance(found, dict) else None
