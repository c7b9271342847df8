"""A study of trials that several processes share and that outlives each of them: Optuna's, in a SQLite file.

A process holds a lock on the file of the trial it runs, which the system takes from it when it dies, however it dies.
Whoever asks for a trial next then finds the lock free and the trial unfinished, and queues its values again. All that
changes a study happens under one more lock, so that processes neither exceed the number of trials nor draw alike.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.tuning.search_space import Values, values_as_text

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

__all__ = ["Study", "given_back", "open_study", "storage_errors"]

DATABASE = "study.db"
FIRST_WHOLE = 5  # trials that run to their end before any is measured against them
MAX_DEATHS = 3  # of processes in a trial, before it counts as failed: it may be what kills them
LOCK_SECONDS = 60  # that SQLite waits for another process
# Fields that may change while a study goes on: scores hardly depend on them.
MACHINE = (
    *("out_dir", "name", "load_model", "check_data", "num_workers", "pin_memory", "decoder"),
    *("cache", "cache_dir", "device", "compile"),
)


@dataclass(frozen=True)
class Study:
    """Trials with their values and scores, higher is better, and who may run which."""

    queue: "optuna.Study"
    folder: Path
    seed: int

    def trials(self) -> "list[FrozenTrial]":
        """All trials, by number, those that were given back included."""
        return self.queue.get_trials(deepcopy=False)

    def ended(self) -> "list[FrozenTrial]":
        """The trials that count: complete, ended early or failed, but not given back."""
        trials = self.trials()
        again = given_back(trials)
        return [trial for trial in trials if trial.state.is_finished() and trial.number not in again]

    def claim(self, goal: int) -> "tuple[Trial, IO[bytes]] | None":
        """A trial to run and the lock to hold while it runs; None where `goal` trials have ended or are running."""
        import optuna

        with _locked(self.folder):
            self._take_back_orphans()
            trials = self.trials()
            again = given_back(trials)
            if sum(trial.state.name != "WAITING" and trial.number not in again for trial in trials) >= goal:
                return None
            # Seeded by the number of trials: neither two processes nor two sessions draw the same values.
            self.queue.sampler = optuna.samplers.TPESampler(seed=(self.seed + len(trials)) % 2**32)
            trial = self.queue.ask()
            lock = self._lock_file(trial.number)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return trial, lock

    def end(self, number: int, *, state: str, value: float | None = None) -> None:
        """Note how a trial ended: "COMPLETE" with its score, "PRUNED" or "FAIL"."""
        import optuna

        with _locked(self.folder):
            self.queue.tell(number, value, optuna.trial.TrialState[state])

    def give_back(self, number: int) -> None:
        """Queue the values of a running trial again; it does not count."""
        with _locked(self.folder):
            self._requeue(self.trials()[number], deaths=0)

    def _take_back_orphans(self) -> None:
        """Queue the trials again whose processes have died."""
        for trial in self.trials():
            if trial.state.name != "RUNNING":
                continue
            with self._lock_file(trial.number) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                self._requeue(trial, deaths=1)

    def _requeue(self, trial: "FrozenTrial", deaths: int) -> None:
        import optuna

        deaths += trial.user_attrs.get("deaths", 0)
        # Queued first: if this process dies in between, the next finds it queued and only ends the old one.
        if deaths < MAX_DEATHS and trial.number not in given_back(self.trials()):
            self.queue.enqueue_trial(trial.params, user_attrs={"again": trial.number, "deaths": deaths})
        self.queue.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _lock_file(self, number: int) -> IO[bytes]:
        return _open_lock(self.folder / "trials" / f"{number:04d}")


def given_back(trials: "list[FrozenTrial]") -> set[int]:
    """Numbers of the trials whose values were queued again."""
    return {trial.user_attrs["again"] for trial in trials if "again" in trial.user_attrs}


def open_study(folder: Path, name: str, config: Config, space: dict[str, Values]) -> Study:
    """The study in a folder, made where there is none.

    Args:
        name: of the study; that of the folder if empty.
        config, space: those of the study that is there, but for fields on which scores hardly depend.

    Raises:
        ConfigError: Optuna is not installed, the folder cannot be written, or it holds another study.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("tune: needs Optuna. Install it with pip install 'fastseg-dali[tune]'.") from None
    logging.getLogger("optuna").setLevel(logging.WARNING)
    with _locked(folder), storage_errors(folder):
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder.absolute() / DATABASE}", engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}}
        )
        held = next(iter(optuna.get_all_study_names(storage)), None)
        name = name or held or folder.resolve().name
        if held not in (None, name):
            raise ConfigError(f"out_dir: {folder} holds the study {held}; got {name}. Give another folder.")
        # Not in the first quarter: the learning rate still rises, and Dice says little.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST_WHOLE, n_warmup_steps=config.num_epochs // 4 + 1)
        queue = optuna.create_study(
            storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
        )
        settings = config.model_dump(exclude=set(MACHINE))
        settings = {**settings, **{field: values_as_text(values) for field, values in space.items()}}
        known = queue.user_attrs.get("settings")
        if known is None:
            queue.set_user_attr("settings", settings)
        elif known != settings:
            field = next(field for field in {**settings, **known} if settings.get(field) != known.get(field))
            raise ConfigError(
                f"out_dir: {folder} holds a study with {field} {known.get(field)}; got {settings.get(field)}. "
                "Give the settings it was begun with, or another folder."
            )
    return Study(queue, folder, config.seed)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Say in one sentence that a study's database is damaged or cannot be written."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        reason = getattr(cause, "orig", error)  # SQLite's own words
        raise ConfigError(
            f"{folder / DATABASE}: cannot be used ({reason}). Make room, mend its permissions, or give another folder."
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    with _open_lock(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_lock(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "wb")
    except OSError as error:
        raise ConfigError(f"out_dir: {folder} cannot be written ({error.strerror}). Give another folder.") from None
