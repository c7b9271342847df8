"""Milliseconds and memory of the UNet alone: channels, batch, dtype, layout, padded input, compiled or not.

    python benchmarks/model.py                                     # 16 and 64 channels, batch 16
    python benchmarks/model.py --channels 16 --batch 4 --repeat 5 --compile --json benchmarks/results/model.json

Every row runs in processes of its own, in turn with the others, on the same weights and images. First its logits and
gradients are compared with those of plain float32; a wrong row is not timed. An input of 4 or 8 channels is the same 3
channels and zeros, with zeros as weights: the same function, in shapes that some kernels prefer.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from files import HEIGHT, WIDTH
from flops import count_flops, matmul_flops_per_s
from measure import PeakMemory, in_fresh_process, median, run_in_turn, short, spread, time_calls
from numpy.typing import NDArray
from report import describe_machine, integers, make_parser, plus_minus, print_table, run, some_of, write_report
from torch import Tensor

import fastseg
from fastseg.network.losses import bce_loss
from fastseg.runtime.device import Runtime, choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP, STEPS = 2, 5  # in each process
LOSS_SCALE = 1024.0  # float16 would round small gradients to zero
# Relative to the largest logit, and of the first layer's gradient in the 2-norm; float32 uses TF32 on a GPU.
MAX_LOGITS_ERROR = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
MAX_GRADIENT_ERROR = {"fp32": 5e-2, "bf16": 0.3, "fp16": 0.1}


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
    """The result of float32, contiguous and eager, with the same weights and images."""

    logits: NDArray[np.float32]  # (B, 1, 160, 240)
    gradient: NDArray[np.float32]  # (C, 3, 3, 3), of the first layer


def list_variants(channels: list[int], batches: list[int], dtypes: list[str], compile: bool) -> list[Variant]:
    found = []
    for width in channels:
        for batch in batches:
            for dtype in dtypes:
                found += [Variant(width, batch, dtype, layout) for layout in LAYOUTS]
                found += [Variant(width, batch, dtype, "channels_last", padded) for padded in (4, 8)]
    return found + [variant._replace(compiled=True) for variant in found if compile]


def make_model(variant: Variant, device: torch.device) -> torch.nn.Module:
    """The network of a variant; variants with equally many channels compute the same function."""
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
    """Forward and backward pass; returns the logits."""
    with runtime.autocast():
        logits = model(images)
    (LOSS_SCALE * bce_loss(logits, targets)).backward()
    return logits


def first_gradient(model: torch.nn.Module) -> NDArray[np.float32]:
    weight = next(model.parameters())
    assert weight.grad is not None
    return weight.grad[:, :3].cpu().numpy() / LOSS_SCALE


def exact_answer(variant: Variant, device: torch.device) -> Exact:
    """The exact answer for all variants with these channels and this batch."""
    plain = Variant(variant.channels, variant.batch, "fp32", "contiguous")
    model = make_model(plain, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = train_once(model, *make_batch(plain, device), Runtime(device, torch.float32))
    return Exact(logits.detach().cpu().numpy(), first_gradient(model))


def check(variant: Variant, logits: Tensor, gradient: NDArray[np.float32], exact: Exact) -> dict[str, float]:
    """The errors of a variant against the exact answer.

    Raises:
        ValueError: an error is larger than the dtype explains.
    """
    found = logits.detach().float().cpu().numpy()
    error = {
        "logits_error": float(np.abs(found - exact.logits).max() / np.abs(exact.logits).max()),
        "gradient_error": float(np.linalg.norm(gradient - exact.gradient) / np.linalg.norm(exact.gradient)),
    }
    limits = (MAX_LOGITS_ERROR[variant.dtype], MAX_GRADIENT_ERROR[variant.dtype])
    if not all(value <= limit for value, limit in zip(error.values(), limits, strict=True)):
        raise ValueError(f"wrong logits or gradient: {error}")
    return error


def run_variant(variant: Variant, device: torch.device, exact: Exact) -> dict[str, Any]:
    """One run of a variant, in a process of its own."""
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

    both = [1e3 * seconds for seconds in time_calls(forward_backward, device, warm_up=WARM_UP, repeat=STEPS)]
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
    only = [1e3 * seconds for seconds in time_calls(forward_only, device, warm_up=WARM_UP, repeat=STEPS)]
    return {"forward_ms": only, "forward_backward_ms": both, "peak_gib": peak, "matmul_tflops": matmul / 1e12, **error}


def measure_all(
    variants: list[Variant], device: torch.device, repeat: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per variant, and the reason why a variant is missing."""

    @functools.cache
    def exact(channels: int, batch: int) -> Exact:
        return in_fresh_process(exact_answer, Variant(channels, batch, "fp32", "contiguous"), device)

    def run_once(variant: Variant) -> dict[str, Any]:
        return in_fresh_process(run_variant, variant, device, exact(variant.channels, variant.batch))

    runs, missing = run_in_turn({variant: partial(run_once, variant) for variant in variants}, repeat)
    return [summarise(variant, done) for variant, done in runs.items()], missing


def summarise(variant: Variant, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {**variant._asdict()}
    for key in ("forward_ms", "forward_backward_ms"):
        times = [value for run in runs for value in run[key]]
        row |= {key: short(median(times)), f"{key}_spread": short(spread(times))}
    for key in ("peak_gib", "matmul_tflops", "logits_error", "gradient_error"):
        row[key] = short(median([run[key] for run in runs]))
    # The FLOPs of 3 input channels: arithmetic on padding is not useful work.
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
    return found


def print_rows(rows: list[dict[str, Any]], padding: list[dict[str, Any]], missing: dict[str, str]) -> None:
    header = ["channels", "batch", "dtype", "layout", "input", "compiled", "forward ms", "forward, backward ms"]
    table = []
    for row in rows:
        cells = [str(row["channels"]), str(row["batch"]), row["dtype"], row["layout"], str(row["in_channels"])]
        cells.append("yes" if row["compiled"] else "no")
        cells += [plus_minus(row[key], row[f"{key}_spread"], 1) for key in ("forward_ms", "forward_backward_ms")]
        table.append([*cells, f"{row['peak_gib']:.2f}", f"{row['limit_pct']:.1f}", f"{row['logits_error']:.1e}"])
    print_table([*header, "peak GiB", "limit %", "error"], table, missing)
    for row in padding:
        print("input padded to {in_channels}: {times_as_long:.2f} x the time of 3 channels".format(**row), end=" ")
        print("({channels} channels, batch {batch}, {dtype})".format(**row))


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument("--channels", type=integers, default="16,64")
    parser.add_argument("--batch", type=integers, default="16")
    parser.add_argument("--dtypes", type=some_of(DTYPES), help="without it, fp32,bf16, and fp16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also compile every row")
    parser.add_argument("--repeat", type=int, default=3, help="processes per row")
    options = parser.parse_args()
    device = choose_device(options.device)
    dtypes = options.dtypes or [name for name in DTYPES if name != "fp16" or device.type == "cuda"]
    variants = list_variants(options.channels, options.batch, dtypes, options.compile)
    rows, missing = measure_all(variants, device, options.repeat)
    padding = compare_padding(rows)
    print(f"{describe_machine()}; the UNet alone at 160x240 on {device.type}")
    print_rows(rows, padding, missing)
    content = {"rows": rows, "padding": padding, "missing": missing, "device": device.type}
    threads = {"threads": torch.get_num_threads(), "repeat": options.repeat}
    write_report("model", {**content, **threads}, options.json)


if __name__ == "__main__":
    run(main)
