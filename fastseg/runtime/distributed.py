"""Several processes, one run: `torchrun --nproc-per-node=N -m fastseg train ...`.

Every process takes its slice of each batch; gradients, batch statistics and scores are those of the whole batch, so
N processes compute what one would. torch.distributed does the work; without torchrun nothing here does anything.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastseg.errors import ConfigError

__all__ = [
    "any_process",
    "gather_over_processes",
    "place_in_group",
    "process_group",
    "share_model",
    "sum_over_processes",
]

T = TypeVar("T")


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; nothing for a process on its own.

    Args:
        device: as in `Config`; processes that stay on the CPU talk over gloo, whatever GPUs there are.
    """
    if place_in_group()[1] == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if dist.get_rank() > 0:  # the first process speaks for all
        logging.getLogger("fastseg").setLevel(logging.WARNING)
    try:
        yield
    finally:
        dist.destroy_process_group()


def place_in_group() -> tuple[int, int]:
    """Rank and number of processes, as torchrun gives them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of_batch(batch_size: int, world_size: int) -> int:
    """Pairs that each process takes of a batch.

    Raises:
        ConfigError: the batch cannot be shared equally.
    """
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        raise ConfigError(
            f"batch_size: must be divisible by the {world_size} processes that share it; got {batch_size}. "
            f"Use {below or world_size} or {below + world_size}."
        )
    return batch_size // world_size


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; itself for a process on its own."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_processes(value: T) -> list[T]:
    """The value of every process, by rank, in each of them; none goes on before all have come here."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all must ask at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)).item())


def share_model(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model as this process calls it: gradients and batch statistics are those of all processes."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), device_ids=[device])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _SyncedBatchNorm2d
    return DistributedDataParallel(model)


class _SumWithGradient(torch.autograd.Function):
    """Sum over processes; so is the gradient, because each process's input has a part in every process's output."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0].clone())


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all processes on the CPU, where `nn.SyncBatchNorm` does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = values.numel() / values.shape[1] * dist.get_world_size()
        sums = _SumWithGradient.apply(torch.stack([values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))]))
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp_min(0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        gain = self.weight * torch.rsqrt(variance + self.eps)
        result = values * gain[:, None, None] + (self.bias - mean * gain)[:, None, None]
        return result.to(x.dtype)
