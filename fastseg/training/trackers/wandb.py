"""A run in Weights & Biases, in WANDB_PROJECT or "fastseg"; WANDB_MODE=offline keeps it on this machine."""

import os
import re
from pathlib import Path
from typing import Any

from fastseg.config import Config
from fastseg.training.trackers.tracker import saved_id

__all__ = ["open_tracker"]


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log_epoch(self, epoch: int, scalars: dict[str, float], overlay: Path | None) -> None:
        from wandb import Image

        pictures = {} if overlay is None else {"overlay": Image(str(overlay))}
        self.run.log({**scalars, **pictures}, step=epoch)

    def finish(self, files: list[Path], failed: bool) -> None:
        from wandb import Artifact

        if not failed:
            artifact = Artifact(re.sub(r"[^\w.-]", "-", self.run.name), type="model")
            for path in files:
                artifact.add_file(str(path))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=int(failed))


def open_tracker(config: Config, epoch: int, resumes: bool) -> _Wandb:
    """The run that is resumed, or a new one with the configuration."""
    import wandb

    run_id = saved_id(config, "wandb") if resumes else ""
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fastseg"),
        name=config.name,
        id=run_id or None,
        resume="allow" if run_id else None,
        config=config.model_dump(),
        dir=str(config.run_dir),
        settings=wandb.Settings(console="off"),  # the log stays what fastseg prints
    )
    saved_id(config, "wandb", run.id)
    return _Wandb(run)
