"""How many threads decode when nobody says."""

import os

import pytest

from fastseg.runtime.threads import MAX_THREADS, count_threads


@pytest.mark.parametrize(
    ("asked", "cores", "processes", "threads"),
    [
        (0, 16, None, 16),
        (0, 16, "4", 4),
        (0, 2, "4", 1),
        (0, 256, None, MAX_THREADS),
        (100, 2, "4", 100),
        (1, 8, None, 1),
    ],
)
def test_one_a_core_shared_by_the_processes(asked, cores, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert count_threads(asked) == threads
