"""The number of decoding threads, a parallel map with bounded look-ahead, and contention for cores.

Two trainings at once on two cores were measured at a seventh of their speed each, because the threads of one wait at
the end of every layer for a thread whose core the other has.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import psutil

__all__ = [
    "MAX_THREADS",
    "CoreUse",
    "contention",
    "core_use",
    "count_threads",
    "map_ahead",
    "warn_about_contention",
]

MIN_OTHERS, MAX_IDLE = 0.25, 0.1  # shares of the cores' time: others use more than this, and less than that is left
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # guests are part of the user time
MIN_SECONDS = 3.0  # shorter measurements prove nothing
MAX_THREADS = 32  # by default; more have not been measured

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


def count_threads(num_workers: int) -> int:
    """`num_workers`; if that is 0, one thread per core that this process may use.

    Ranks of torchrun on one machine share its cores.
    """
    if num_workers:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MAX_THREADS)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int
) -> Generator[Future[U], None, None]:
    """`map` in the threads of a pool, at most `ahead` items ahead of the caller, so that memory stays bounded.

    Yields:
        One future per item, in order; finished ones without delay. Its `result()` raises what `function` raised.
    """
    pending: deque[Future[U]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > ahead or pending[0].done()):
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:  # the caller may stop early
        for future in pending:
            future.cancel()


class CoreUse(NamedTuple):
    """CPU seconds on the cores that this process may use, since an arbitrary start."""

    wall: float
    busy: float  # over all cores, of all processes
    own: float  # of this process and its finished children
    cores: int


def core_use() -> CoreUse | None:
    """The use of the cores until now; None where the system does not tell it."""
    try:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(psutil.cpu_count() or 1)
        times = psutil.cpu_times(percpu=True)
        busy = sum(seconds for core in cores for name, seconds in times[core]._asdict().items() if name not in NOT_BUSY)
    except (OSError, IndexError, psutil.Error):
        return None
    return CoreUse(time.perf_counter(), busy, sum(os.times()[:4]), len(cores))


def contention(since: CoreUse | None) -> float | None:
    """The share of the cores' time that other programs took, if they took much and little was left.

    Args:
        since: `core_use()` at the beginning of the work.

    Returns:
        The share, from 0.25 to 1; 0 if there is no contention; None if the time was too short to tell.
    """
    now = core_use()
    if since is None or now is None:
        return 0.0
    capacity = (now.wall - since.wall) * now.cores
    if now.wall - since.wall < MIN_SECONDS:
        return None
    busy, own = (now.busy - since.busy) / capacity, (now.own - since.own) / capacity
    return busy - own if busy - own > MIN_OTHERS and 1 - busy < MAX_IDLE else 0.0


def warn_about_contention(since: CoreUse | None) -> bool:
    """Log a warning if other programs compute on the cores of this process; False: too early to tell."""
    share = contention(since)
    if share:
        log.warning(
            "other programs take %.0f %% of this run's cores, which slows it down more than that; stop them, or start "
            "each program on cores of its own, such as taskset -c 0 fastseg train ...",
            100 * share,
        )
    return share is not None
