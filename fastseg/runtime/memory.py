"""Keep freed memory in the process while a CPU trains or predicts.

A step on a CPU allocates and frees its activations: hundreds of blocks of megabytes. By default glibc returns blocks of
that size to the kernel, and the next step maps and zeroes them again, with tens of thousands of page faults.
benchmarks/README.md has the measurement. Source: mallopt(3).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["restore_default_allocator", "retain_freed_memory", "set_retaining_allocator"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
RETAIN = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
# glibc raises its thresholds to these values in a process that frees large blocks, until mallopt fixes them.
DEFAULT = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 2**16}


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
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    for option, value in options.items():
        libc.mallopt(option, value)
    return True
