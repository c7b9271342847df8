"""TensorBoard events in the run's folder: `tensorboard --logdir runs`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastseg.config import Config

__all__ = ["open_tracker"]


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log_epoch(self, epoch: int, scalars: dict[str, float], overlay: Path | None) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, epoch)
        if overlay is not None:
            with Image.open(overlay) as picture:
                self.writer.add_image("overlay", np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")
        self.writer.flush()

    def finish(self, files: list[Path], failed: bool) -> None:
        self.writer.close()


def open_tracker(config: Config, epoch: int, resumes: bool) -> _TensorBoard:
    """A writer into the run's folder that discards events after `epoch`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.run_dir), purge_step=epoch + 1)
    if not resumes:
        fields = "\n".join(f"    {line}" for line in json.dumps(config.model_dump(), indent=2).splitlines())
        writer.add_text("config", fields)  # four spaces: Markdown shows it as it is
    return _TensorBoard(writer)
