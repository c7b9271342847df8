"""Which decoder `decoder=auto` takes, and with how many threads."""

import importlib.util

from fastseg.runtime.threads import count_threads

__all__ = ["choose_decoder", "count_decoding_threads", "has_dali"]

# On an H100 (benchmarks/results/gpu), training with CUDA graphs gets 1,100 pairs/s from 4 threads, 1,008 from 8 and 728
# from 16, because they compete for the GIL with the thread that launches kernels; from DALI 630.
MAX_THREADS_BESIDE_GPU = 8  # by default
ENOUGH_THREADS = 4  # with as many or more, the host decodes, though a GPU could


def count_decoding_threads(num_workers: int, on_gpu: bool) -> int:
    """`num_workers`; if that is 0, one thread per core, at most 8 beside a GPU."""
    count = count_threads(num_workers)
    return min(count, MAX_THREADS_BESIDE_GPU) if on_gpu and not num_workers else count


def choose_decoder(name: str, on_gpu: bool, num_threads: int) -> tuple[str, str]:
    """The decoder, "host" or "dali", and the reason.

    Args:
        name: as configured: "auto", "host" or "dali".
    """
    if name != "auto":
        return name, "as configured"
    if not on_gpu:
        return "host", "several times as fast as DALI on a CPU"
    if num_threads >= ENOUGH_THREADS:
        return "host", f"{num_threads} threads decode faster than the GPU"
    if has_dali():
        return "dali", f"the GPU decodes faster than {num_threads} threads"
    return "host", "DALI is not installed"


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # its parent package is missing, too
        return False
