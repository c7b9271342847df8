"""Several processes on one study, each on cores of its own.

Threads of two trainings that share cores wait for each other at the end of every layer: two at once on two cores were
measured at 6 pairs/s each, where each alone makes 42, and 23 if each has a core of its own.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from fastseg.errors import ConfigError, FastsegError
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.signals import stop_on_signal
from fastseg.tuning.report import best_trial
from fastseg.tuning.study import Study

__all__ = ["run_processes", "split_cores"]

POLL_S = 0.5  # between looks at the study and the processes

log = logging.getLogger(__name__)


def split_cores(num_processes: int) -> list[list[int]]:
    """Divide the cores that this process may use among others.

    Raises:
        ConfigError: there are fewer cores than processes.
    """
    count = os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(count))
    if not 1 <= num_processes <= len(cores):
        raise ConfigError(f"processes: must be between 1 and {len(cores)}, the number of cores; got {num_processes}.")
    return [part.tolist() for part in np.array_split(cores, num_processes)]


def run_processes(study: Study, search: Mapping[str, str], num_trials: int, num_processes: int) -> bool:
    """Run trials in several processes until `num_trials` of the study have ended; returns True if interrupted before.

    Each process is a `fastseg tune` on the study's folder. Ctrl-C and SIGTERM end all of them after their current step.

    Raises:
        FastsegError: all of them have ended, and trials are left; with the last line that one of them printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        study.config.to_json(config)
        command = [sys.executable, "-m", "fastseg", "tune", "--config", str(config), "--trials", str(num_trials)]
        command += ["--out", str(study.folder), "--study", study.optuna_study.study_name]
        command += [text for field, values in search.items() for text in ("--search", f"{field}={values}")]
        logs = [open(Path(folder) / f"{number}.log", "w+") for number in range(num_processes)]  # noqa: SIM115
        workers = [_start(command, cores, file) for cores, file in zip(split_cores(num_processes), logs, strict=True)]
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)

        try:
            with stop_on_signal(stop), progress_bar() as bar:
                task = bar.add_task("trials", total=num_trials, note="")
                while any(worker.poll() is None for worker in workers):
                    best = best_trial(study)
                    note = f"best Dice {best.value:.4f}" if best else ""
                    bar.update(task, completed=len(study.ended()), note=note)
                    time.sleep(POLL_S)
        finally:
            for worker in workers:
                worker.kill()
            reasons = [_last_line(file) for file in logs]
        if stopped or len(study.ended()) >= num_trials:
            return stopped
        raise FastsegError(f"{study.folder}: all {num_processes} processes ended before the last trial; {reasons[0]}")


def _start(command: list[str], cores: list[int], printed: IO[str]) -> subprocess.Popen[bytes]:
    """Start a process that inherits `cores` from this thread; a session of its own keeps Ctrl-C from it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    can_pin = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if can_pin else set()
    if can_pin:
        os.sched_setaffinity(0, cores)
    try:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=printed, start_new_session=True
        )
    finally:
        if can_pin:
            os.sched_setaffinity(0, before)


def _last_line(printed: IO[str]) -> str:
    with printed:
        printed.seek(0)
        return (printed.read().splitlines() or ["it printed nothing"])[-1]
