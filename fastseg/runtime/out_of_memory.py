"""Out of memory: batches of a forward pass are halved until they fit, and what does not fit ends in one message."""

import gc
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastseg.errors import FastsegError
from fastseg.runtime.device import choose_device
from fastseg.runtime.memory import free_memory

__all__ = [
    "halve_until_it_fits",
    "is_out_of_memory",
    "out_of_memory_error",
    "release_memory",
    "report_out_of_memory",
]

# torch raises OutOfMemoryError for its own allocations on a GPU alone
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN: no algorithm had enough memory
)
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")  # each 1024 of the one before

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA or NumPy means that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def release_memory(error: BaseException) -> None:
    """Free the tensors that a caught error keeps alive, and return unused GPU memory to the driver."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()  # CUDA graphs refer to themselves
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def out_of_memory_error(error: BaseException, device: torch.device, problem: str, remedy: str) -> FastsegError:
    """The error that replaces `error`: the problem, the memory that was asked for and that is free, and the remedy.

    Free memory includes that of the batch that did not fit.
    """
    release_memory(error)
    asked = re.search(rf"allocate ([0-9.]+) ({'|'.join(UNITS)})", str(error))
    needs = f"{_format_bytes(float(asked[1]) * 1024 ** UNITS.index(asked[2]))} were asked for; " if asked else ""
    return FastsegError(f"{problem} ({needs}{_format_bytes(free_memory(device))} are free on {device}). {remedy}.")


@contextmanager
def report_out_of_memory(device: str | torch.device, remedy: str | Callable[[], str]) -> Iterator[None]:
    """Turn every allocation that fails within the block into a FastsegError.

    Args:
        device: as in `Config`.
        remedy: what the user can do, without a full stop; a function is called after the failure.

    Raises:
        FastsegError: an allocation has failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory(error)
        advice = remedy if isinstance(remedy, str) else remedy()
        raise out_of_memory_error(error, choose_device(str(device)), "memory: it is full", advice) from None


def halve_until_it_fits(forward: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that computes `forward` on batches, in parts if a batch does not fit in memory.

    The size that fits is used for later batches, too, and is logged.

    Args:
        forward: images (B, ...) to results (B, ...), each of which depends on its image alone.
        device: where it runs.

    Raises:
        FastsegError: one image does not fit. The function raises it.
    """
    fits = 0  # images per forward pass; 0: any number so far

    def forward_in_parts(images: Tensor) -> Tensor:
        nonlocal fits
        while True:
            size = min(fits or len(images), len(images))
            try:
                if size == len(images):
                    return forward(images)
                return torch.cat([forward(part) for part in images.split(size)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size <= 1:
                    problem = "batch_size: not even one image fits in memory"
                    remedy = "Close other programs that use it, or choose a smaller network or image"
                    raise out_of_memory_error(error, device, problem, remedy) from None
                release_memory(error)
            fits = (size + 1) // 2
            log.info("batch_size: %d images do not fit in memory; the network takes %d at once", size, fits)

    return forward_in_parts


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
