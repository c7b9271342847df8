"""How the network runs: eagerly, as CUDA graphs of the eager network, or through torch.compile.

In every step the host launches hundreds of kernels, and a GPU that is faster than that waits for the host. A CUDA graph
is one launch. Capturing it takes as long as a few steps; compiling takes most of a minute, but fuses kernels as well.
"""

import copy
import gc
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.runtime.device import Runtime
from fastseg.runtime.files import user_cache
from fastseg.runtime.out_of_memory import is_out_of_memory, release_memory
from fastseg.training.budget import reserve_seconds, used_seconds
from fastseg.training.recipe import small_share, training_size
from fastseg.training.state import Run

__all__ = [
    "capture_graphs",
    "check_compile",
    "choose_compile",
    "compile_if_it_pays",
    "compile_model",
    "restore_cudnn_benchmark",
    "seconds_of_steps",
]

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps compiled code; torch sets it at its first compilation
USERS_INDUCTOR_CACHE = os.environ.get(INDUCTOR_CACHE, "")

# Measured on an H100 with the 64-channel network (benchmarks/results/gpu): seconds until a network is compiled for one
# image size, without and with its code in the cache, and the share of an uncompiled step that a compiled one saves.
COMPILE_COLD_S, COMPILE_WARM_S, COMPILED_SAVES = 26.0, 10.0, 0.2

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


def choose_compile(config: Config, runtime: Runtime) -> tuple[str, str]:
    """How the network runs from the first step on, "on" (torch.compile), "graphs" or "off", and the reason."""
    if config.compile != "auto":
        return config.compile, "as asked"
    if runtime.device.type == "cpu":
        return "off", "on a CPU, compiling takes longer than it saves"
    if runtime.device.type != "cuda":
        return "off", f"never tried on {runtime.device.type}"
    if runtime.world_size > 1 or config.micro_batch:
        return "off", "CUDA graphs need one process and whole batches"
    if config.network != "unet":  # another network may wait for the device, which no graph can hold
        return "off", "only the UNet is known to fit into CUDA graphs; if enough steps remain, torch.compile"
    return "graphs", "captured in a second; if enough steps remain after an epoch, torch.compile"


def compile_model(run: Run) -> None:
    """Let the network of a run that is about to start run as `config.compile` says; logs the reason."""
    if run.is_finished:
        return
    choice, reason = choose_compile(run.config, run.runtime)
    log.info("compile: %s (%s)", choice, reason)
    if choice == "on":
        _compile(run)
    elif choice == "graphs":
        sizes = [run.size_of(run.steps_done), run.last_size]
        shapes = [(run.config.batch_size, 3, *size) for size in dict.fromkeys(sizes)]
        try:
            run.forward = capture_graphs(run.model, run.runtime, shapes)
        except RuntimeError as error:
            if run.config.compile != "auto" or not is_out_of_memory(error):
                raise
            release_memory(error)
            log.info("compile: off (a graph of %d pairs does not fit in memory)", run.config.batch_size)
            return
    run.compiled = choice


def compile_if_it_pays(run: Run) -> None:
    """With `compile=auto` on one GPU, compile the network if the steps that remain win back the time; after an epoch.

    The seconds that the run's own steps have taken tell how long the others will take. Several GPUs have batch norms
    that communicate, which torch.compile is known to break (https://github.com/pytorch/pytorch/issues/107372).
    """
    config = run.config
    if config.compile != "auto" or run.compiled == "on" or run.runtime.device.type != "cuda":
        return
    if run.steps_done == run.first_step:  # only an epoch of an earlier call has been scored
        return
    if run.runtime.world_size > 1 or not _has_compilers():
        return
    if run.budget:
        remaining_s = run.budget.seconds - used_seconds(run) - reserve_seconds(run)
    else:
        remaining_s = seconds_of_steps(run, run.steps_done, run.total_steps)
    sizes = len({run.size_of(run.steps_done), run.last_size})
    cached = any(_inductor_cache(config, run.runtime).glob("fxgraph/*"))
    compile_s = sizes * (COMPILE_WARM_S if cached else COMPILE_COLD_S)
    if COMPILED_SAVES * remaining_s > compile_s:
        log.info(
            "compile: on (takes about %.0f s and saves about %.0f %% of the %.0f s that remain)",
            *(compile_s, 100 * COMPILED_SAVES, remaining_s),
        )
        _compile(run)
        run.compiled = "on"


def _has_compilers() -> bool:
    """Whether torch.compile can make code for this GPU: it needs Triton, and Triton a C compiler."""
    from torch.utils._triton import has_triton  # loads what a run without compiling does not need

    return has_triton() and any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang")))


def seconds_of_steps(run: Run, start: int, stop: int) -> float:
    """Estimate the seconds that these steps of a run take, from the steps that it has taken in this call.

    A step's time is taken to be proportional to the pixels of its images.
    """

    def pixels(start: int, stop: int) -> int:
        small = max(min(stop, num_small) - start, 0)
        return small * size_of(0) + (stop - start - small) * size_of(run.total_steps)

    def size_of(step: int) -> int:
        height, width = training_size(run.config, step, run.total_steps)
        return height * width

    num_small = math.ceil(small_share(run.config) * run.total_steps)
    return run.seconds["steps"] / pixels(run.first_step, run.steps_done) * pixels(start, stop)


def _compile(run: Run) -> None:
    os.environ[INDUCTOR_CACHE] = str(_inductor_cache(run.config, run.runtime))
    # At most two sizes occur, each with static shapes. A run long enough to compile also gains from cuDNN's search.
    torch.backends.cudnn.benchmark = True
    network = run.model if run.runtime.world_size == 1 else run.forward
    run.forward = torch.compile(network, dynamic=False)
    gc.collect()  # graphs that are no longer used refer to themselves, and keep their GPU memory until then
    run.warm_sizes.clear()


def _inductor_cache(config: Config, runtime: Runtime) -> Path:
    """The folder of compiled code: the user's choice, or one named by a hash of everything the code depends on.

    A second run finds the code there and needs seconds instead of most of a minute.
    """
    if USERS_INDUCTOR_CACHE:
        return Path(USERS_INDUCTOR_CACHE)
    shape = [config.batch_size // runtime.world_size, config.image_height, config.image_width, config.depth]
    parts = [
        torch.__version__,
        runtime.description,
        config.network,
        config.num_outputs,
        config.base_channels,
        *shape,
        config.progressive_resizing > 0,
    ]
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
    try:
        with torch.cuda.device(runtime.device):
            torch.cuda.graph.default_capture_stream = None  # may be one of another GPU, from an earlier training
            for shape in shapes:
                x = torch.zeros(shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
                # Each graph must hold its casts of the weights, so autocast may not cache them. The copy shares its
                # tensors with the model; only its `forward` becomes the graph's, so that there can be one per shape.
                with runtime.autocast(cache=False):
                    graphs[shape] = torch.cuda.make_graphed_callables(copy.copy(model), (x,))  # type: ignore[assignment]
    finally:  # capturing runs the network a few times, which changes the statistics of batch norm
        model.load_state_dict(before)
    return lambda x: graphs[tuple(x.shape)](x)
