"""Where a training step's time goes, against what its arithmetic and its memory traffic would take at least.

    python benchmarks/profile_step.py                                  # 64 channels, batch 16, on the GPU
    python benchmarks/profile_step.py --channels 8 --batch 4 --device cpu

One resident batch, fastseg's own step: augmentation, forward, loss, backward, optimizer. torch's profiler adds up what
each kind of operation takes on the device; what is left of the step's wall time is the device waiting for the host.
The floor of the convolutions is their FLOPs over the rate of a large matrix product; that of everything else, the bytes
that batch norms, ReLUs, pooling and concatenation must read and write, over the rate of a large copy.
"""

import argparse
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from flops import count_flops, matmul_flops_per_s, synchronise
from measure import describe, machine, median, print_table, report
from torch.profiler import ProfilerActivity, profile

import fastseg
from fastseg.augment import augment, sample_params
from fastseg.config import Config
from fastseg.losses import bce_dice_loss
from fastseg.recipe import make_optimizer
from fastseg.runtime import Runtime, choose_runtime
from fastseg.unet import UNet

HEIGHT, WIDTH = 160, 240
WARM_UP, STEPS = 5, 10
KINDS = {  # the first whose word stands in the operation's name
    "convolution": ("conv", "cudnn", "xmma", "cutlass", "gemm", "mkldnn"),
    "batch norm": ("batch_norm", "batchnorm", "bn_"),
    "pooling": ("pool",),
    "concatenation": ("cat",),
    "optimizer": ("adam", "foreach", "multi_tensor"),
    "fused by torch.compile": ("triton", "cpp_fused"),
    "ReLU": ("relu", "threshold", "clamp_min"),
    "copies and casts": ("copy", "_to", "memcpy", "contiguous", "fill", "memset", "zero", "nchw", "nhwc"),
}


def kind_of(name: str) -> str:
    """What an operation or kernel belongs to, by its name."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "the rest")


def make_step(config: Config, runtime: Runtime, compiled: bool) -> Any:
    """fastseg's step on one resident batch."""
    torch.manual_seed(0)
    model = runtime.place(UNet(config.base_channels, config.depth)).train()
    forward = torch.compile(model, dynamic=False) if compiled else model
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


def time_steps(step: Any, device: torch.device) -> float:
    """Milliseconds of a step, the median of as many as are profiled; the host is not waited for in between."""
    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(3):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronise(device)
        found.append(1e3 * (time.perf_counter() - started) / STEPS)
    return median(found)


def profile_steps(step: Any, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kind: of kernels on a GPU, of operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        synchronise(device)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue  # the kernels that it started are counted themselves
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1e3 / STEPS
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", default="16", help="several with commas between; default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compiled as well")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    about = machine()
    rows = []
    for batch in map(int, options.batch.split(",")):
        config = Config(base_channels=options.channels, batch_size=batch, device=options.device)
        runtime = choose_runtime(config)
        flops = count_flops(lambda: UNet(options.channels, 4), HEIGHT, WIDTH)["forward_backward"] * batch
        arithmetic = 1e3 * flops / matmul_flops_per_s(runtime.device, runtime.dtype)
        item = torch.finfo(runtime.dtype).bits // 8
        traffic = 1e3 * floor_bytes(options.channels, 4, batch, item) / copy_bytes_per_s(runtime.device)
        for compiled in (False, True)[: 1 + options.compile]:
            step = make_step(config, runtime, compiled)
            wall = time_steps(step, runtime.device)
            kinds = profile_steps(step, runtime.device)
            name = f"batch {batch}, {runtime.describe}" + (", compiled" if compiled else "")
            print(f"\n{name}: {wall:.2f} ms a step; floor {arithmetic:.2f} of arithmetic, {traffic:.2f} of memory")
            table = [[kind, f"{ms:.2f}", f"{100 * ms / wall:.0f}"] for kind, ms in kinds.items()]
            print_table(["", "ms a step", "% of its wall time"], table)
            print(f"device idle, or the profiler's own time: {wall - sum(kinds.values()):.2f} ms")
            floors = {"arithmetic_ms": round(arithmetic, 3), "memory_ms": round(traffic, 3)}
            by_kind = {kind: round(ms, 3) for kind, ms in kinds.items()}
            rows.append({"row": name, "step_ms": round(wall, 3), "floor": floors, "by_kind_ms": by_kind})
    print(f"\n{describe(about)}")
    report("profile_step", {"channels": options.channels, "rows": rows}, about, (), options.json)


if __name__ == "__main__":
    try:
        main()
    except fastseg.FastsegError as error:
        sys.exit(f"profile_step.py: {error}")
