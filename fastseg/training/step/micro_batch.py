"""Batches that do not fit in memory: micro-batches with accumulated gradients, and an estimate of what fits."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.messages import count_of
from fastseg.network.architecture import build_model
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.runtime.memory import free_memory
from fastseg.runtime.out_of_memory import is_out_of_memory, out_of_memory_error, release_memory, report_out_of_memory
from fastseg.training.state import Run

__all__ = ["estimate_batch_size", "fit_micro_batch", "report_training_out_of_memory"]

SMALLER_NETWORK = "Lower base_channels, image_height or image_width"

log = logging.getLogger(__name__)


def fit_micro_batch(run: Run, backward: Callable[[int], Tensor], num_pairs: int) -> Tensor:
    """Compute a batch's gradients with as many pairs per forward pass as fit in memory.

    With `micro_batch=0` the whole batch is tried first. An attempt that fails leaves nothing behind: no gradients, and
    the statistics of batch norm as they were. The size that fits is used for later steps, too.

    Args:
        backward: adds the gradients of the batch's loss to the parameters, in parts of that many pairs, and returns the
            loss.
        num_pairs: size of the batch, on this rank.

    Raises:
        FastsegError: one pair does not fit; or the size is fixed, because `micro_batch` gives it, CUDA graphs are
            captured for it, or other ranks use the same.
    """
    config = run.config
    can_halve = not config.micro_batch and run.compiled != "graphs" and run.runtime.world_size == 1
    while True:
        size = min(config.micro_batch or run.micro_batch or num_pairs, num_pairs)
        restore = _copy_buffers(run.model) if can_halve and size > 1 else None
        try:
            return backward(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.optimizer.zero_grad(set_to_none=True)
            release_memory(error)
            if restore is None:
                raise out_of_memory_error(error, run.runtime.device, *_explain(run, size)) from None
        restore()
        run.micro_batch = (size + 1) // 2
        log.info(
            "micro_batch: %d pairs do not fit in memory; gradients are accumulated over %s at a time",
            *(size, count_of(run.micro_batch, "pair")),
        )


def _copy_buffers(model: nn.Module) -> Callable[[], None]:
    """Copy the statistics of batch norm; returns a function that restores them."""
    buffers = list(model.buffers())
    groups = [[b for b in buffers if b.is_floating_point() == floating] for floating in (True, False)]
    groups = [group for group in groups if group]
    # This comes before every step: one kernel per group on a GPU, where `clone` launches one per buffer.
    copies = [torch._foreach_add(group, 0) for group in groups]

    def restore() -> None:
        for group, copy in zip(groups, copies, strict=True):
            torch._foreach_copy_(group, copy)

    return restore


def _explain(run: Run, size: int) -> tuple[str, str]:
    """The problem and its remedy if `size` pairs do not fit and may not be halved."""
    config = run.config
    if size == 1:
        return "batch_size: not even one pair fits in memory", SMALLER_NETWORK
    can_estimate = config.network == "unet"  # the shapes of other networks are not known without running them
    fits = min(estimate_batch_size(config, run.runtime), size - 1) if can_estimate else size // 2
    field = "micro_batch" if config.micro_batch else "batch_size"
    problem = f"{field}: {size} pairs do not fit in memory" + (f"; by estimate {fits} do" if can_estimate else "")
    if not fits:
        return problem, SMALLER_NETWORK
    if run.compiled == "graphs":
        return problem, f"Use batch_size={fits}, or compile=off, which can split the batch"
    if run.runtime.world_size > 1:
        return problem, f"Use micro_batch={fits}, which counts the pairs of each process"
    return problem, f"Use micro_batch={fits}, or 0 to halve the batch until it fits"


def report_training_out_of_memory(config: Config) -> AbstractContextManager[None]:
    """Turn every allocation that fails within the block, other than a step's, into a FastsegError."""

    def remedy() -> str:
        if config.network != "unet":
            return "Use a lower batch_size, a smaller network, or cache=off"
        fits = estimate_batch_size(config, choose_runtime(config))
        if not fits:
            return f"By estimate not even one pair fits. {SMALLER_NETWORK}"
        return f"By estimate a batch of {fits} fits. Use batch_size={fits} or lower, base_channels, or cache=off"

    return report_out_of_memory(config.device, remedy)


def estimate_batch_size(config: Config, runtime: Runtime) -> int:
    """Estimate how many full-size pairs one forward and backward pass can hold in the memory that is free now.

    A pair needs the activations that autograd saves for the backward pass, and at its peak three more of the largest
    size. On a CPU this is 11 % above the measured peak of the 32-channel network. Gradients, the optimizer's state and
    casts need at most three and a half times the memory of the weights.
    """
    with torch.device("meta"):  # shapes without memory
        model = build_model(config).train()
        pair = torch.empty(1, 3, config.image_height, config.image_width)
    weights = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        logits = model(pair)  # keeps the saved tensors alive, so that no storage's address is used twice
    share = runtime.dtype.itemsize / logits.dtype.itemsize
    needed = share * (sum(saved.values()) + 3 * max(saved.values()))
    return max(int((free_memory(runtime.device) - 3.5 * sum(weights.values())) // needed), 0)
