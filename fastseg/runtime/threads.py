"""The number of decoding threads, and a parallel map with bounded look-ahead."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["MAX_THREADS", "count_threads", "map_ahead"]

MAX_THREADS = 32  # by default; more have not been measured

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
