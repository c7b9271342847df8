"""One run on several ranks: `torchrun --nproc-per-node=N -m fastseg train ...`.

Each rank takes its slice of every batch. Gradients, batch statistics and scores are those of the whole batch, so N
ranks compute the same as one process. Without torchrun, the functions below do nothing.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastseg.errors import ConfigError, FastsegError

__all__ = [
    "all_gather",
    "all_reduce",
    "any_rank",
    "barrier",
    "fail_together",
    "count_on_store",
    "from_local_leader",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "is_group_of",
    "local_batch_size",
    "process_group",
    "wrap_ddp",
]

TIMEOUT = timedelta(days=7)  # of a rank that waits: rank 0 may train an outline refiner for hours

log = logging.getLogger(__name__)

T = TypeVar("T")

_wrapped: list[DistributedDataParallel] = []  # by wrap_ddp, within the block of process_group


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the process group of torchrun for the duration of the block; do nothing in a single process.

    Only rank 0 logs more than warnings.

    Args:
        device: as in `Config`. Ranks on the CPU communicate over gloo, ranks on GPUs over NCCL.

    Raises:
        FastsegError: another rank has ended within the block.
    """
    wrapped_before = len(_wrapped)
    if get_world_size() == 1 or dist.is_initialized():
        try:
            yield
        finally:
            _release_reducers(wrapped_before)
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _check_gpus(device)
        torch.cuda.set_device(device if ":" in device else get_local_rank())
    store, rank, world_size = _join_store()
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
    if dist.get_rank() > 0:
        logging.getLogger("fastseg").setLevel(logging.WARNING)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise FastsegError(
            f"torchrun: another process of this run has ended, or cannot be reached, so this one ends too ({reason})."
        ) from None
    finally:
        _release_reducers(wrapped_before)
        dist.destroy_process_group()


def _check_gpus(device: str) -> None:
    """ConfigError if ranks would share a GPU, which NCCL refuses."""
    count = torch.cuda.device_count()
    if get_local_rank() >= count:
        raise ConfigError(
            f"device: each process of a machine needs a GPU of its own; process {get_local_rank() + 1} finds {count}. "
            f"Pass --nproc-per-node={count} to torchrun, or --device cpu."
        )
    if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"device: must be auto or cuda for several processes of a machine; got {device}.")


def _release_reducers(start: int) -> None:
    """Let Python hold the last reference to the process group; `start` counts the models of blocks around this one.

    Python releases its lock while it destroys the group. A reducer does not, so that it can wait forever for gloo's
    thread, which needs Python's lock to free the tensors of the last collective.
    """
    for model in _wrapped[start:]:
        del model.reducer, model.logger
    del _wrapped[start:]


def _join_store() -> tuple[dist.Store, int, int]:
    """torchrun's store with keys of this start alone, the rank, and the number of ranks.

    torchrun keeps its store when it restarts ranks. In it they would find the addresses of those that have been killed,
    and would wait for them. So each rank writes a token and reads those of all, until all have read the same: then
    each is of this start, and the keys begin with all of them.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    store.set(f"fastseg/token/{rank}", uuid.uuid4().hex)
    while True:
        tokens = b"".join(store.get(f"fastseg/token/{other}") for other in range(world_size))
        store.set(f"fastseg/read/{rank}", tokens)
        if all(store.get(f"fastseg/read/{other}") == tokens for other in range(world_size)):
            return dist.PrefixStore(tokens.decode(), store), rank, world_size
        time.sleep(0.01)


def get_rank() -> int:
    """Rank of this process as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Number of processes as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_rank() -> int:
    """Rank of this process among those of its machine as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_group_of(world_size: int) -> bool:
    """Whether this process has joined a group of that size, of more than one process."""
    return world_size > 1 and dist.is_initialized() and dist.get_world_size() == world_size


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Pairs of a batch that each rank takes.

    Raises:
        ConfigError: the batch does not divide by the number of ranks.
    """
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        raise ConfigError(
            f"batch_size: must be divisible by the {world_size} processes that share it; got {batch_size}. "
            f"Use {below or world_size} or {below + world_size}."
        )
    return batch_size // world_size


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: T) -> list[T]:
    """The value of every rank, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_local_leader(value: T) -> T:
    """The value of the first process of this machine, or without torchrun this process's own. All ranks call this."""
    if "LOCAL_RANK" not in os.environ:
        all_gather(None)
        return value
    machine = os.environ.get("GROUP_RANK", "0")
    leaders = {node: given for node, local, given in all_gather((machine, get_local_rank(), value)) if local == 0}
    return leaders[machine]


def count_on_store(key: str) -> int:
    """How often this has been called before with that key, in any rank. No rank waits for another."""
    return int(dist.distributed_c10d._get_default_store().add(key, 1)) - 1


def barrier() -> None:
    """Wait until every rank has called this."""
    all_gather(None)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any rank. All ranks must call this at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(all_reduce(torch.tensor(float(flag), device=device)).item())


@contextmanager
def fail_together(device: torch.device) -> Iterator[None]:
    """Let a block without communication fail in every rank if it fails in one, so that no rank waits for another.

    Raises:
        FastsegError: the block has failed in another rank, which raises the error itself.
    """
    try:
        yield
    except Exception:
        any_rank(True, device)
        raise
    if any_rank(False, device):
        raise FastsegError("torchrun: another process has met an error, which it reports. Correct its cause.")


def wrap_ddp(
    model: nn.Module, device: torch.device, *, may_skip_parameters: bool = False
) -> Callable[[Tensor], Tensor]:
    """The model with gradients and batch statistics shared by all ranks; the model itself in a single process.

    Args:
        may_skip_parameters: the model may have parameters that its output does not depend on; takes time to find out.
    """
    if not dist.is_initialized():
        return model
    # A subclass may do more than normalise (timm's applies an activation), so that it cannot be replaced.
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    synced = {name: module for name, module in norms.items() if type(module) is nn.BatchNorm2d and _is_usual(module)}
    if len(synced) < len(norms):
        log.warning("%d batch norms of the network use the statistics of one process", len(norms) - len(synced))
    for name, module in synced.items():
        if device.type == "cuda":
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        else:
            module.__class__ = _SyncedBatchNorm2d
    wrapped = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=may_skip_parameters
    )
    _wrapped.append(wrapped)
    return wrapped


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


class _SumWithGradient(torch.autograd.Function):
    """Sum over ranks. The gradient is summed too: the input of each rank contributes to the output of every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].clone())


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all ranks on the CPU, where `nn.SyncBatchNorm` does not run."""

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
