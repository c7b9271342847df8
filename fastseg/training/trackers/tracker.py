"""Experiment trackers: TensorBoard, MLflow and Weights & Biases show a run's configuration, scores, overlays and files.

They get the numbers of metrics.jsonl after each epoch, and at the end of the run its files. A tracker that fails while
the run trains is dropped with a warning: training is worth more than its record.
"""

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastseg.config import Config
from fastseg.errors import ConfigError

__all__ = ["Tracker", "TrackerGroup", "check_trackers", "group_scalars", "open_trackers", "saved_id"]

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
MODULE = "fastseg.training.trackers.{}"  # each has a function `open_tracker`
IDS = "trackers.json"  # in the run's folder: by tracker, the id under which a resumed run continues
ARTIFACTS = ("best.pt", "config.json", "metrics.jsonl", "summary.json", "curves.png", "overlay.png")

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One tracker of one run."""

    def log_epoch(self, epoch: int, scalars: dict[str, float], overlay: Path | None) -> None:
        """Record an epoch's numbers, as `group_scalars` names them, and its overlay, a PNG, if there is one."""

    def finish(self, files: list[Path], failed: bool) -> None:
        """Record the run's files, unless it has failed, and close the tracker."""


class TrackerGroup:
    """The trackers of a run."""

    def __init__(self, trackers: dict[str, Tracker], config: Config) -> None:
        self.trackers, self.config = trackers, config

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def log_epoch(self, entry: dict[str, Any], overlay: Path | None) -> None:
        """Record an epoch's entry of metrics.jsonl and its overlay, if there is one."""
        self._call("log_epoch", entry["epoch"], group_scalars(entry, self.config), overlay)

    def finish(self, failed: bool) -> None:
        """Record the files of the run's folder, and close the trackers."""
        files = [self.config.run_dir / name for name in ARTIFACTS]
        self._call("finish", [path for path in files if path.is_file()], failed)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a package's own kind, such as a server that does not answer
                log.warning("tracker: %s failed and is switched off (%s: %s)", name, type(error).__name__, error)
                del self.trackers[name]


def check_trackers(config: Config) -> None:
    """Test whether the packages of the trackers are installed.

    Raises:
        ConfigError: one is missing.
    """
    for name in _names(config):
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            field, off = ("tracker", '""') if config.tracker == name else ("tensorboard", "false")
            raise ConfigError(
                f"{field}: the package {name} is not installed. Install fastseg-dali[{name}], or pass {field}={off}."
            ) from None


@contextmanager
def open_trackers(config: Config, epoch: int, *, resumes: bool, active: bool) -> Iterator[TrackerGroup]:
    """The trackers of a run, for the duration of the block; at its end they get the run's files.

    Args:
        epoch: epochs that are done; a tracker forgets what it has of later ones, if it can.
        resumes: continue the record of the run that is resumed, if there is one.
        active: without it there are none, as in ranks other than 0.

    Raises:
        ConfigError: a tracker cannot be opened.
    """
    group = TrackerGroup({}, config)
    for name in _names(config) if active else ():
        try:
            tracker = importlib.import_module(MODULE.format(name)).open_tracker(config, epoch, resumes)
        except Exception as error:
            raise ConfigError(
                f"tracker: {name} cannot be opened ({type(error).__name__}: {error}). Check its settings, or pass "
                "another tracker."
            ) from error
        group.trackers[name] = tracker
    try:
        yield group
    except BaseException:
        group.finish(failed=True)
        raise
    group.finish(failed=False)


def saved_id(config: Config, name: str, new: str = "") -> str:
    """The id of a run in a tracker, as saved in its folder, or empty; `new` is saved."""
    path = config.run_dir / IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    if new:
        path.write_text(json.dumps({**ids, name: new}) + "\n")
    return new or ids.get(name, "")


def group_scalars(entry: dict[str, Any], config: Config) -> dict[str, float]:
    """An epoch's numbers, named train/..., val/... and run/...; those of classes by the score and the class."""
    scalars = {}
    for name, value in entry.items():
        part, _, rest = name.partition("_")
        if isinstance(value, list):
            scores = zip(config.classes, value, strict=True)
            scalars.update({f"{rest}/{item.name}": score for item, score in scores if score is not None})
        elif name != "epoch":
            scalars[f"{part}/{rest}" if part in ("train", "val") else f"run/{name}"] = value
    return scalars


def _names(config: Config) -> list[str]:
    names: list[str] = [config.tracker] if config.tracker else []
    return names + ["tensorboard"] * (config.tensorboard and config.tracker != "tensorboard")
