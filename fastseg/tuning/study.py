"""An Optuna study in a SQLite file, which any number of processes share and which survives the death of any of them.

Each process holds a file lock on its trial; the system releases the lock when the process dies. Optuna's heartbeat
would notice a death only after a grace period, and would mistake a paused process for a dead one. A lock on the folder
makes counting the trials and starting one a single step; processes that share a `MaxTrialsCallback` start too many.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from fastseg.config import Config
from fastseg.errors import ConfigError, OutputError
from fastseg.tuning.search_space import Distribution, format_distribution

__all__ = ["MAX_DEATHS", "Study", "open_study", "requeued_numbers", "storage_errors"]

DATABASE = "study.db"
SQLITE_TIMEOUT_S = 60  # how long SQLite waits while another process writes
NUM_UNPRUNED = 5  # trials that must complete before a trial can end early
MAX_DEATHS = 3  # a trial fails when it has been killed this often: it may itself be the cause
STUDY_ATTRIBUTES: dict[str, Any] = {"settings": dict}
TRIAL_ATTRIBUTES: dict[str, Any] = {
    **dict.fromkeys(("deaths", "retry_of", "best_epoch"), int),
    **dict.fromkeys(("seconds", "val_iou"), (int, float)),
    "error": str,
}
# Fields that may change when a study is resumed: they hardly affect the scores.
MACHINE_FIELDS = (
    *("out_dir", "name", "load_model", "check_data", "num_workers", "pin_memory", "decoder"),
    *("cache", "cache_dir", "device", "compile"),
)


@dataclass(frozen=True)
class Study:
    """Trials, their values and their scores (validation Dice), stored in a folder."""

    optuna_study: optuna.Study
    folder: Path
    config: Config  # the settings that all trials share
    space: dict[str, Distribution]

    def trials(self) -> list[FrozenTrial]:
        """All trials in order of their number, requeued ones included."""
        return self.optuna_study.get_trials(deepcopy=False)

    def counted(self) -> list[FrozenTrial]:
        """The trials that count towards the number asked for: waiting and requeued ones do not."""
        trials = self.trials()
        requeued = requeued_numbers(trials)
        return [trial for trial in trials if trial.state != TrialState.WAITING and trial.number not in requeued]

    def ended(self) -> list[FrozenTrial]:
        """The counted trials that are complete, ended early or failed."""
        return [trial for trial in self.counted() if trial.state.is_finished()]

    def ask(self, num_trials: int) -> tuple[Trial, AbstractContextManager[object]] | None:
        """Start a trial.

        Returns:
            The trial with its values, and a lock to hold until the trial ends; None if `num_trials` have started.
        """
        with _lock(self.folder):
            self._requeue_dead_trials()
            if len(self.counted()) >= num_trials:
                return None
            # The seed depends on the number of trials, so that no two processes or sessions draw the same values.
            seed = (self.config.seed + len(self.trials())) % 2**32
            self.optuna_study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = self.optuna_study.ask({**self.space})
            return trial, self._lock_trial(trial.number)

    def requeue(self, number: int, *, died: bool = False) -> None:
        """End a running trial without counting it, and try its values again in a new trial."""
        trial = self.trials()[number]
        deaths = trial.user_attrs.get("deaths", 0) + died
        # Optuna's RetryHeartbeatStaleTrialCallback would count interruptions as deaths. The new trial comes first: a
        # process that is killed between the two steps loses nothing.
        if deaths < MAX_DEATHS and number not in requeued_numbers(self.trials()):
            self.optuna_study.enqueue_trial(trial.params, user_attrs={"retry_of": number, "deaths": deaths})
        self.optuna_study.tell(number, state=TrialState.FAIL)

    def _requeue_dead_trials(self) -> None:
        """Requeue the running trials whose lock is free: their process has died."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING:
                with suppress(Timeout), self._lock_trial(trial.number):
                    if self.trials()[trial.number].state == TrialState.RUNNING:  # it may have ended meanwhile
                        self.requeue(trial.number, died=True)

    def _lock_trial(self, number: int) -> AbstractContextManager[object]:
        return _lock(self.folder / "trials" / f"{number:04d}", wait=False)


def requeued_numbers(trials: list[FrozenTrial]) -> set[int]:
    """Numbers of the interrupted or killed trials whose values are tried again in another of the trials."""
    return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}


def open_study(folder: Path, name: str, config: Config, space: dict[str, Distribution]) -> Study:
    """Open the study in a folder, or create it.

    Args:
        name: of the study; empty for the name of the existing study, or of the folder.
        config, space: must be those of the existing study, except for `MACHINE_FIELDS`.

    Raises:
        ConfigError: the folder holds another study, or a damaged one.
        OutputError: the folder cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _lock(folder), storage_errors(folder):
        url = f"sqlite:///{folder.absolute() / DATABASE}"
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": SQLITE_TIMEOUT_S}})
        existing = next(iter(optuna.get_all_study_names(storage)), None)
        name = name or existing or folder.resolve().name
        if existing not in (None, name):
            raise ConfigError(f"out_dir: {folder} holds the study {existing}; got {name}. Give another folder.")
        # Dice means little in the first quarter of a run, while the learning rate rises.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=NUM_UNPRUNED, n_warmup_steps=config.num_epochs // 4 + 1)
        study = optuna.create_study(
            storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
        )
        settings = config.model_dump(mode="json", exclude=set(MACHINE_FIELDS))
        settings |= {field: format_distribution(distribution) for field, distribution in space.items()}
        _check_attributes(study, folder)
        stored = study.user_attrs.get("settings")
        if stored is None:
            study.set_user_attr("settings", settings)
        elif stored != settings:
            field = next(field for field in {**settings, **stored} if settings.get(field) != stored.get(field))
            raise ConfigError(
                f"out_dir: {folder} holds a study with {field} {stored.get(field)}; got {settings.get(field)}. "
                "Give the settings of that study, or another folder."
            )
    return Study(study, folder, config, space)


def _check_attributes(study: optuna.Study, folder: Path) -> None:
    """ConfigError if an attribute has another type than fastseg writes: somebody has changed the database."""
    places = [(study.user_attrs, STUDY_ATTRIBUTES)]
    places += [(trial.user_attrs, TRIAL_ATTRIBUTES) for trial in study.get_trials(deepcopy=False)]
    for attributes, types in places:
        for name, value in attributes.items():
            if name in types and not isinstance(value, types[name]):
                raise ConfigError(f"{folder / DATABASE}: is damaged (its {name} is {value!r}). Use another folder.")


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of an unwritable database into an `OutputError`, of a damaged one into a `ConfigError`."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        reason = getattr(cause, "orig", error)  # SQLite's own error
        if isinstance(reason, sqlite3.OperationalError):
            raise OutputError(folder / DATABASE, OSError(errno.EIO, str(reason))) from None
        raise ConfigError(f"{folder / DATABASE}: is damaged ({reason}). Use another folder.") from None


def _lock(folder: Path, *, wait: bool = True) -> AbstractContextManager[object]:
    """Lock a folder until the returned context ends; raises Timeout if it is locked and `wait` is False."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock", thread_local=False).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise
    except OSError as error:
        raise OutputError(folder, error) from None
