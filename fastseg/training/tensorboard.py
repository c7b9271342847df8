"""A run in TensorBoard, where `Config.tensorboard` asks for it: `tensorboard --logdir runs` shows all runs beside
each other. The figures are those of metrics.jsonl, the picture is overlay.png.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastseg.config import Config
from fastseg.errors import ConfigError

__all__ = ["import_writer", "open_writer", "write_epoch"]


def open_writer(config: Config, epoch: int) -> Any:
    """A `SummaryWriter` into the run's folder, which forgets what was written after `epoch`; None if not asked for.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    writer = import_writer(config)
    return writer and writer(config.run_dir, purge_step=epoch + 1)


def import_writer(config: Config) -> Any:
    """The class of TensorBoard's writer; None if not asked for.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard: the package is not installed. Install fastseg-dali[tensorboard], or pass tensorboard=false."
        ) from None
    return SummaryWriter


def write_epoch(board: Any, entry: dict[str, Any], overlay: Path) -> None:
    """Add an epoch's figures, by what they belong to (train, val, speed), and its overlay picture."""
    for name, value in entry.items():
        part, _, rest = name.partition("_")
        if name != "epoch":
            board.add_scalar(f"{part}/{rest}" if part in ("train", "val") else f"run/{name}", value, entry["epoch"])
    with Image.open(overlay) as picture:
        board.add_image("overlay", np.asarray(picture.convert("RGB")), entry["epoch"], dataformats="HWC")
    board.flush()
