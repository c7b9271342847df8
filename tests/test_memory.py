"""Freed memory stays in the process; page faults are counted by the kernel, in a new process for each case."""

import ctypes
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from pathlib import Path
import torch
from fastseg.runtime.memory import retain_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide most page faults

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(2**25 + 1, dtype=torch.uint8) for _ in range(4)]  # 128 MiB, above glibc's threshold
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = resident_mib()
with retain_freed_memory(torch.device(sys.argv[1])):
    steps()
    faults, held = steps(), resident_mib() - start
print(faults, held, resident_mib() - start)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_retained_in_the_block_and_returned_after_it():
    def faults_and_mib(device):
        done = subprocess.run([sys.executable, "-c", PROGRAM, device], capture_output=True, text=True, check=True)
        return [float(value) for value in done.stdout.split()]

    retaining, held, left = faults_and_mib("cpu")
    default, _, _ = faults_and_mib("cuda")
    pages = 10 * 2**27 / resource.getpagesize()
    assert retaining < 0.01 * pages < 0.5 * pages < default
    assert held > 100
    assert left < 20
