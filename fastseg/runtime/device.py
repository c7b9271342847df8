"""What the machine decides: device, number format, whether to compile, and which process of a group this is."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fastseg.config import Config
from fastseg.data.cache import user_cache
from fastseg.errors import ConfigError
from fastseg.runtime.distributed import place_in_group, share_of_batch

__all__ = [
    "Runtime",
    "check_compile",
    "choose_compile",
    "choose_device",
    "choose_runtime",
    "cudnn_left_as_it_was",
]

Model = TypeVar("Model", bound=nn.Module)

CODE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps what it compiled; it sets this when it first compiles
USERS_CODE_FOLDER = os.environ.get(CODE_FOLDER, "")

# Steps after which compiling has paid for itself on a GPU. Estimates, not measurements: 40 s of compiling, or 6 s where
# the compiled code is kept, against 20 ms saved a step of the 64-channel network at batch 16.
PAYS_AFTER_COLD, PAYS_AFTER_WARM = 2000, 300

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where and how the network runs."""

    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic; weights stay float32
    rank: int = 0
    world_size: int = 1

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[object]:
        """The context of the forward pass; `cache`: weights are cast once in it, however often they are used."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cache)

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


@contextmanager
def cudnn_left_as_it_was() -> Iterator[None]:
    """Put cuDNN's setting, which is the whole program's, back at the end."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def check_compile(config: Config, runtime: Runtime) -> None:
    """Do nothing where the network can be trained as `config.compile` says.

    Raises:
        ConfigError: CUDA graphs are asked for without a GPU, or of several processes.
    """
    if config.compile == "graphs" and (runtime.device.type != "cuda" or runtime.world_size > 1):
        where = runtime.device.type if runtime.world_size == 1 else f"shared by {runtime.world_size} processes"
        raise ConfigError(f"compile: graphs needs one process on a GPU; the network is on {where}. Use auto.")


def choose_compile(config: Config, runtime: Runtime, steps: int) -> str:
    """How the network runs in `steps` more steps: "on" (torch.compile), "graphs" or "off"; says why.

    What is compiled stays in the user's cache folder, one folder a network, machine and version of torch, which is set
    here: a second run finds it there and needs seconds instead of most of a minute.
    """
    kept = _compiled_code(config, runtime)
    choice, reason = compile_reason(config, runtime.device, steps, warm=any(kept.glob("fxgraph/*")))
    log.info("compile: %s (%s)", choice, reason)
    if choice == "on":
        os.environ[CODE_FOLDER] = str(kept)
    return choice


def compile_reason(config: Config, device: torch.device, steps: int, *, warm: bool) -> tuple[str, str]:
    """What pays, and the sentence that says so; `warm`: this network was compiled here before."""
    if config.compile != "auto":
        return config.compile, "as asked"
    if device.type == "cpu":
        return "off", "on a CPU compiling takes longer than it saves"
    least = PAYS_AFTER_WARM if warm else PAYS_AFTER_COLD
    state = "compiled here before" if warm else "not compiled here before"
    if steps < least:
        return "off", f"{state}: pays from {least} steps on, and {steps} are to do"
    return "on", f"{state}: {steps} steps are to do, and it pays from {least} on"


def _compiled_code(config: Config, runtime: Runtime) -> Path:
    """The folder for what is compiled: the user's own choice, or one whose name tells what the code depends on."""
    if USERS_CODE_FOLDER:
        return Path(USERS_CODE_FOLDER)
    shape = [config.batch_size // runtime.world_size, config.image_height, config.image_width, config.depth]
    parts = [torch.__version__, runtime.describe, config.base_channels, *shape, config.progressive_resizing > 0]
    key = hashlib.sha256(json.dumps(list(map(str, parts))).encode()).hexdigest()[:16]
    return user_cache() / "compiled" / key
