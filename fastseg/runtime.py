"""What the machine decides: device, number format, whether to compile, and which process of a group this is."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from fastseg.config import Config
from fastseg.distributed import place_in_group, share_of_batch
from fastseg.errors import ConfigError

__all__ = ["Runtime", "choose_compile", "choose_device", "choose_runtime"]

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where and how the network runs."""

    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic; weights stay float32
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, model: Model) -> Model:
        """The model on the device, its convolutions channels-last."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def describe(self) -> str:
        """Such as "NVIDIA H100 80GB HBM3, bf16" or "CPU, 2 threads, fp32"."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {short}"
        return f"CPU, {torch.get_num_threads()} threads, {short}"


def choose_runtime(config: Config) -> Runtime:
    """Device and number format for a configuration on this machine.

    Raises:
        ConfigError: a GPU or a number format is asked for that this machine lacks.
    """
    device = choose_device(config.device)
    rank, world_size = place_in_group()
    share_of_batch(config.batch_size, world_size)
    return Runtime(device, _choose_dtype(config.precision, device), rank, world_size)


def choose_device(name: str) -> torch.device:
    """The device of this machine that `Config.device` names.

    Raises:
        ConfigError: it is a GPU that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"device: {name} needs an NVIDIA GPU, and torch finds none here. Use auto (or cpu).")
        if (device.index or 0) >= count:
            raise ConfigError(f"device: {name} does not exist; {count} GPUs are here. Use cuda:{count - 1} or auto.")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if precision == "fp16":
            raise ConfigError("precision: fp16 needs a GPU; the device is cpu. Use auto, bf16 or fp32.")
        fast_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast_bf16) else torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_compile(config: Config, device: torch.device, steps: int) -> bool:
    """Whether to `torch.compile` the network for a run of `steps` more steps; logs the reason."""
    choice, reason = _compile_reason(config, device, steps)
    log.info("compile: %s (%s)", "on" if choice else "off", reason)
    return choice


def _compile_reason(config: Config, device: torch.device, steps: int) -> tuple[bool, str]:
    if config.compile != "auto":
        return config.compile == "on", "as asked"
    if device.type == "cpu":
        return False, "on a CPU compiling takes longer than it saves"
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if steps < COMPILE_PAYS_AFTER and not cache:
        return False, f"{steps} steps are too few to win back the time it takes; from {COMPILE_PAYS_AFTER} on it pays"
    return True, f"{steps} steps"


# Steps after which compiling has paid for itself on a GPU: an estimate from 40 s of compiling and 20 ms saved a step.
COMPILE_PAYS_AFTER = 2000
