"""tune(config, search): many short runs with different settings, and the settings of the best of them.

    fastseg.tune({"num_epochs": 10}, {"learning_rate": "1e-5:1e-3:log", "flip": "0,0.5"}, trials=30, out_dir="study")

Optuna proposes the settings and ends hopeless trials early; `out_dir/study.db` (SQLite) remembers every trial. Any
number of processes may work on one study. Each holds a lock on the trials it runs, which the system takes from it when
it dies, however it dies: the next process to look then tries those trials again.
"""

import gc
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastseg.config import Config, as_config
from fastseg.errors import CheckpointError, ConfigError, DataError, FastsegError
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.distributed import get_world_size
from fastseg.runtime.progress import progress_bar
from fastseg.training.loop import train
from fastseg.tuning.report import best_trial, draw_study, short_text, trial_rows, write_best, write_trials
from fastseg.tuning.search_space import Range, Values, read_search
from fastseg.tuning.study import Study, open_study, storage_errors

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["TuneResult", "tune"]

POLL_SECONDS = 0.5  # between looks at trials that other processes are running

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneResult:
    """What a study has found so far; `best` is None where it was interrupted before a trial had a score."""

    out_dir: Path
    best: Config | None  # as in best.json
    val_dice: float  # of the best trial, mean over validation images; nan where there is none
    trials: list[dict[str, Any]]  # one a trial, as in trials.csv
    interrupted: bool  # by Ctrl-C or SIGTERM; the same call goes on


def tune(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    search: Mapping[str, str],
    *,
    trials: int,
    out_dir: str | os.PathLike[str],
    study: str = "",
) -> TuneResult:
    """Search for the settings with the highest validation Dice; writes `out_dir`.

    A study goes on where it stopped, after Ctrl-C or kill -9, and is shared by all processes that are given the same
    `out_dir`: together they end exactly `trials` trials. One whose process died is tried again.

    Args:
        config: what the trials have in common, as for `train`; it must set `num_epochs`.
        search: fields to vary and their values: `low:high`, `low:high:log` or `choice,choice,...`.
        trials: number of trials that the study shall have, earlier ones included.
        out_dir: folder of the study; its trials go to `trials/NNNN`, as `train` leaves a run but for `last.pt`.
        study: its name; that of the folder if empty. A folder holds one study.

    Returns:
        The best settings and all trials. `out_dir` holds `study.db`, `best.json` (a configuration for `train`),
        `trials.csv`, `history.png` and `parallel.png`.

    Raises:
        ConfigError: Optuna is missing, a field or value cannot be searched, or the folder holds another study.
        DataError: the data set cannot be used; no trial is used up.
        FastsegError: not one trial ended with a score.

    Source: values by TPE (Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization); a trial ends early where
    its best Dice is below the median of earlier trials at that epoch (Golovin et al. 2017, Google Vizier).
    """
    config, folder = as_config(config), Path(out_dir)
    if "num_epochs" not in config.model_fields_set:
        raise ConfigError("num_epochs: must be given, because trials are compared epoch by epoch. Set it, such as 10.")
    if trials < 1:
        raise ConfigError(f"trials: must be at least 1; got {trials}.")
    if get_world_size() > 1:
        raise ConfigError("tune: must not be started by torchrun; start it several times with the same folder instead.")
    space = read_search(config, search)
    for field, values in space.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            choose_runtime(config.replace(**{field: value}))  # raises where this machine lacks it
    opened = open_study(folder, study, config, space)
    with storage_errors(folder):
        interrupted = _work(opened, config, space, trials)
        return _finish(opened, config, space, interrupted)


def _work(study: Study, config: Config, space: dict[str, Values], goal: int) -> bool:
    """Run trials until the study has enough; returns whether it was interrupted."""
    with progress_bar() as bar:
        task = bar.add_task("trials", total=goal, completed=len(study.ended()), note="")
        while len(study.ended()) < goal:
            claimed = study.claim(goal)
            if claimed is None:  # others run the last trials; should they die, those are tried again here
                time.sleep(POLL_SECONDS)
                bar.update(task, completed=len(study.ended()))
                continue
            trial, lock = claimed
            with lock:
                said = _run(study, trial, config, space)
            write_trials(study, space)
            write_best(study, config)
            bar.stop()  # or the line would be written into the bar
            log.info("trial %d: %s", trial.number, said or "interrupted")
            if not said:
                return True
            best = best_trial(study)
            bar.update(task, completed=len(study.ended()), note=f"best Dice {best.value:.4f}" if best else "")
            bar.start()
    return False


def _run(study: Study, trial: "Trial", common: Config, space: dict[str, Values]) -> str:
    """Train with a trial's values and tell the study; returns how it went, or nothing where it was interrupted."""
    place = {"out_dir": study.folder / "trials", "name": f"{trial.number:04d}", "load_model": False}
    config = common.replace(**_draw_values(trial, space), **place)
    drawn = ", ".join(f"{field} {short_text(value)}" for field, value in trial.params.items())
    pruned = False

    def after_epoch(entry: dict[str, Any]) -> bool:
        nonlocal pruned
        trial.report(entry["val_dice"], entry["epoch"])
        pruned = entry["epoch"] < config.num_epochs and trial.should_prune()
        return pruned

    try:
        with _quiet():
            result = train(config, after_epoch=after_epoch)
    except (ConfigError, DataError, CheckpointError):  # the data or this machine, whatever the values
        study.give_back(trial.number)
        raise
    except (FastsegError, torch.OutOfMemoryError) as error:
        sentence = str(error).partition("\n")[0]
        trial.set_user_attr("error", sentence)
        study.end(trial.number, state="FAIL")
        return f"failed ({drawn}): {sentence}"
    finally:
        (config.run_dir / "last.pt").unlink(missing_ok=True)  # three times the weights, and nothing goes on from it
        gc.collect()  # a run holds itself in cycles: its network and decoded pairs would stay beside the next one's
    if result.interrupted:
        study.give_back(trial.number)
        return ""
    for name in ("best_epoch", "val_iou", "seconds"):
        trial.set_user_attr(name, getattr(result, name))
    if pruned:
        study.end(trial.number, state="PRUNED")
        return (
            f"ended after epoch {len(result.history)} with Dice {result.val_dice:.4f}, {result.seconds:.0f} s; {drawn}"
        )
    study.end(trial.number, state="COMPLETE", value=result.val_dice)
    return f"Dice {result.val_dice:.4f}, {result.seconds:.0f} s; {drawn}"


def _draw_values(trial: "Trial", space: dict[str, Values]) -> dict[str, Any]:
    """A value of each field that is searched."""
    drawn: dict[str, Any] = {}
    for field, values in space.items():
        if not isinstance(values, Range):
            drawn[field] = trial.suggest_categorical(field, values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            drawn[field] = trial.suggest_int(field, values.low, values.high, log=values.log)
        else:
            drawn[field] = trial.suggest_float(field, values.low, values.high, log=values.log)
    return drawn


def _finish(study: Study, config: Config, space: dict[str, Values], interrupted: bool) -> TuneResult:
    """Write what was found; pictures only where there is a score."""
    rows, best = trial_rows(study, space), best_trial(study)
    if best is None and not interrupted:
        sentence = next(row["error"] for row in rows if row["error"])
        raise FastsegError(
            f"{study.folder}: not one of {len(study.ended())} trials ended with a score; first: {sentence}"
        )
    if best is not None:
        draw_study(study, space)
    return TuneResult(
        out_dir=study.folder,
        best=write_best(study, config),
        val_dice=best.value if best and best.value is not None else math.nan,
        trials=rows,
        interrupted=interrupted,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """A trial says no more than its line; what it says otherwise is in its folder."""
    package = logging.getLogger("fastseg")
    before = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(before)
