"""How many threads decode, and a parallel map that stays a few items ahead of its caller."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["MAX_THREADS", "count_threads", "map_ahead"]

MAX_THREADS = 32  # taken by default; whether more would help has not been measured

T = TypeVar("T")
U = TypeVar("U")


def count_threads(num_workers: int) -> int:
    """`num_workers`, or where that is 0 one per core that this process may use.

    Processes that torchrun starts on one machine share its cores.
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
        A future per item, in order; those that are done come at once. Its result raises what `function` raised.
    """
    pending: deque[Future[U]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > ahead or pending[0].done()):
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:  # the caller may leave early
        for future in pending:
            future.cancel()
