"""A worker: one of the processes that run the trials of a study."""

import gc
import logging
import time
from typing import Any

import torch
from optuna.trial import Trial, TrialState

from fastseg.errors import CheckpointError, ConfigError, DataError, FastsegError, OutputError
from fastseg.runtime.progress import progress_bar
from fastseg.training.loop import train
from fastseg.tuning.report import best_trial, short_text, write_best, write_trials
from fastseg.tuning.study import Study

__all__ = ["run_trials"]

POLL_S = 0.5  # between checks of the trials that other processes run

log = logging.getLogger(__name__)


def run_trials(study: Study, num_trials: int) -> bool:
    """Run trials until `num_trials` of the study have ended; returns True if interrupted before."""
    with progress_bar() as bar:
        task = bar.add_task("trials", total=num_trials, completed=len(study.ended()), note="")
        while len(study.ended()) < num_trials:
            # `optuna.Study.optimize` starts its trials outside of any lock, so it cannot run an exact number.
            started = study.ask(num_trials)
            if started is None:  # other processes run the last trials; if one dies, this process runs its trial
                time.sleep(POLL_S)
                bar.update(task, completed=len(study.ended()))
                continue
            trial, lock = started
            with lock:
                message = _run_trial(study, trial)
            write_trials(study)
            write_best(study)
            bar.stop()  # a log line would break the bar
            log.info("trial %d: %s", trial.number, message or "interrupted")
            if not message:
                return True
            best = best_trial(study)
            bar.update(task, completed=len(study.ended()), note=f"best Dice {best.value:.4f}" if best else "")
            bar.start()
    return False


def _run_trial(study: Study, trial: Trial) -> str:
    """Train with the values of a trial and store how it ended; returns a message, empty if interrupted."""
    run = {"out_dir": study.folder / "trials", "name": f"{trial.number:04d}", "load_model": False, "refiner_steps": 0}
    config = study.config.replace(**trial.params, **run)
    values = ", ".join(f"{field} {short_text(value)}" for field, value in trial.params.items())
    pruned = False

    def after_epoch(entry: dict[str, Any]) -> bool:
        nonlocal pruned
        trial.report(entry["val_dice"], entry["epoch"])
        pruned = entry["epoch"] < config.num_epochs and trial.should_prune()
        return pruned

    logger = logging.getLogger("fastseg")
    level = logger.level
    logger.setLevel(logging.WARNING)  # one line per trial; the folder of the trial holds the rest
    try:
        result = train(config, after_epoch=after_epoch)
    except (
        ConfigError,
        DataError,
        CheckpointError,
        OutputError,
    ):  # the cause is the data or the machine, not the values
        study.requeue(trial.number)
        raise
    except (FastsegError, torch.OutOfMemoryError) as error:
        reason = str(error).partition("\n")[0]
        trial.set_user_attr("error", reason)
        study.optuna_study.tell(trial, state=TrialState.FAIL)
        return f"failed ({values}): {reason}"
    finally:
        logger.setLevel(level)
        (config.run_dir / "last.pt").unlink(missing_ok=True)  # three times the weights' size; unused
        gc.collect()  # reference cycles would keep the network and the decoded pairs in memory during the next trial
    if result.interrupted:
        study.requeue(trial.number)
        return ""
    for name in ("best_epoch", "val_iou", "seconds"):
        trial.set_user_attr(name, getattr(result, name))
    summary = f"Dice {result.val_dice:.4f}, {result.seconds:.0f} s; {values}"
    if pruned:
        study.optuna_study.tell(trial, state=TrialState.PRUNED)
        return f"ended early, after epoch {len(result.history)}, {summary}"
    study.optuna_study.tell(trial, result.val_dice)
    return summary
