"""Milliseconds and memory of the UNet alone: channels, batch, number format, layout, padded input, compiled or not.

    python benchmarks/model.py                                     # 16 and 64 channels, batch 16
    python benchmarks/model.py --channels 16 --batch 4 --repeat 5 --compile --json benchmarks/results/model.json

Every row runs in a process of its own, in turn with the others, on the same weights and pictures. First its logits and
gradients are compared with those of plain float32; one that is wrong is not timed. An input of 4 or 8 channels is the
same 3 and zeros, with zeros as weights: the same function, in shapes that some kernels like better.
"""

import argparse
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import torch
from flops import count_flops, matmul_flops_per_s, synchronise
from loader import in_fresh_process
from measure import PeakMemory, describe, machine, median, one_line, print_table, report, short, spread
from numpy.typing import NDArray
from torch import Tensor

import fastseg
from fastseg.config import Config
from fastseg.network.losses import bce_loss
from fastseg.runtime.device import Runtime, choose_runtime

HEIGHT, WIDTH = 160, 240
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP, STEPS = 2, 5  # in each process
LOSS_SCALE = 1024.0  # keeps float16's gradients off its smallest numbers
# Relative to the largest logit, and of the first layer's gradient in the 2-norm; float32 is TF32 on a GPU.
WRONG_LOGITS = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
WRONG_GRADIENT = {"fp32": 5e-2, "bf16": 0.3, "fp16": 0.1}


class Variant(NamedTuple):
    """A row of the table."""

    channels: int
    batch: int
    dtype: str
    layout: str
    in_channels: int = 3
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        padded = f", input padded to {self.in_channels}" if self.in_channels > 3 else ""
        return f"{self.channels} channels, batch {self.batch}, {self.dtype}, {self.layout}{padded}{compiled}"


class Exact(NamedTuple):
    """What float32, contiguous and eager, makes of the same weights and pictures."""

    logits: NDArray[np.float32]  # (B, 1, 160, 240)
    gradient: NDArray[np.float32]  # (C, 3, 3, 3): of the first layer, through all the others


def list_variants(channels: list[int], batches: list[int], dtypes: list[str], compile: bool) -> list[Variant]:
    found = []
    for width in channels:
        for batch in batches:
            for dtype in dtypes:
                found += [Variant(width, batch, dtype, layout) for layout in LAYOUTS]
                found += [Variant(width, batch, dtype, "channels_last", padded) for padded in (4, 8)]
    return found + [variant._replace(compiled=True) for variant in found if compile]


def make_model(variant: Variant, device: torch.device) -> torch.nn.Module:
    """The same function for every variant of as many channels."""
    torch.manual_seed(0)
    plain = fastseg.UNet(variant.channels)
    weights = plain.state_dict()
    first = next(iter(weights))
    padding = variant.in_channels - 3
    weights[first] = torch.nn.functional.pad(weights[first], (0, 0, 0, 0, 0, padding))
    model = fastseg.UNet(variant.channels, in_channels=variant.in_channels)
    model.load_state_dict(weights)
    return model.to(device=device, memory_format=LAYOUTS[variant.layout])


def make_batch(variant: Variant, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = 4 * torch.rand(variant.batch, 3, HEIGHT, WIDTH, generator=generator) - 2
    targets = (images.mean(dim=1, keepdim=True) > 0).float()
    images = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, variant.in_channels - 3))
    return images.to(device).contiguous(memory_format=LAYOUTS[variant.layout]), targets.to(device)


def train_once(model: Any, images: Tensor, targets: Tensor, runtime: Runtime) -> Tensor:
    """Forward and backward; the logits."""
    with runtime.autocast():
        logits = model(images)
    (LOSS_SCALE * bce_loss(logits, targets)).backward()
    return logits


def first_gradient(model: torch.nn.Module) -> NDArray[np.float32]:
    weight = next(model.parameters())
    assert weight.grad is not None
    return weight.grad[:, :3].cpu().numpy() / LOSS_SCALE


def exact_answer(variant: Variant, device: torch.device) -> Exact:
    """In a fresh process, so that its memory is no variant's."""
    plain = Variant(variant.channels, variant.batch, "fp32", "contiguous")
    model = make_model(plain, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = train_once(model, *make_batch(plain, device), Runtime(device, torch.float32))
    return Exact(logits.detach().cpu().numpy(), first_gradient(model))


def check(variant: Variant, logits: Tensor, gradient: NDArray[np.float32], exact: Exact) -> dict[str, float]:
    """How far a variant is from the exact answer.

    Raises:
        ValueError: further than its number format explains.
    """
    found = logits.detach().float().cpu().numpy()
    error = {
        "logits_error": float(np.abs(found - exact.logits).max() / np.abs(exact.logits).max()),
        "gradient_error": float(np.linalg.norm(gradient - exact.gradient) / np.linalg.norm(exact.gradient)),
    }
    limits = (WRONG_LOGITS[variant.dtype], WRONG_GRADIENT[variant.dtype])
    if not all(value <= limit for value, limit in zip(error.values(), limits, strict=True)):
        raise ValueError(f"wrong: {error}")
    return error


def run_variant(variant: Variant, device: torch.device, exact: Exact) -> dict[str, Any]:
    """One run of a variant, in a fresh process."""
    images, targets = make_batch(variant, device)
    runtime = Runtime(device, DTYPES[variant.dtype])
    with PeakMemory() as before:
        pass
    model = make_model(variant, device)
    forward = torch.compile(model) if variant.compiled else model
    error = check(variant, train_once(forward, images, targets, runtime), first_gradient(model), exact)

    def forward_backward() -> None:
        model.zero_grad()
        train_once(forward, images, targets, runtime)

    def forward_only() -> None:
        with torch.inference_mode(), runtime.autocast():
            forward(images)

    both = _milliseconds(forward_backward, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        forward_backward()
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        with PeakMemory() as memory:
            forward_backward()
        peak = (memory.mib - before.mib) / 1024
    model.eval()
    matmul = matmul_flops_per_s(device, DTYPES[variant.dtype])
    only = _milliseconds(forward_only, device)
    return {"forward_ms": only, "forward_backward_ms": both, "peak_gib": peak, "matmul_tflops": matmul / 1e12, **error}


def _milliseconds(job: Any, device: torch.device) -> list[float]:
    found = []
    for _ in range(WARM_UP + STEPS):
        synchronise(device)
        started = time.perf_counter()
        job()
        synchronise(device)
        found.append(1e3 * (time.perf_counter() - started))
    return found[WARM_UP:]


def measure_all(
    variants: list[Variant], device: torch.device, repeat: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row a variant, and those that could not run with the reason."""
    exact: dict[tuple[int, int], Exact] = {}
    runs: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    missing: dict[str, str] = {}
    for turn in range(repeat):
        for variant in list(runs):
            print(f"{variant}: run {turn + 1} of {repeat}", file=sys.stderr)
            try:
                key = (variant.channels, variant.batch)
                exact[key] = exact.get(key) or in_fresh_process(exact_answer, variant, device)
                runs[variant].append(in_fresh_process(run_variant, variant, device, exact[key]))
            except (RuntimeError, ValueError, BrokenProcessPool) as error:
                missing[str(variant)] = one_line(error)
                del runs[variant]
    return [summarise(variant, done) for variant, done in runs.items()], missing


def summarise(variant: Variant, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {**variant._asdict()}
    for key in ("forward_ms", "forward_backward_ms"):
        times = [value for run in runs for value in run[key]]
        row |= {key: short(median(times)), f"{key}_spread": short(spread(times))}
    for key in ("peak_gib", "matmul_tflops", "logits_error", "gradient_error"):
        row[key] = short(median([run[key] for run in runs]))
    # The arithmetic that is asked for, that of 3 input channels: padding is no work done.
    flops = variant.batch * count_flops(lambda: fastseg.UNet(variant.channels), HEIGHT, WIDTH)["forward_backward"]
    shares = [flops / 1e9 / median(run["forward_backward_ms"]) / run["matmul_tflops"] for run in runs]
    return {**row, "limit_pct": short(100 * median(shares))}


def compare_padding(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward and backward with a padded input, as a multiple of the time without."""
    keys = ("channels", "batch", "dtype", "layout", "compiled")
    plain = {tuple(row[key] for key in keys): row for row in rows if row["in_channels"] == 3}
    found = []
    for row in rows:
        same = plain.get(tuple(row[key] for key in keys))
        if row["in_channels"] > 3 and same:
            times = short(row["forward_backward_ms"] / same["forward_backward_ms"])
            found.append({key: row[key] for key in (*keys, "in_channels")} | {"times_as_long": times})
            print(f"input padded to {row['in_channels']}: {times:.2f} x as long as with 3 ", end="")
            print(f"({row['channels']} channels, batch {row['batch']}, {row['dtype']})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", default="16,64", help="default: %(default)s")
    parser.add_argument("--batch", default="16", help="several with commas between; default: %(default)s")
    parser.add_argument("--dtypes", default="", help="default: fp32,bf16, and fp16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="every row compiled as well")
    parser.add_argument("--repeat", type=int, default=3, help="processes a row; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument("--json", default="", metavar="FILE", help="write the result here")
    options = parser.parse_args()
    about = machine()
    try:
        device = choose_runtime(Config(device=options.device)).device
    except fastseg.FastsegError as error:
        parser.error(str(error))
    dtypes = (options.dtypes or ("fp32,bf16,fp16" if device.type == "cuda" else "fp32,bf16")).split(",")
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        parser.error(f"--dtypes: {', '.join(unknown)} unknown; known: {', '.join(DTYPES)}")
    channels, batches = ([int(value) for value in text.split(",")] for text in (options.channels, options.batch))
    rows, missing = measure_all(list_variants(channels, batches, dtypes, options.compile), device, options.repeat)
    print(f"{describe(about)}; the UNet alone at 160x240 on {device.type}")
    header = ["channels", "batch", "dtype", "layout", "input", "compiled", "forward ms", "forward, backward ms"]
    table = []
    for row in rows:
        cells = [str(row["channels"]), str(row["batch"]), row["dtype"], row["layout"], str(row["in_channels"])]
        cells.append("yes" if row["compiled"] else "no")
        cells += [f"{row[key]:.1f} ± {row[f'{key}_spread']:.1f}" for key in ("forward_ms", "forward_backward_ms")]
        table.append([*cells, f"{row['peak_gib']:.2f}", f"{row['limit_pct']:.1f}", f"{row['logits_error']:.1e}"])
    print_table([*header, "peak GiB", "limit %", "error"], table)
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")
    content = {"rows": rows, "padding": compare_padding(rows), "missing": missing, "device": device.type}
    threads = {"threads": torch.get_num_threads(), "repeat": options.repeat}
    report("model", {**content, **threads}, about, (), options.json)


if __name__ == "__main__":
    main()
