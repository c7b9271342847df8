"""TensorBoard events of a run, if `Config.tensorboard` is true: the numbers of metrics.jsonl and overlay.png.

tensorboard --logdir runs
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastseg.classes import SegClass
from fastseg.config import Config
from fastseg.errors import ConfigError

__all__ = ["close_writer", "import_writer", "open_writer", "write_epoch"]

log = logging.getLogger(__name__)


def open_writer(config: Config, epoch: int) -> Any:
    """A `SummaryWriter` into the run's folder that discards events after `epoch`; None if TensorBoard is off.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    summary_writer = import_writer(config)
    return summary_writer and summary_writer(config.run_dir, purge_step=epoch + 1)


def import_writer(config: Config) -> Any:
    """The class `SummaryWriter`; None if TensorBoard is off.

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


def write_epoch(writer: Any, entry: dict[str, Any], overlay: Path | None, classes: Sequence[SegClass] = ()) -> None:
    """Write an epoch's numbers, grouped as train, val, the classes' scores and run, and its overlay.

    What cannot be written is logged as a warning.
    """
    try:
        _write_epoch(writer, entry, overlay, classes)
    except OSError as error:
        log.warning("tensorboard: epoch %d cannot be written (%s)", entry["epoch"], error.strerror)


def close_writer(writer: Any) -> None:
    """Close the writer; warn if its last events cannot be written."""
    try:
        writer.close()
    except OSError as error:
        log.warning("tensorboard: the last events cannot be written (%s)", error.strerror)


def _write_epoch(writer: Any, entry: dict[str, Any], overlay: Path | None, classes: Sequence[SegClass]) -> None:
    for name, value in entry.items():
        part, _, rest = name.partition("_")
        if isinstance(value, list):
            for item, score in zip(classes, value, strict=True):
                if score is not None:
                    writer.add_scalar(f"{rest}/{item.name}", score, entry["epoch"])
        elif name != "epoch":
            writer.add_scalar(f"{part}/{rest}" if part in ("train", "val") else f"run/{name}", value, entry["epoch"])
    if overlay is not None:
        with Image.open(overlay) as picture:
            writer.add_image("overlay", np.asarray(picture.convert("RGB")), entry["epoch"], dataformats="HWC")
    writer.flush()
