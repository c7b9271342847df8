"""How many threads decode."""

import os

__all__ = ["MOST_THREADS", "count_threads"]

MOST_THREADS = 32  # that are taken without being asked for; whether more would help has not been measured


def count_threads(num_workers: int) -> int:
    """`num_workers`, or where that is 0 one a core that this process may use; torchrun's processes share the cores."""
    if num_workers:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MOST_THREADS)
