"""Whether other programs compute on the cores of this process, which slows threads that wait for each other.

Two trainings at once on two cores were measured at a seventh of their speed each, because the threads of one wait at
the end of every layer for a thread whose core the other has.
"""

import logging
import os
import time
from typing import NamedTuple

import psutil

__all__ = ["CoreUse", "contention", "core_use", "warn_about_contention"]

MIN_OTHERS, MAX_IDLE = 0.25, 0.1  # shares of the cores' time: others use more than this, and less than that is left
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # guests are part of the user time
MIN_SECONDS = 3.0  # shorter measurements prove nothing

log = logging.getLogger(__name__)


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
