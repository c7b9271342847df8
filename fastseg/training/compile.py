"""How the network is compiled: torch.compile if the run is long enough, or CUDA graphs of the eager network.

In every step the host launches hundreds of kernels, and a GPU that is faster than that waits for the host. A CUDA graph
is one launch. Capturing it costs a few steps, where compiling costs most of a minute, but its kernels are not fused.
"""

import copy
import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.runtime.device import Runtime
from fastseg.runtime.files import user_cache

__all__ = ["capture_graphs", "check_compile", "choose_compile", "decide_compile", "restore_cudnn_benchmark"]

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps compiled code; torch sets it at its first compilation
USERS_INDUCTOR_CACHE = os.environ.get(INDUCTOR_CACHE, "")

# Steps after which compiling has paid for itself on a GPU. Estimates, not measurements: 40 s of compiling, or 6 s where
# the compiled code is cached, against 20 ms saved per step of the 64-channel network at batch 16.
PAYS_AFTER_COLD, PAYS_AFTER_WARM = 2000, 300

log = logging.getLogger(__name__)


@contextmanager
def restore_cudnn_benchmark() -> Iterator[None]:
    """Restore `cudnn.benchmark`, which is global to the process, at the end of the block."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def check_compile(config: Config, runtime: Runtime) -> None:
    """Test whether the network can be compiled as `config.compile` says.

    Raises:
        ConfigError: CUDA graphs are asked for without a GPU, or with several ranks.
    """
    if config.compile == "graphs" and (runtime.device.type != "cuda" or runtime.world_size > 1):
        where = runtime.device.type if runtime.world_size == 1 else f"shared by {runtime.world_size} processes"
        raise ConfigError(f"compile: graphs needs one process on a GPU; the network is on {where}. Use auto.")


def choose_compile(config: Config, runtime: Runtime, steps: int) -> str:
    """How the network runs for `steps` more steps: "on" (torch.compile), "graphs" or "off". Logs the reason.

    Compiled code is cached in the user's cache folder, in one folder per network, machine and version of torch. A
    second run finds it there and needs seconds instead of most of a minute.
    """
    cache = _inductor_cache(config, runtime)
    choice, reason = decide_compile(config, runtime.device, steps, warm=any(cache.glob("fxgraph/*")))
    log.info("compile: %s (%s)", choice, reason)
    if choice == "on":
        os.environ[INDUCTOR_CACHE] = str(cache)
    return choice


def decide_compile(config: Config, device: torch.device, steps: int, *, warm: bool) -> tuple[str, str]:
    """The decision and its reason. `warm` means that compiled code of this network is cached."""
    if config.compile != "auto":
        return config.compile, "as asked"
    if device.type == "cpu":
        return "off", "on a CPU, compiling takes longer than it saves"
    minimum = PAYS_AFTER_WARM if warm else PAYS_AFTER_COLD
    state = "compiled before" if warm else "not compiled before"
    if steps < minimum:
        return "off", f"{state}: pays from {minimum} steps on, and {steps} remain"
    return "on", f"{state}: {steps} steps remain, and it pays from {minimum} on"


def _inductor_cache(config: Config, runtime: Runtime) -> Path:
    """The folder of compiled code: the user's choice, or one named by a hash of everything the code depends on."""
    if USERS_INDUCTOR_CACHE:
        return Path(USERS_INDUCTOR_CACHE)
    shape = [config.batch_size // runtime.world_size, config.image_height, config.image_width, config.depth]
    parts = [torch.__version__, runtime.description, config.base_channels, *shape, config.progressive_resizing > 0]
    key = hashlib.sha256(json.dumps(list(map(str, parts))).encode()).hexdigest()[:16]
    return user_cache() / "compiled" / key


def capture_graphs(model: nn.Module, runtime: Runtime, shapes: Iterable[tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """Capture the forward and backward pass of a model in training mode, for inputs of these shapes.

    Nothing else may use the GPU meanwhile, so this comes before the loader starts. Weights may change afterwards, but
    only in place.

    Args:
        shapes: (B, C, H, W); inputs are channels last.

    Returns:
        A function that computes `model(x)`; gradients reach the parameters.
    """
    model.train()
    gc.collect()  # GPU memory of earlier runs that is freed during a capture would end it
    before = copy.deepcopy(model.state_dict())
    graphs: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
    # A capture leaves the gradients' nodes on its own stream. torch synchronises them, and would warn about it.
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:  # older versions lack it, and do not warn
        warn(False)
    with torch.cuda.device(runtime.device):
        for shape in shapes:
            x = torch.zeros(shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
            # Each graph must hold its casts of the weights, so autocast may not cache them. The copy shares its
            # tensors with the model; only its `forward` becomes the graph's, so that there can be one per shape.
            with runtime.autocast(cache=False):
                graphs[shape] = torch.cuda.make_graphed_callables(copy.copy(model), (x,))  # type: ignore[assignment]
    model.load_state_dict(before)  # capturing runs the network a few times, which changes the statistics of batch norm
    return lambda x: graphs[tuple(x.shape)](x)
