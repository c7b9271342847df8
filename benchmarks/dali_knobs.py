"""Who should decode beside a GPU that trains: our threads, DALI with which settings, or both at once.

    python benchmarks/dali_knobs.py --pairs 512 --json benchmarks/results/dali_knobs.json
    python benchmarks/dali_knobs.py --device cpu --pairs 32 --channels 4 --seconds 1       # a small one, without a GPU

Every row decodes the same pairs, epoch after epoch, without a cache: alone for `--seconds`, then as long beside a
network that trains on one resident batch. Columns: pairs per second alone and beside it, CPU cores kept busy, and how
much of its speed the training loses. Before that every row's pixels are compared with the host decoder's.
"""

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import carvana_pairs, cores, describe, machine, one_line, print_table, report
from torch import Tensor

import fastseg
from fastseg.config import Config
from fastseg.data.batch import Batch
from fastseg.data.dali import DaliDecoder
from fastseg.data.decode import image_size
from fastseg.data.host import HostDecoder
from fastseg.data.loader import epoch_order
from fastseg.network.losses import bce_dice_loss
from fastseg.network.normalise import normalise, to_targets
from fastseg.network.unet import UNet
from fastseg.runtime.device import choose_runtime
from fastseg.training.recipe import make_optimizer

HEIGHT, WIDTH, BATCH_SIZE = 160, 240, 16
TOLERANCE = 2.0  # mean grey levels between a row's pictures and the host decoder's
FEED_EPOCHS = 1000  # more than any measurement takes


class Row(NamedTuple):
    """A decoder and its settings; `host_share` of each batch is the host's where both decode."""

    decoder: str  # host, dali or both
    threads: int
    hw_decoder_load: float = 0.65
    batches_ahead: int = 2
    preallocate: bool = False
    host_share: float = 0.5

    def describe(self) -> str:
        if self.decoder == "host":
            return f"host, {self.threads} threads"
        text = f"dali, {self.threads} threads, hw load {self.hw_decoder_load:g}, {self.batches_ahead} ahead"
        text += ", preallocated" if self.preallocate else ""
        return text if self.decoder == "dali" else f"{self.host_share:.0%} host + {text}"


def make_rows(threads: int) -> list[Row]:
    """One setting after the other away from the default."""
    default = Row("dali", threads)
    return [
        Row("host", threads),
        default,
        *(default._replace(hw_decoder_load=load) for load in (0.0, 0.8, 1.0)),
        *(default._replace(threads=count) for count in sorted({2, 4} - {threads})),
        default._replace(batches_ahead=4),
        default._replace(preallocate=True),
        *(Row("both", threads, host_share=share) for share in (0.25, 0.5, 0.75)),
    ]


def open_row(row: Row, pairs: fastseg.Pairs, device: torch.device) -> Iterator[Batch]:
    """Batches of 16 without end, on the device."""
    orders = (epoch_order(len(pairs), 0, epoch) for epoch in range(FEED_EPOCHS))
    batches = [np.array(batch) for order in orders for batch in np.split(order, len(order) // BATCH_SIZE)]
    cut = {"host": BATCH_SIZE, "dali": 0, "both": round(row.host_share * BATCH_SIZE)}[row.decoder]
    parts = []
    if cut:
        host = HostDecoder(pairs, HEIGHT, WIDTH, num_workers=row.threads, pin_memory=device.type == "cuda")
        parts.append(host.decode([batch[:cut] for batch in batches]))
    if cut < BATCH_SIZE:
        with open(pairs.image_path(0), "rb") as file:
            largest = image_size(file.read()) if row.preallocate else (0, 0)
        dali = DaliDecoder(
            pairs,
            HEIGHT,
            WIDTH,
            num_workers=row.threads,
            device=device,
            hw_decoder_load=row.hw_decoder_load,
            batches_ahead=row.batches_ahead,
            largest_photo=largest,
        )
        parts.append(dali.decode([batch[cut:] for batch in batches]))
    return _joined(parts, device)


def _joined(parts: list[Any], device: torch.device) -> Iterator[Batch]:
    try:
        for batches in zip(*parts, strict=True):
            images, masks = (torch.cat([b[k].to(device, non_blocking=True) for b in batches]) for k in (0, 1))
            yield Batch(images, masks, np.concatenate([b.indices for b in batches]))
    finally:
        for part in parts:
            part.close()


def check_pixels(row: Row, pairs: fastseg.Pairs, device: torch.device, exact: Tensor) -> float:
    """Mean grey levels from the host decoder over an epoch.

    Raises:
        RuntimeError: it is more than the tolerance.
    """
    with closing(open_row(row, pairs, device)) as batches:
        errors = [
            (batch.images.cpu().float() - exact[batch.indices]).abs().mean().item()
            for batch in itertools.islice(batches, len(pairs) // BATCH_SIZE)
        ]
    error = max(errors)
    if error > TOLERANCE:
        raise RuntimeError(f"{row.describe()}: differs from the host decoder by {error:.1f} grey levels")
    return error


class Trainer:
    """A network that trains on one resident batch in a thread of its own, and counts its steps."""

    def __init__(self, channels: int, device: torch.device) -> None:
        config = Config(base_channels=channels, device=str(device))
        self.runtime = choose_runtime(config)
        self.model = self.runtime.to_device(UNet(channels, 4))
        self.optimizer = make_optimizer(config, self.model)
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 256, (BATCH_SIZE, HEIGHT, WIDTH, 3), np.uint8))
        masks = torch.from_numpy(rng.integers(0, 256, (BATCH_SIZE, HEIGHT, WIDTH), np.uint8))
        self.inputs, self.targets = normalise(images.to(device)), to_targets(masks.to(device))
        self.steps = 0
        self.stop = threading.Event()

    def step(self) -> None:
        with self.runtime.autocast():
            logits = self.model(self.inputs)
        bce_dice_loss(logits, self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.runtime.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.steps += 1

    def run(self) -> None:
        stream = torch.cuda.Stream() if self.runtime.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            while not self.stop.is_set():
                self.step()


def measure(batches: Iterator[Batch], seconds: float, device: torch.device) -> tuple[float, float]:
    """Pairs per second, and CPU cores that this process kept busy meanwhile."""
    for _ in range(3):
        next(batches)
    started, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(batches).indices)
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    return count / elapsed, (time.process_time() - cpu) / elapsed


def measure_row(
    row: Row, pairs: fastseg.Pairs, device: torch.device, exact: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    error = check_pixels(row, pairs, device, exact)
    with closing(open_row(row, pairs, device)) as batches:
        alone, busy = measure(batches, options.seconds, device)
        trainer = Trainer(options.channels, device)
        trainer.step()
        thread = threading.Thread(target=trainer.run)
        thread.start()
        try:
            steps, started = trainer.steps, time.perf_counter()
            time.sleep(options.seconds)
            undisturbed = (trainer.steps - steps) / (time.perf_counter() - started)
            steps, started = trainer.steps, time.perf_counter()
            beside, _ = measure(batches, options.seconds, device)
            disturbed = (trainer.steps - steps) / (time.perf_counter() - started)
        finally:
            trainer.stop.set()
            thread.join()
    return {
        "row": row.describe(),
        **row._asdict(),
        "pairs_per_s": round(alone, 1),
        "cpu_cores": round(busy, 2),
        "pairs_per_s_beside_training": round(beside, 1),
        "training_loss_pct": round(100 * (1 - disturbed / undisturbed), 1) if undisturbed else None,
        "error": round(error, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train_images and train_masks; default: make Carvana-like pairs")
    parser.add_argument("--pairs", type=int, default=512, help="whole batches of 16 are used; default: %(default)s")
    parser.add_argument("--channels", type=int, default=64, help="of the network that trains; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of each of three measurements; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=cores(), help="default: cores")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: %(default)s")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    about = machine()
    device = choose_runtime(Config(device=options.device)).device
    pairs, files = carvana_pairs(options.data, max(options.pairs // BATCH_SIZE, 1) * BATCH_SIZE)
    exact = next(HostDecoder(pairs, HEIGHT, WIDTH, num_workers=options.threads).decode([np.arange(len(pairs))])).images
    rows, missing = [], {}
    for row in make_rows(options.threads):
        print(row.describe(), file=sys.stderr)
        try:
            rows.append(measure_row(row, pairs, device, exact.float(), options))
            print(rows[-1], file=sys.stderr)
        except RuntimeError as error:  # wrong pixels, or DALI refuses the setting
            missing[row.describe()] = one_line(error)
    columns = ("pairs_per_s", "cpu_cores", "pairs_per_s_beside_training", "training_loss_pct", "error")
    print(f"\n{len(pairs)} pairs, {describe(about)}\n")
    header = ["", "pairs/s", "CPU cores", "pairs/s beside training", "training loses, %", "error, grey levels"]
    print_table(header, [[row["row"], *(str(row[column]) for column in columns)] for row in rows])
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    report("dali_knobs", {"rows": rows, "missing": missing, "files": files}, about, (), options.json)


if __name__ == "__main__":
    try:
        main()
    except fastseg.FastsegError as error:
        sys.exit(f"dali_knobs.py: {error}")
