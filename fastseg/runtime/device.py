"""The device, its random numbers, the dtype of the network's arithmetic, and the versions of packages."""

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fastseg import __version__
from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.messages import count_of
from fastseg.runtime.distributed import get_rank, get_world_size, local_batch_size

__all__ = [
    "Runtime",
    "choose_device",
    "choose_inference_runtime",
    "choose_runtime",
    "default_batch_size",
    "seeded",
    "versions",
]

Model = TypeVar("Model", bound=nn.Module)

PACKAGES = ("torch", "nvidia-dali-cuda120", "kornia", "numba", "numpy", "simplejpeg", "pillow")


@dataclass(frozen=True)
class Runtime:
    """Where the network runs, and in which dtype."""

    device: torch.device
    dtype: torch.dtype  # of autocast; weights stay float32
    rank: int = 0
    world_size: int = 1

    @property
    def rank_slice(self) -> slice:
        """This rank's images of a whole batch."""
        return slice(self.rank, None, self.world_size)

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[object]:
        """The context of the forward pass. With `cache`, each weight is cast once per context."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cache)

    def to_device(self, model: Model) -> Model:
        """Move a model to the device, with channels-last weights."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def description(self) -> str:
        """For logs and results, such as "NVIDIA H100 80GB HBM3, bf16" or "CPU, 2 threads, fp32"."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {short}"
        if self.device.type == "mps":
            return f"Apple GPU, {short}"
        return f"CPU, {count_of(torch.get_num_threads(), 'thread')}, {short}"


def choose_runtime(config: Config) -> Runtime:
    """The device, the dtype and the ranks of a configuration on this machine.

    Raises:
        ConfigError: the machine lacks the device or the dtype, or the ranks cannot share the batch.
    """
    device = choose_device(config.device)
    local_batch_size(config.batch_size, get_world_size())
    return Runtime(device, _choose_dtype(config.precision, device), get_rank(), get_world_size())


def default_batch_size(device: torch.device) -> int:
    """What a `batch_size` of 0 means on a device.

    On a CPU the same pairs in batches of 8 take little longer than in batches of 16, and are twice the steps. On a
    GPU that has not been measured.
    """
    return 8 if device.type == "cpu" else 16


def choose_inference_runtime(trained: Config, changes: dict[str, Any]) -> tuple[Runtime, Config]:
    """The device for a trained network, and its configuration there.

    Args:
        trained: the configuration of the training. Its device and precision may be of another machine; `compile` and
            `micro_batch`, which are not used, might not fit another `batch_size`.
        changes: fields that differ. `batch_size` counts the photos of one process; 0 is the device's default.

    Raises:
        ConfigError: a change is not valid, or the machine lacks the device or the dtype.
    """
    kept = trained.model_dump(exclude={"device", "precision", "compile", "micro_batch"})
    config = Config(**{**kept, **changes})
    runtime = choose_runtime(config.replace(batch_size=config.batch_size * get_world_size()))
    return runtime, config.replace(batch_size=config.batch_size or default_batch_size(runtime.device))


def choose_device(name: str) -> torch.device:
    """The torch device that `Config.device` names.

    Raises:
        ConfigError: this machine lacks that GPU.
    """
    # "auto" takes no Apple GPU: nobody has measured one.
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: mps needs an Apple GPU; torch finds none here. Use auto or cpu.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"device: {name} needs an NVIDIA GPU; torch finds none here. Use auto or cpu.")
        if (device.index or 0) >= count:
            raise ConfigError(f"device: {name} does not exist; torch finds {count} GPUs. Use cuda:{count - 1} or auto.")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if precision == "fp16":
            raise ConfigError("precision: fp16 needs a GPU; the device is cpu. Use auto, bf16 or fp32.")
        fast_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast_bf16) else torch.float32
    if device.type == "mps":
        if precision in ("bf16", "fp16"):
            raise ConfigError(f"precision: {precision} has not been tried on mps. Use auto or fp32.")
        return torch.float32
    if precision == "auto":
        with torch.cuda.device(device):  # torch asks the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine speed; "absent" for a package that is not installed."""
    found = {"python": platform.python_version(), "fastseg": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


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
