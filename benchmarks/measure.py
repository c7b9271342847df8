"""How the benchmarks measure: fresh processes in turn, seconds, memory, medians."""

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseg.errors import FastsegError

AfterRun = Callable[[dict[Any, list[Any]], dict[str, str]], None]  # takes what `run_in_turn` returns
FAILURES = (ImportError, OSError, RuntimeError, ValueError, BrokenProcessPool, FastsegError)  # that end one row only


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a spawned process, whose memory and threads are no other run's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_in_turn(
    jobs: dict[Any, Callable[[], Any]],
    repeat: int,
    after_run: AfterRun = lambda runs, missing: None,
) -> tuple[dict[Any, list[Any]], dict[str, str]]:
    """Run the jobs in turn, `repeat` times, so that a disturbance of the machine hits all of them alike.

    Args:
        after_run: called after each run with what is returned at the end.

    Returns:
        The results of each job, and the reason why a job is missing: one failure removes it.
    """
    runs: dict[Any, list[Any]] = {name: [] for name in jobs}
    missing = {}
    for turn in range(repeat):
        for name in list(runs):
            print(f"{name}: run {turn + 1} of {repeat}", file=sys.stderr)
            try:
                runs[name].append(jobs[name]())
            except FAILURES as error:
                missing[str(name)] = one_line(error)
                del runs[name]
            after_run({name: done for name, done in runs.items() if done}, missing)
    return runs, missing


def one_line(error: BaseException) -> str:
    """The error's type and first line, without the folders of this machine."""
    return re.sub(r"/\S*/", "", f"{type(error).__name__}: {error}".splitlines()[0])[:160]


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(job: Callable[[], Any], device: torch.device, *, warm_up: int = 0, repeat: int = 1) -> list[float]:
    """Seconds of each of `repeat` calls, the device's work included, after `warm_up` calls that do not count."""
    seconds = []
    for _ in range(warm_up + repeat):
        synchronise(device)
        started = time.perf_counter()
        job()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def time_in_turn(jobs: dict[Any, Callable[[], Any]], device: torch.device, repeat: int) -> dict[Any, list[float]]:
    """Seconds of each job, `repeat` times after one warm-up call; the jobs take turns."""
    for job in jobs.values():
        job()
    seconds: dict[Any, list[float]] = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            seconds[name] += time_calls(job, device)
    return seconds


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def spread(values: Sequence[float]) -> float:
    """Half of the interquartile range."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2


def short(value: float) -> float:
    """Four significant digits: no timing here has more."""
    return float(f"{value:.4g}")


class PeakMemory:
    """The highest resident memory, in MiB, of this process and its workers; a shared page counts once."""

    def __enter__(self) -> "PeakMemory":
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(0.01)
            kib = 0
            for process in ("self", *(child.pid for child in active_children())):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.mib = max(self.mib, kib / 1024)
