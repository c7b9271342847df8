"""Random numbers that depend on a run's seed and step, so that a resumed run draws what it would have drawn."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seeded"]


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device` from `numbers`; afterwards they are as before.

    Args:
        numbers: at least 0, such as the run's seed and the step.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
