"""A run in MLflow: at MLFLOW_TRACKING_URI (by default this machine), in MLFLOW_EXPERIMENT_NAME or "fastseg"."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from fastseg.config import Config
from fastseg.training.trackers.tracker import saved_id

__all__ = ["open_tracker"]

MAX_PARAM = 500  # characters that a server takes


class _MLflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log_epoch(self, epoch: int, scalars: dict[str, float], overlay: Path | None) -> None:
        for name, value in scalars.items():
            self.client.log_metric(self.run_id, name, value, step=epoch)
        if overlay is not None:
            with Image.open(overlay) as picture:
                self.client.log_image(self.run_id, picture, artifact_file=f"overlays/epoch_{epoch:03d}.png")

    def finish(self, files: list[Path], failed: bool) -> None:
        for path in [] if failed else files:
            self.client.log_artifact(self.run_id, str(path))
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def open_tracker(config: Config, epoch: int, resumes: bool) -> _MLflow:
    """The run that is resumed, or a new one with the configuration as its parameters."""
    from mlflow import MlflowClient

    client = MlflowClient()
    if run_id := saved_id(config, "mlflow") if resumes else "":
        client.update_run(run_id, status="RUNNING")
        return _MLflow(client, run_id)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastseg")
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id = client.create_run(experiment_id, run_name=config.name).info.run_id
    for field, value in config.model_dump().items():
        client.log_param(run_id, field, str(value)[:MAX_PARAM])
    return _MLflow(client, saved_id(config, "mlflow", run_id))
