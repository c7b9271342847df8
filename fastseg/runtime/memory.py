"""Freed memory is kept for the next step while a CPU trains or predicts.

A step on a CPU allocates its activations and frees them, hundreds of blocks of megabytes. glibc gives blocks of that
size back to the kernel at once, and the next step gets them anew: zeroed, page by page, tens of thousands of page
faults a step. Kept, they are there. benchmarks/README.md says what that is worth. Source: mallopt(3).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["freed_memory_kept", "give_back_memory", "keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
# Where glibc's own thresholds arrive in a process that frees large blocks; once set, they no longer move by themselves.
GIVE_BACK = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 2**16}


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory in this process, if it computes on the CPU; at the end all of it goes back."""
    if device.type != "cpu":
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        give_back_memory()


def keep_freed_memory() -> None:
    """From now on; does nothing where the C library is not glibc."""
    _set(KEEP)


def give_back_memory() -> None:
    """Undo `keep_freed_memory`, and give what is free now back to the kernel."""
    if _set(GIVE_BACK):
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    for option, value in options.items():
        libc.mallopt(option, value)
    return True
