"""tune(config, search): many short runs with different settings, and the settings of the best one.

    fastseg.tune({"num_epochs": 10}, {"learning_rate": "1e-5:1e-3:log", "flip": "0,0.5"}, trials=30, out_dir="study")

Optuna chooses the values and ends poor trials early; `out_dir/study.db` (SQLite) stores every trial.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastseg.config import Config, as_config
from fastseg.errors import ConfigError, FastsegError
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.distributed import get_world_size

__all__ = ["TuneResult", "tune"]


@dataclass(frozen=True)
class TuneResult:
    """The results of a study so far."""

    out_dir: Path
    best: Config | None  #: as in best.json; None if interrupted before the first complete trial
    val_dice: float  #: of the best trial, mean over validation images; nan if there is none
    trials: list[dict[str, Any]]  #: one per trial, as in trials.csv
    interrupted: bool  #: by Ctrl-C or SIGTERM; the same call resumes


def tune(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    search: Mapping[str, str],
    *,
    trials: int,
    out_dir: str | os.PathLike[str],
    study: str = "",
    processes: int = 1,
) -> TuneResult:
    """Search for the settings with the highest validation Dice, and write the results to `out_dir`.

    The same call resumes a study after Ctrl-C or kill -9. All processes that are given the same `out_dir` share the
    study: together they end exactly `trials` trials. A trial whose process dies is tried again.

    Args:
        config: the settings that all trials share, as for `train`; must set `num_epochs`.
        search: fields and their values: `low:high`, `low:high:log` or `choice,choice,...`.
        trials: total number of trials in the study, those of earlier calls included.
        out_dir: folder of the study. Trial N trains in `trials/NNNN`, which keeps all files of a run but `last.pt`.
        study: name of the study; the name of the folder if empty. A folder holds one study.
        processes: trials that run at once, each in a process on cores of its own; 1: in this process.

    Returns:
        The best settings and all trials. `out_dir` holds `study.db`, `best.json` (a configuration for `train`),
        `trials.csv`, `history.png` and `parallel.png`.

    Raises:
        ConfigError: Optuna is missing, a field or value cannot be searched, there are fewer cores than processes, or
            the folder holds another study.
        DataError: the data set cannot be used; this uses up no trial.
        FastsegError: no trial has a score, because all failed.

    Source: values by TPE (Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization); a trial ends early if its
    best Dice is below the median of earlier trials at that epoch (Golovin et al. 2017, Google Vizier).
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tune: needs Optuna. Install it with pip install 'fastseg-dali[tune]'.")
    from fastseg.training.setup import choose_batch_size
    from fastseg.tuning.processes import run_processes, split_cores
    from fastseg.tuning.report import best_trial, draw_study, trial_rows, write_best, write_trials
    from fastseg.tuning.search_space import choices_or_bounds, parse_search
    from fastseg.tuning.study import open_study, storage_errors
    from fastseg.tuning.worker import run_trials

    config, folder = as_config(config), Path(out_dir)
    if "num_epochs" not in config.model_fields_set:
        raise ConfigError("num_epochs: must be given, because trials are compared epoch by epoch. Set it, such as 10.")
    if config.time_budget:
        raise ConfigError("time_budget: must be 0 in a study, whose trials have equally many steps. Set num_epochs.")
    if trials < 1:
        raise ConfigError(f"trials: must be at least 1; got {trials}.")
    if get_world_size() > 1:
        raise ConfigError("tune: must not be started by torchrun. Start it several times with the same folder instead.")
    split_cores(processes)  # raises if there are too few
    space = parse_search(config, search)
    if not config.batch_size:  # that of this machine, for every process of the study, on whatever machine
        config = config.replace(batch_size=choose_batch_size(config, choose_runtime(config), None))
    for field, distribution in space.items():
        for value in choices_or_bounds(distribution):
            choose_runtime(config.replace(**{field: value}))  # raises if this machine does not support the value
    opened = open_study(folder, study, config, space)
    with storage_errors(folder):
        if processes == 1:
            interrupted = run_trials(opened, trials)
        else:
            interrupted = run_processes(opened, search, trials, processes)
        write_trials(opened)
        rows, best = trial_rows(opened), best_trial(opened)
        if best is not None:
            draw_study(opened)
        elif not interrupted:
            reason = next(row["error"] for row in rows if row["error"])
            raise FastsegError(f"{folder}: none of {trials} trials has a score; first: {reason}")
        return TuneResult(
            out_dir=folder,
            best=write_best(opened),
            val_dice=math.nan if best is None else best.values[0],
            trials=rows,
            interrupted=interrupted,
        )
