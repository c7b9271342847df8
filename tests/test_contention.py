"""Contention for cores: found when another process computes on them, and only then."""

import os
import subprocess
import sys

import pytest

from fastseg.runtime import threads as module
from fastseg.runtime.threads import CoreUse, contention, core_use, warn_about_contention

START = CoreUse(wall=0.0, busy=0.0, own=0.0, cores=2)


@pytest.mark.parametrize(
    ("wall", "busy", "own", "expected"),
    [
        (10, 20, 20, 0),  # alone
        (10, 20, 10, 0.5),  # another program has a core
        (10, 11, 1, 0),  # another program has a core, and this one does not need the other
        (10, 20, 16, 0),  # others take little
        (1, 2, 1, None),  # too early
    ],
)
def test_contention_needs_busy_cores_and_busy_others(monkeypatch, wall, busy, own, expected):
    monkeypatch.setattr(module, "core_use", lambda: CoreUse(wall, busy, own, cores=2))
    assert contention(START) == expected


def test_it_is_logged_with_its_remedy(monkeypatch, caplog):
    monkeypatch.setattr(module, "core_use", lambda: CoreUse(10, 20, 10, cores=2))
    assert warn_about_contention(START)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "50 %" in record.getMessage()
    assert "taskset" in record.getMessage()


def test_a_system_that_does_not_tell_has_none(monkeypatch):
    monkeypatch.setattr(module.psutil, "cpu_times", lambda percpu: [])
    assert core_use() is None
    assert contention(None) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processes that can be held to a core")
def test_a_process_on_the_same_core_is_found():
    """In a process of its own, held to one core beside a busy loop."""
    core = min(os.sched_getaffinity(0))
    script = (
        f"import os, subprocess, sys, time\nos.sched_setaffinity(0, [{core}])\n"
        "busy = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "from fastseg.runtime.threads import contention, core_use\nstart = core_use()\n"
        "until = time.perf_counter() + 3.5\nwhile time.perf_counter() < until: pass\n"
        "found = contention(start)\nbusy.kill()\nprint(found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) > 0.25, done.stderr
