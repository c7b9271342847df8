"""The default number of threads, and the look-ahead of the parallel map."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastseg.runtime.threads import MAX_THREADS, count_threads, map_ahead


@pytest.mark.parametrize(
    ("num_workers", "cores", "ranks", "threads"),
    [
        (0, 16, None, 16),
        (0, 16, "4", 4),
        (0, 2, "4", 1),
        (0, 256, None, MAX_THREADS),
        (100, 2, "4", 100),
        (1, 8, None, 1),
    ],
)
def test_one_thread_per_core_shared_by_the_ranks(num_workers, cores, ranks, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert count_threads(num_workers) == threads


def test_map_keeps_the_order_and_stays_within_its_look_ahead():
    drawn, may_end = [], threading.Event()

    def numbers():
        for number in range(20):
            drawn.append(number)
            yield number

    def square(number):
        assert may_end.wait(60)
        return number * number

    with ThreadPoolExecutor(2) as pool:
        futures = map_ahead(pool, square, numbers(), ahead=4)
        first = next(futures)
        assert drawn == [0, 1, 2, 3, 4]  # nothing is done yet, so only the bound ends the look-ahead
        may_end.set()
        assert [future.result() for future in (first, *futures)] == [number * number for number in range(20)]


def test_map_reports_errors_and_cancels_the_rest_when_closed():
    started, may_end = [], threading.Event()

    def fail(number):
        started.append(number)
        assert may_end.wait(60)
        raise ValueError(f"item {number}")

    with ThreadPoolExecutor(1) as pool:
        futures = map_ahead(pool, fail, range(20), ahead=4)
        first = next(futures)
        futures.close()  # the only thread is busy with the first item
        may_end.set()
        with pytest.raises(ValueError, match="item 0"):
            first.result()
    assert started == [0]
