"""Where a training step's time goes, against what its arithmetic and its memory traffic would take at least.

    python benchmarks/profile_step.py                                  # 64 channels, batch 16, on the GPU
    python benchmarks/profile_step.py --batch 16,64,256 --ways eager,benchmark,graphs,compile,max_autotune
    python benchmarks/profile_step.py --channels 16 --ways given_back,eager,compile --device cpu

One resident batch, fastseg's own step: augmentation, forward, loss, backward, optimizer. torch's profiler adds up what
each kind of operation takes on the device; what is left of the step's wall time is the device waiting for the host.
`first step` is from the network's making to the end of its first step, with the compiler's folder empty.
The floor of the convolutions is their FLOPs over the rate of a large matrix product; that of everything else, the bytes
that batch norms, ReLUs, pooling and concatenation must read and write, over the rate of a large copy.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from flops import count_flops, matmul_flops_per_s, synchronise
from measure import describe, machine, median, print_table, report
from torch.profiler import ProfilerActivity, profile

import fastseg
from fastseg.config import Config
from fastseg.network.losses import bce_dice_loss
from fastseg.network.unet import UNet
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.runtime.memory import set_retaining_allocator
from fastseg.training.augment import augment, sample_params
from fastseg.training.compile import capture_graphs
from fastseg.training.recipe import make_optimizer

HEIGHT, WIDTH = 160, 240
WARM_UP, STEPS, PAIRS = 5, 10, 640  # steps of a measurement, fewer where they would be more pairs than that
WAYS = {  # measured in this order
    "given_back": "compile=off, freed memory given back to the kernel, as glibc does; for a CPU",
    "eager": "compile=off",
    "benchmark": "eager, cuDNN tries its algorithms",
    "graphs": "compile=graphs: the eager network's kernels, recorded",
    "compile": "compile=on: torch.compile, cuDNN tries its algorithms",
    "compile_graphs": 'torch.compile(mode="reduce-overhead"), cuDNN tries its algorithms',
    "max_autotune": 'torch.compile(mode="max-autotune-no-cudagraphs"), cuDNN tries its algorithms',
}
MODES = {"compile": None, "compile_graphs": "reduce-overhead", "max_autotune": "max-autotune-no-cudagraphs"}
NEED_GPU = ("graphs", "compile_graphs")
KINDS = (  # the first line one of whose words stands in the operation's or kernel's name
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
    """What an operation or kernel belongs to, by its name."""
    name = name.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "the rest")


def make_step(config: Config, runtime: Runtime, way: str) -> Any:
    """fastseg's step on one resident batch."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = way not in ("given_back", "eager", "graphs")
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

    def step() -> None:
        inputs, targets = augment(images, masks, sample_params(config, config.batch_size, generator))
        with runtime.autocast():
            logits = forward(inputs)
        bce_dice_loss(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(step: Any, steps: int, device: torch.device) -> float:
    """Milliseconds of a step, the median of three times `steps`; the device is not waited for in between."""
    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(3):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(device)
        found.append(1e3 * (time.perf_counter() - started) / steps)
    return median(found)


def profile_steps(step: Any, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kind: of kernels on a GPU, of operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronise(device)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if on_gpu and (event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation):
            continue  # the kernels that it started are counted themselves
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1e3 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def floor_bytes(channels: int, depth: int, batch: int, item: int) -> float:
    """Bytes that everything but convolutions must move: each activation is normalised, rectified and passed on.

    Per double convolution and direction: two batch norms (read, write) and two ReLUs (read, write); per level below the
    first the pooling's read, and per level of the decoder the concatenation (read, write). The backward pass moves as
    much again, and reads what the forward pass kept.
    """
    total = 0.0
    for level in range(depth + 1):
        activation = batch * (HEIGHT // 2**level) * (WIDTH // 2**level) * channels * 2**level * item
        blocks = 1 if level == depth else 2  # encoder and decoder
        total += blocks * 2 * 4 * activation  # batch norms and ReLUs
        if level < depth:
            total += activation + 4 * activation  # pooling, concatenation of two halves
    return 2.5 * total


def copy_bytes_per_s(device: torch.device) -> float:
    """Of a large tensor onto another, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() / min(seconds[1:])


def measure_way(way: str, config: Config, runtime: Runtime) -> dict[str, Any]:
    """A row: milliseconds of a step and what they go into, beside their floors."""
    device, batch = runtime.device, config.batch_size
    flops = count_flops(lambda: UNet(config.base_channels, config.depth), HEIGHT, WIDTH)["forward_backward"] * batch
    arithmetic = 1e3 * flops / matmul_flops_per_s(device, runtime.dtype)
    item = torch.finfo(runtime.dtype).bits // 8
    traffic = 1e3 * floor_bytes(config.base_channels, config.depth, batch, item) / copy_bytes_per_s(device)
    torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, device=device), torch.ones(1, 1, 3, 3, device=device))
    synchronise(device)  # cuDNN has started
    if device.type == "cpu" and way != "given_back":
        set_retaining_allocator()
    began = time.perf_counter()
    step = make_step(config, runtime, way)
    step()
    synchronise(device)
    first_step = time.perf_counter() - began
    steps = max(3, min(STEPS, PAIRS // batch))
    wall = time_steps(step, steps, device)
    kinds = profile_steps(step, steps, device)
    return {
        "row": f"batch {batch}, {runtime.description}, {way}: {WAYS[way]}",
        "way": way,
        "batch": batch,
        "first_step_s": round(first_step, 2),
        "step_ms": round(wall, 3),
        "pairs_per_s": round(1e3 * batch / wall, 1),
        "limit_pct": round(100 * arithmetic / wall, 1),
        "floor": {"arithmetic_ms": round(arithmetic, 3), "memory_ms": round(traffic, 3)},
        "by_kind_ms": {kind: round(ms, 3) for kind, ms in kinds.items()},
    }


def print_row(row: dict[str, Any]) -> None:
    wall, floor, kinds = row["step_ms"], row["floor"], row["by_kind_ms"]
    print(f"\n{row['row']}")
    print(
        f"{wall:.2f} ms a step, {row['pairs_per_s']:.0f} pairs/s, {row['limit_pct']:.0f} % of a matrix product's rate; "
        f"first step after {row['first_step_s']:.1f} s; "
        f"floor {floor['arithmetic_ms']:.2f} ms of arithmetic, {floor['memory_ms']:.2f} of memory"
    )
    print_table(
        ["", "ms a step", "% of its wall time"],
        [[kind, f"{ms:.2f}", f"{100 * ms / wall:.0f}"] for kind, ms in kinds.items()],
    )
    print(f"device idle, or the profiler's own time: {wall - sum(kinds.values()):.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", default="16", help="several with commas between; default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", default="eager", help=f"some of {', '.join(WAYS)}; default: %(default)s")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    wanted = options.ways.split(",")
    if unknown := [way for way in wanted if way not in WAYS]:
        parser.error(f"--ways: knows {', '.join(WAYS)}; got {', '.join(unknown)}")
    ways = [way for way in WAYS if way in wanted]
    about = machine()
    device = choose_runtime(Config(device=options.device)).device
    if device.type == "cpu" and (missing := [way for way in ways if way in NEED_GPU]):
        parser.error(f"--ways: {', '.join(missing)} needs a GPU")
    rows = []
    for batch in map(int, options.batch.split(",")):
        config = Config(base_channels=options.channels, batch_size=batch, device=options.device)
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
                rows.append(measure_way(way, config, choose_runtime(config)))
            torch.compiler.reset()
            print_row(rows[-1])
    print(f"\n{describe(about)}")
    report("profile_step", {"channels": options.channels, "rows": rows}, about, (), options.json)


if __name__ == "__main__":
    try:
        main()
    except fastseg.FastsegError as error:
        sys.exit(f"profile_step.py: {error}")
