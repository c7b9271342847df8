"""What the benchmarks share: files to measure on, exact answers, the machine's description, tables, JSON.

A benchmark prints a table and, as its last line, one JSON object that says what was measured, on what and how.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fastseg
from fastseg.errors import DataError

PACKAGES = ("torch", "numpy", "numba", "simplejpeg", "pillow", "nvidia-dali-cuda120")
SPLITS = ("train", "val")
BUSY = 0.03  # share of CPU time that others take above which the numbers deserve a warning


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def carvana_pairs(data: str | None, count: int) -> tuple[fastseg.Pairs, dict[str, Any]]:
    """`count` pairs of DIR/{train,val}_{images,masks}, and what to report about them.

    Fewer files are used again under the same names. Without a folder, Carvana-like pairs are made in the user's cache
    folder, once.
    """
    folder = Path(data) if data else _generated(count)
    images, masks = [], []
    for split in SPLITS:
        if (folder / f"{split}_images").is_dir():
            found = fastseg.find_pairs(folder / f"{split}_images", folder / f"{split}_masks")
            images += [f"{split}_images/{name}" for name in found.images]
            masks += [f"{split}_masks/{name}" for name in found.masks]
    if not images:
        raise DataError(f"{folder}: must hold train_images and train_masks; make them with `fastseg synth --out`.")
    files = fastseg.Pairs(str(folder), str(folder), images, masks)
    pairs = files.subset(index % len(files) for index in range(count))
    height, width, _ = read_pixels(pairs.image_path(0), "RGB").shape
    about = {
        "source": "given folder" if data else "fastseg.generate, seed 0",
        "pairs": count,
        "files": min(len(files), count),
        "pixels": f"{width}x{height}",
        "mean_image_kib": _mean_kib(pairs.image_path(i) for i in range(count)),
        "mean_mask_kib": _mean_kib(pairs.mask_path(i) for i in range(count)),
    }
    return pairs, about


def _generated(count: int) -> Path:
    cars = max(2, -(-count // 16))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseg" / "benchmarks"
    folder = root / f"{cars}-cars"
    if not (folder / "complete").exists():
        print(f"making {16 * cars} Carvana-like pairs, once (0.2 s each on two cores)", file=sys.stderr)
        fastseg.generate(folder, cars=cars, views=16, seed=0)
        (folder / "complete").touch()
    return folder


def _mean_kib(paths: Any) -> float:
    return round(float(np.mean([os.path.getsize(path) for path in paths])) / 1024, 1)


def read_pixels(path: str, mode: str) -> NDArray[np.uint8]:
    """The whole picture, by Pillow."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert(mode))


def area_average(pixels: NDArray[Any], extent: tuple[int, int], target: tuple[int, int]) -> NDArray[np.float64]:
    """The exact mean of (H, W, ...) over each of `target` cells, in float64.

    Args:
        extent: rows and columns that the cells cover; pixels beyond the image repeat its edge.
    """
    rows, columns = (_overlaps(*sizes) for sizes in zip(pixels.shape[:2], extent, target, strict=True))
    return np.moveaxis(np.tensordot(columns, np.tensordot(rows, pixels.astype(np.float64), 1), (1, 1)), 0, 1)


def _overlaps(source: int, extent: int, target: int) -> NDArray[np.float64]:
    """(target, source): which share of a cell each pixel fills."""
    pixel, edges = np.arange(extent), np.arange(target + 1) * (extent / target)
    overlap = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
    shares = overlap.clip(0) / (extent / target)
    shares[:, source - 1] += shares[:, source:].sum(1)
    return shares[:, :source]


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def spread(values: Sequence[float]) -> float:
    """Half of the interquartile range."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2


def short(value: float) -> float:
    """Four digits: more than any timing here is worth."""
    return float(f"{value:.4g}")


def one_line(error: BaseException) -> str:
    """What went wrong, without the folders of this machine."""
    return re.sub(r"/\S*/", "", f"{type(error).__name__}: {error}".splitlines()[0])[:160]


def time_in_turn(jobs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each job, `repeat` times. The jobs take turns, so that what disturbs the machine hits all alike."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = [line.partition(":")[2].strip() for line in _text("/proc/cpuinfo").splitlines() if "model name" in line]
    memory = [line.split()[1] for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader,nounits"]
    gpu = _output(query).splitlines()
    name, driver, watts = gpu[0].split(", ") if gpu else (None, None, None)
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": cores(),
        "ram_gib": round(int(memory[0]) / 2**20) if memory else None,
        "gpu": name,
        "driver": driver,
        "power_limit_w": watts,
        "system": platform.platform(terse=True),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _others_seconds() -> float:
    """CPU time that processes other than this one and its finished children have used, counted from any point."""
    fields = [int(field) for field in _text("/proc/stat").partition("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def others_share() -> float:
    """Share of this machine's CPU time that other processes have taken since this module was loaded."""
    seconds, others = time.perf_counter() - STARTED[0], _others_seconds() - STARTED[1]
    return max(0.0, others / seconds / (os.cpu_count() or 1))


def describe(machine: dict[str, Any]) -> str:
    """One line for titles."""
    return f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else ", no GPU")


def versions(*more: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "fastseg": fastseg.__version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _text(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, so that what is printed can stand in a README; columns of numbers are aligned right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1)) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    print(line(header), line(rule), *map(line, rows), sep="\n")


def report(suite: str, content: dict[str, Any], about: dict[str, Any], packages: Sequence[str], path: str) -> None:
    """Print the result as one line of JSON, and write it to `path` if there is one."""
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    others = round(others_share(), 3)
    if others > BUSY:
        print(f"The machine was not idle: other processes took {others:.0%} of its CPU time.")
    result = {
        "suite": suite,
        **content,
        "machine": {**about, "others_cpu_share": others},
        "versions": versions(*packages),
        "commit": _output(["git", "describe", "--always", "--dirty"]).strip() or None,
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *arguments]),
    }
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


class PeakMemory:
    """The highest resident memory of this process and its workers; a page that several share counts once."""

    def __enter__(self) -> "PeakMemory":
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(0.01)
            kib = 0
            for process in ("self", *(child.pid for child in active_children())):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.mib = max(self.mib, kib / 1024)


STARTED = (time.perf_counter(), _others_seconds())
