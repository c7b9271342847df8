"""Where the time of a training step goes, against the floor of its arithmetic and its memory traffic.

    python benchmarks/profile_step.py                                  # 64 channels, batch 16, on the GPU
    python benchmarks/profile_step.py --batch 16,64,256 --ways eager,benchmark,graphs,compile,max_autotune
    python benchmarks/profile_step.py --channels 16 --ways default_allocator,eager,compile --device cpu

fastseg's own step on one resident batch: augmentation, forward, loss, backward, optimizer. A way whose first loss
differs from that of the first way is not timed. torch's profiler adds up the device's time by kind of operation; the
rest of the wall time is the device waiting for the host. `first step` counts from the construction of the network to
the end of its first step, with an empty compile cache. The floor of arithmetic is the network's FLOPs over the rate of
a large matrix product; the floor of memory is the traffic of batch norms, ReLUs, pooling and concatenation over the
rate of a large copy.
"""

import itertools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from files import HEIGHT, WIDTH
from flops import count_flops, matmul_flops_per_s
from measure import median, one_line, spread, synchronise, time_calls
from report import (
    describe_machine,
    integers,
    make_parser,
    plus_minus,
    print_missing,
    print_table,
    run,
    some_of,
    write_report,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.network.losses import bce_dice_loss
from fastseg.network.unet import UNet
from fastseg.runtime.device import Runtime, choose_device, choose_runtime
from fastseg.runtime.memory import restore_default_allocator, set_retaining_allocator
from fastseg.training.recipe import make_optimizer
from fastseg.training.step.augment import augment, sample_params
from fastseg.training.step.compile import capture_graphs

WARM_UP, STEPS, MAX_PAIRS = 5, 10, 640  # steps of a measurement; a large batch takes fewer of them
REPEAT = 3  # measurements
MAX_LOSS_ERROR = 1e-2  # relative, from the loss of the first way
WAYS = {
    "default_allocator": "compile=off, freed memory returns to the kernel, as by default; for a CPU",
    "eager": "compile=off",
    "benchmark": "eager, cuDNN tries its algorithms",
    "graphs": "compile=graphs: the eager network's kernels, captured",
    "compile": "compile=on: torch.compile, cuDNN tries its algorithms",
    "compile_graphs": 'torch.compile(mode="reduce-overhead"), cuDNN tries its algorithms',
    "max_autotune": 'torch.compile(mode="max-autotune-no-cudagraphs"), cuDNN tries its algorithms',
}
MODES = {"compile": None, "compile_graphs": "reduce-overhead", "max_autotune": "max-autotune-no-cudagraphs"}
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
NEED_GPU = ("graphs", "compile_graphs")
KINDS = (  # the first kind that has a word in the name of the operation or kernel
    ("convolution", ("triton_tem",)),  # a template of max-autotune
    ("fused by torch.compile", ("triton", "cpp_fused")),
    ("batch norm", ("batch_norm", "batchnorm", "bn_fw", "bn_bw")),
    ("layout changes", ("nchwtonhwc", "nhwctonchw")),
    ("convolution", ("conv", "cudnn", "xmma", "implicit_gemm", "cutlass_tensorop", "mkldnn")),
    ("matrix products", ("gemm", "gemv", "nvjet", "cutlass", "bmm")),
    ("pooling", ("pool",)),
    ("concatenation", ("catarray", "aten::cat")),
    ("optimizer", ("adam", "foreach", "multi_tensor")),
    ("ReLU", ("relu", "threshold", "clamp_scalar", "clamp_min")),
    ("copies and casts", ("copy", "_to", "memcpy", "contiguous", "fill", "memset", "zero")),
)


def kind_of(name: str) -> str:
    """The kind of an operation or kernel, by its name."""
    name = name.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "the rest")


def make_step(config: Config, runtime: Runtime, way: str = "eager") -> Callable[..., Tensor]:
    """fastseg's step, on one resident batch unless a batch is given; it returns the loss, before its update."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = way not in ("default_allocator", "eager", "graphs")
    model = runtime.to_device(UNet(config.base_channels, config.depth)).train()
    forward: Any = model
    if way == "graphs":
        forward = capture_graphs(model, runtime, [(config.batch_size, 3, HEIGHT, WIDTH)])
    elif way in MODES:
        forward = torch.compile(model, dynamic=False, mode=MODES[way])
    optimizer = make_optimizer(config, model)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    shape = (config.batch_size, HEIGHT, WIDTH)
    images = torch.from_numpy(rng.integers(0, 256, (*shape, 3), np.uint8)).to(runtime.device)
    masks = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).to(runtime.device)

    def step(images: Tensor = images, masks: Tensor = masks) -> Tensor:
        inputs, targets = augment(images, masks, sample_params(config, config.batch_size, generator))
        with runtime.autocast():
            logits = forward(inputs)
        loss = bce_dice_loss(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_steps(step: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Milliseconds per step, several times; the host does not wait for the device between the steps."""

    def run_steps() -> None:
        for _ in range(steps):
            step()

    for _ in range(WARM_UP):
        step()
    return [1e3 * seconds / steps for seconds in time_calls(run_steps, device, repeat=REPEAT)]


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per step by kind, of kernels on a GPU and of operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronise(device)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if on_gpu and (event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation):
            continue  # its kernels count instead
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1e3 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def floor_bytes(channels: int, depth: int, batch: int, item: int) -> float:
    """Bytes that a step moves at least outside of convolutions.

    Per double convolution and direction: two batch norms and two ReLUs, each of which reads and writes. Per level of
    the decoder: a pooling, which reads, and a concatenation, which reads and writes two halves. The backward pass moves
    as much again and reads the activations that the forward pass saved.
    """
    total = 0.0
    for level in range(depth + 1):
        activation = batch * (HEIGHT // 2**level) * (WIDTH // 2**level) * channels * 2**level * item
        blocks = 1 if level == depth else 2  # encoder and decoder
        total += blocks * 2 * 4 * activation  # batch norms and ReLUs
        if level < depth:
            total += activation + 4 * activation  # pooling and concatenation
    return 2.5 * total


def copy_bytes_per_s(device: torch.device) -> float:
    """The rate of a large copy, bytes read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(time_calls(lambda: target.copy_(source), device, warm_up=1, repeat=5))


def measure_way(way: str, config: Config, runtime: Runtime, first_loss: float | None) -> dict[str, Any]:
    """One row: milliseconds per step and their kinds, and the floors.

    Raises:
        RuntimeError: the loss of the first step differs from `first_loss`.
    """
    device, batch = runtime.device, config.batch_size
    flops = count_flops(lambda: UNet(config.base_channels, config.depth), HEIGHT, WIDTH)["forward_backward"] * batch
    arithmetic = 1e3 * flops / matmul_flops_per_s(device, runtime.dtype)
    item = torch.finfo(runtime.dtype).bits // 8
    traffic = 1e3 * floor_bytes(config.base_channels, config.depth, batch, item) / copy_bytes_per_s(device)
    torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, device=device), torch.ones(1, 1, 3, 3, device=device))
    synchronise(device)  # cuDNN has started
    if device.type == "cpu":
        restore_default_allocator() if way == "default_allocator" else set_retaining_allocator()
    began = time.perf_counter()
    step = make_step(config, runtime, way)
    loss = step().item()  # waits for the device
    first_step = time.perf_counter() - began
    if first_loss is not None and not abs(loss / first_loss - 1) <= MAX_LOSS_ERROR:
        raise RuntimeError(f"wrong loss {loss}, {first_loss} in the first way")
    steps = max(3, min(STEPS, MAX_PAIRS // batch))
    times = time_steps(step, steps, device)
    kinds = profile_steps(step, steps, device)
    return {
        "row": f"batch {batch}, {runtime.description}, {way}: {WAYS[way]}",
        "way": way,
        "batch": batch,
        "first_loss": loss,
        "first_step_s": round(first_step, 2),
        "step_ms": round(median(times), 3),
        "step_spread": round(spread(times), 3),
        "pairs_per_s": round(1e3 * batch / median(times), 1),
        "limit_pct": round(100 * arithmetic / median(times), 1),
        "floor": {"arithmetic_ms": round(arithmetic, 3), "memory_ms": round(traffic, 3)},
        "by_kind_ms": {kind: round(ms, 3) for kind, ms in kinds.items()},
    }


def print_row(row: dict[str, Any]) -> None:
    wall, floor, kinds = row["step_ms"], row["floor"], row["by_kind_ms"]
    print(f"\n{row['row']}")
    print(f"{plus_minus(wall, row['step_spread'], 2)} ms per step, {row['pairs_per_s']:.0f} pairs/s, ", end="")
    print(f"{row['limit_pct']:.0f} % of the rate of a matrix product; first step after {row['first_step_s']:.1f} s")
    print(f"floors: {floor['arithmetic_ms']:.2f} ms of arithmetic, {floor['memory_ms']:.2f} ms of memory traffic")
    table = [[kind, f"{ms:.2f}", f"{100 * ms / wall:.0f}"] for kind, ms in kinds.items()]
    print_table(["", "ms per step", "% of its wall time"], table)
    print(f"device idle, or the profiler's own time: {wall - sum(kinds.values()):.2f} ms", flush=True)


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=integers, default="16")
    parser.add_argument(
        "--precisions", type=some_of(PRECISIONS), default="auto", help=f"some of {','.join(PRECISIONS)}"
    )
    parser.add_argument("--ways", type=some_of(WAYS), default="eager", help=f"some of {','.join(WAYS)}")
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type == "cpu" and (missing := [way for way in options.ways if way in NEED_GPU]):
        raise ConfigError(f"--ways: {', '.join(missing)} needs a GPU. Use the others.")
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    content = {"channels": options.channels, "rows": rows, "missing": missing}
    for batch in options.batch:
        first_loss = None
        for precision, way in itertools.product(options.precisions, options.ways):
            fields = {"base_channels": options.channels, "batch_size": batch, "precision": precision}
            config = Config(**fields, device=options.device)
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
                try:
                    rows.append(measure_way(way, config, choose_runtime(config), first_loss))
                    first_loss = first_loss or rows[-1]["first_loss"]
                    print_row(rows[-1])
                except RuntimeError as error:  # a wrong loss, or too little memory
                    missing[f"batch {batch}, {precision}, {way}"] = one_line(error)
            torch.compiler.reset()
            write_report("profile_step", content, options.json, finished=False)
    print(f"\n{describe_machine()}")
    print_missing(missing)
    write_report("profile_step", content, options.json)


if __name__ == "__main__":
    run(main)
