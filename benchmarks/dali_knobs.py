"""Which decoder to use beside a GPU that trains: our threads, DALI and its settings, or both at once.

    python benchmarks/dali_knobs.py --pairs 512 --json benchmarks/results/dali_knobs.json
    python benchmarks/dali_knobs.py --device cpu --pairs 32 --channels 4 --seconds 1       # a small one, without a GPU

Every row decodes the same pairs, epoch after epoch, without a cache: alone for `--seconds`, then as long for a network
that trains on the batches, with CUDA graphs on a GPU. Columns: pairs per second of the decoder alone, CPU cores in use,
how busy the GPU's JPEG engines were at most, and pairs per second of training, on the row's batches and on one resident
batch meanwhile. First every row's pixels are compared with those of the host decoder.
"""

import itertools
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from decode_process import decode_in_process
from files import HEIGHT, WIDTH, carvana_pairs
from measure import median, one_line, spread, synchronise
from profile_step import make_step
from report import cores, describe_machine, make_parser, plus_minus, print_table, run, write_report
from torch import Tensor

import fastseg
from fastseg.config import Config
from fastseg.data.batch import Batch
from fastseg.data.dali.decoder import DaliDecoder
from fastseg.data.decode import image_size
from fastseg.data.host import HostDecoder
from fastseg.data.loader import epoch_order
from fastseg.runtime.device import choose_device, choose_runtime

BATCH_SIZE = 16
TOLERANCE = 2.0  # mean grey levels between a row's images and those of the host decoder
FEED_EPOCHS = 1000  # more than any measurement takes
WARM_UP_BATCHES, WINDOWS = 3, 5  # of a measurement: the median of the windows counts


class Row(NamedTuple):
    """A decoder and its settings; with `both`, the host decodes `host_share` of each batch."""

    decoder: str  # host, process (the host decoder in a process of its own), dali or both
    threads: int
    hw_decoder_load: float = 0.0
    batches_ahead: int = 2
    preallocate: bool = False
    host_share: float = 0.5

    def describe(self) -> str:
        if self.decoder in ("host", "process"):
            return f"host{' in a process' if self.decoder == 'process' else ''}, {self.threads} threads"
        text = f"dali, {self.threads} threads, hw load {self.hw_decoder_load:g}, {self.batches_ahead} ahead"
        text += ", preallocated" if self.preallocate else ""
        return text if self.decoder == "dali" else f"{self.host_share:.0%} host + {text}"


def make_rows(threads: int, *, all_rows: bool) -> list[Row]:
    """The host decoder, DALI's default, and rows that differ from these in one setting: the first ones, or all."""
    default = Row("dali", threads)
    rows = [
        *(Row(kind, count) for kind in ("host", "process") for count in sorted({4, 8, threads}) if count <= threads),
        default,
        *(default._replace(hw_decoder_load=load) for load in (0.65, 1.0)),
        Row("both", threads),
    ]
    if all_rows:
        rows += [default._replace(threads=count) for count in sorted({2, 4} - {threads})]
        rows += [default._replace(batches_ahead=4), default._replace(preallocate=True)]
        rows += [Row("both", threads, host_share=share) for share in (0.25, 0.75)]
    return rows


def open_row(row: Row, pairs: fastseg.Pairs, device: torch.device) -> Iterator[Batch]:
    """Endless batches of 16 on the device."""
    orders = (epoch_order(len(pairs), 0, epoch) for epoch in range(FEED_EPOCHS))
    batches = [np.array(batch) for order in orders for batch in np.split(order, len(order) // BATCH_SIZE)]
    pin_memory = device.type == "cuda"
    if row.decoder == "process":
        settings = {"num_workers": row.threads, "pin_memory": pin_memory}
        return _join([decode_in_process(pairs, HEIGHT, WIDTH, batches, **settings)], device)
    cut = {"host": BATCH_SIZE, "dali": 0, "both": round(row.host_share * BATCH_SIZE)}[row.decoder]
    parts = []
    if cut:
        host = HostDecoder(pairs, HEIGHT, WIDTH, num_workers=row.threads, pin_memory=pin_memory)
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
    return _join(parts, device)


def _join(parts: list[Any], device: torch.device) -> Iterator[Batch]:
    try:
        for batches in zip(*parts, strict=True):
            images, masks = (torch.cat([b[k].to(device, non_blocking=True) for b in batches]) for k in (0, 1))
            yield Batch(images, masks, np.concatenate([b.indices for b in batches]))
    finally:
        for part in parts:
            part.close()


def check_pixels(row: Row, pairs: fastseg.Pairs, device: torch.device, exact: Tensor) -> float:
    """Largest mean error of a batch over an epoch, in grey levels from the host decoder.

    Raises:
        RuntimeError: the error is larger than TOLERANCE.
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


class JpegEngines:
    """How busy the GPU's JPEG engines are within the block, in percent, at most; None where the driver does not say."""

    COMMAND = ("nvidia-smi", "--query-gpu=utilization.jpeg", "--format=csv,noheader,nounits", "--loop-ms=100")

    def __enter__(self) -> "JpegEngines":
        self.busiest: int | None = None
        try:
            self._sampler = subprocess.Popen(self.COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:  # no driver
            self._sampler = subprocess.Popen(["true"], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.terminate()
        printed, _ = self._sampler.communicate()
        self.busiest = max((int(line) for line in printed.split() if line.isdigit()), default=None)


def measure(batches: Iterator[Batch], seconds: float, device: torch.device) -> tuple[list[float], float]:
    """Pairs per second in each window of the seconds, and the CPU cores that this process used meanwhile."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    rates, began, cpu = [], time.perf_counter(), time.process_time()
    for _ in range(WINDOWS):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / WINDOWS:
            count += len(next(batches).indices)
        synchronise(device)
        rates.append(count / (time.perf_counter() - started))
    return rates, (time.process_time() - cpu) / (time.perf_counter() - began)


def measure_row(
    row: Row, pairs: fastseg.Pairs, device: torch.device, exact: Tensor, options: Namespace
) -> dict[str, Any]:
    """Check a row's pixels, then measure decoding alone, and training on its batches against one resident batch."""
    error = check_pixels(row, pairs, device, exact)
    config = Config(base_channels=options.channels, batch_size=BATCH_SIZE, device=str(device))
    step = make_step(config, choose_runtime(config), "graphs" if device.type == "cuda" else "eager")

    def train(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            step(batch.images, batch.masks)
            yield batch

    with closing(open_row(row, pairs, device)) as batches:
        with JpegEngines() as engines:
            alone, busy = measure(batches, options.seconds, device)
        trained, _ = measure(train(batches), options.seconds, device)
        resident, _ = measure(train(itertools.repeat(next(batches))), options.seconds, device)
    rates = {"pairs_per_s": alone, "training_pairs_per_s": trained, "resident_pairs_per_s": resident}
    return {
        "row": row.describe(),
        **row._asdict(),
        **{name: round(median(rate), 1) for name, rate in rates.items()},
        **{f"{name}_spread": round(spread(rate), 1) for name, rate in rates.items()},
        "cpu_cores": round(busy, 2),
        "jpeg_engines_pct": engines.busiest,
        "error": round(error, 3),
    }


def print_rows(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    rates = ("pairs_per_s", "training_pairs_per_s", "resident_pairs_per_s")
    table = []
    for row in rows:
        cells = [plus_minus(row[rate], row[f"{rate}_spread"]) for rate in rates]
        engines = "-" if row["jpeg_engines_pct"] is None else f"{row['jpeg_engines_pct']}"
        table.append([row["row"], cells[0], f"{row['cpu_cores']}", engines, *cells[1:], f"{row['error']}"])
    header = ["", "pairs/s", "CPU cores", "JPEG engines, %", "training", "on a resident batch", "error, grey levels"]
    print_table(header, table, missing)


def main() -> None:
    parser = make_parser(__doc__, data=True, device=True)
    parser.add_argument("--pairs", type=int, default=512, help="rounded down to whole batches of 16")
    parser.add_argument("--channels", type=int, default=64, help="of the network that trains")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of three measurements")
    parser.add_argument("--threads", type=int, default=cores(), help="of a decoder")
    parser.add_argument("--all-rows", action="store_true", help="measure every setting, not only the first ones")
    options = parser.parse_args()
    device = choose_device(options.device)
    pairs, files = carvana_pairs(options.data, max(options.pairs // BATCH_SIZE, 1) * BATCH_SIZE)
    exact = next(HostDecoder(pairs, HEIGHT, WIDTH, num_workers=options.threads).decode([np.arange(len(pairs))])).images
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    content = {"rows": rows, "missing": missing, "files": files}
    for row in make_rows(options.threads, all_rows=options.all_rows):
        print(row.describe(), file=sys.stderr)
        try:
            rows.append(measure_row(row, pairs, device, exact.float(), options))
            print(rows[-1], file=sys.stderr)
        except RuntimeError as error:  # wrong pixels, or a setting that DALI refuses
            missing[row.describe()] = one_line(error)
        write_report("dali_knobs", content, options.json, finished=False)
    print(f"\n{len(pairs)} pairs, {describe_machine()}\n")
    print_rows(rows, missing)
    write_report("dali_knobs", content, options.json)


if __name__ == "__main__":
    run(main)
