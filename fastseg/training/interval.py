"""Between two steps: stop after a signal, and save `last.pt` every `checkpoint_every_s` seconds."""

import time

import torch

from fastseg.runtime.distributed import all_reduce
from fastseg.training.state import Run, save_last

__all__ = ["stop_or_save"]

AGREE_STEPS = 20  # between the steps at which several ranks agree, for which the host waits for the device


def stop_or_save(run: Run) -> None:
    """Set `run.interrupted` if a rank has received a signal; otherwise start saving `last.pt` if rank 0 finds it due.

    Raises:
        OutputError: the save before this one failed.
    """
    stop, due = run.stop_requested, run.runtime.rank == 0 and _is_due(run)
    if run.runtime.world_size > 1:
        if run.steps_done % AGREE_STEPS:
            return
        flags = torch.tensor([float(stop), float(due)], device=run.runtime.device)
        stop, due = (flag > 0 for flag in all_reduce(flags).tolist())
    run.interrupted = stop
    if due and not stop:
        began = time.perf_counter()
        save_last(run, if_finite=True)
        run.seconds["checkpoints"] += time.perf_counter() - began


def _is_due(run: Run) -> bool:
    every = run.config.checkpoint_every_s
    return every > 0 and time.perf_counter() - run.save_time >= every and not run.checkpoints.is_saving
