"""How much memory is free, and how freed memory stays in the process while a CPU trains or predicts.

A step on a CPU allocates and frees its activations: hundreds of blocks of megabytes. By default glibc returns blocks of
that size to the kernel, and the next step maps and zeroes them again, with tens of thousands of page faults.
benchmarks/README.md has the measurement. Source: mallopt(3).
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

__all__ = [
    "free_host_memory",
    "free_memory",
    "restore_default_allocator",
    "retain_freed_memory",
    "set_retaining_allocator",
]

# Versions 2 and 1: limit, usage, and the prefix of the part of it that the kernel frees when memory is short
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
RETAIN = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
# glibc raises its thresholds to these values in a process that frees large blocks, until mallopt fixes them.
DEFAULT = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 2**16}


def free_memory(device: torch.device) -> int:
    """Bytes that other allocations on a device can take; on a GPU without what torch's allocator has reserved."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory() -> int:
    """Bytes that can be allocated without swapping and within a container's limit; 0 if the system does not tell."""
    try:
        free = psutil.virtual_memory().available
    except (OSError, psutil.Error, KeyError, ValueError):  # such as an unreadable /proc/meminfo
        return 0
    for folder, limit, usage, prefix in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left = int(Path(folder, limit).read_text())
            with contextlib.suppress(OSError, ValueError, KeyError):
                statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
                cached = sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                left -= int(Path(folder, usage).read_text()) - cached
            free = min(free, max(left, 1))
    return free


@contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """Retain freed memory within the block if `device` is the CPU; return it to the kernel at the end."""
    if device.type != "cpu":
        yield
        return
    set_retaining_allocator()
    try:
        yield
    finally:
        restore_default_allocator()


def set_retaining_allocator() -> None:
    """Retain freed memory from now on. Does nothing without glibc."""
    _set(RETAIN)


def restore_default_allocator() -> None:
    """Undo `set_retaining_allocator` and return free memory to the kernel."""
    if _set(DEFAULT):
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "mallopt"):
        return False
    assert libc is not None
    for option, value in options.items():
        libc.mallopt(option, value)
    return True
