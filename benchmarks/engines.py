"""One run of one loader, in a process of its own: its pixels against exact ones, then its time, CPU and memory.

`loader.py` starts these processes. Our engines are here, the others in `peers.py`.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import simplejpeg
import torch
from files import HEIGHT, WIDTH, cell_means, fill_page_cache, read_pixels
from measure import PeakMemory, median
from numpy.typing import NDArray
from peers import Batches, Epoch

import fastseg

BATCH_SIZE = 16
WARM_UP_BATCHES = 4
LATER_EPOCHS, LATER_SECONDS = 2, 0.5  # at least
MAX_IMAGE_ERROR, MAX_MASK_ERROR = 8.0, 0.02  # grey levels, share of cells


class Answers(NamedTuple):
    """Exact averages of some pairs on both sampling grids: [0] covers the image, [1] whole JPEG blocks."""

    indices: list[int]
    images: NDArray[np.float32]  # (2, N, 160, 240, 3)
    masks: NDArray[np.float32]  # (2, N, 160, 240), coverage 0..1


class Engine(NamedTuple):
    make: Callable[[fastseg.Pairs, int], "Epoch | fastseg.Loader"]
    note: str
    on_blocks: bool = False  # averages whole JPEG blocks
    search: bool = True  # use the fastest of several numbers of workers, not --workers
    needs_gpu: bool = False


def _ours(decoder: str, cache: str = "off", device: str = "cpu") -> Callable[[fastseg.Pairs, int], fastseg.Loader]:
    def make(pairs: fastseg.Pairs, workers: int) -> fastseg.Loader:
        return fastseg.Loader(
            pairs,
            height=HEIGHT,
            width=WIDTH,
            batch_size=BATCH_SIZE,
            device=device,
            decoder=decoder,
            num_workers=workers,
            cache=cache,
        )

    return make


ENGINES = {
    "host": Engine(_ours("host"), "ours: threads, no cache", True, search=False),
    "cached": Engine(_ours("host", "memory"), "ours: decoded once, then from RAM", True, search=False),
    "dali": Engine(_ours("dali"), "ours through DALI, on the CPU", True),
    "dali_gpu": Engine(_ours("dali", device="cuda"), "ours through DALI, on the GPU", True, needs_gpu=True),
    "cached_gpu": Engine(_ours("dali", "device", "cuda"), "ours: decoded once, then from GPU memory", True, True, True),
    "tutorial": Engine(peers.tutorial, "DataLoader, Pillow, albumentations"),
    "pillow": Engine(peers.pillow, "the same without albumentations"),
    "opencv": Engine(peers.opencv, "DataLoader, cv2.imread + INTER_AREA"),
    "opencv_eighth": Engine(peers.opencv_eighth, "DataLoader, cv2 decoding at 1/8", True),
    "torchvision": Engine(peers.torchvision, "DataLoader, torchvision.io + resize"),
    "torchcodec": Engine(peers.torchcodec, "DataLoader, torchcodec + interpolate"),
    "spdl": Engine(peers.spdl, "SPDL threads, FFmpeg"),
    "spdl_eighth": Engine(peers.spdl_eighth, "SPDL threads, FFmpeg decoding at 1/8", True),
    "spdl_images": Engine(peers.spdl_images, "SPDL threads, FFmpeg; images only"),
}


def exact_answers(pairs: fastseg.Pairs, count: int = 16) -> Answers:
    """Of `count` pairs, evenly spaced, from Pillow's full decodes."""
    indices = sorted({int(i) for i in np.linspace(0, len(pairs) - 1, count)})
    images, masks = ([], []), ([], [])
    for index in indices:
        pixels = read_pixels(pairs.image_path(index), "RGB")
        mask = read_pixels(pairs.mask_path(index), "L") > 0
        for grid, block in enumerate((1, 8)):
            images[grid].append(cell_means(pixels, block))
            masks[grid].append(cell_means(mask, block))
    return Answers(indices, np.array(images, np.float32), np.array(masks, np.float32))


class Errors:
    """The errors of an engine's batches against the exact answers."""

    def __init__(self, answers: Answers, on_blocks: bool) -> None:
        self.images, self.masks = answers.images[int(on_blocks)], answers.masks[int(on_blocks)]
        self.row_of = {index: row for row, index in enumerate(answers.indices)}
        self.image_errors: list[float] = []
        self.mask_errors: list[float] = []

    def add(self, images: torch.Tensor, masks: torch.Tensor | None, indices: NDArray[np.int64]) -> None:
        for place, index in enumerate(indices):
            row = self.row_of.get(int(index))
            if row is not None:
                image = images[place].cpu().numpy().astype(np.float64)
                self.image_errors.append(float(np.abs(image - self.images[row]).mean()))
                if masks is not None:
                    differ = (masks[place].cpu().numpy() > 127) != (self.masks[row] >= 0.5)
                    self.mask_errors.append(float(differ.mean()))

    def result(self) -> dict[str, float | None]:
        differ = float(np.mean(self.mask_errors)) if self.mask_errors else None
        return {"mean_abs_error": float(np.mean(self.image_errors)), "mask_disagreement": differ}


def shuffled(count: int, epoch: int) -> Batches:
    order = np.random.default_rng((1, epoch)).permutation(count)
    return [order[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]


def run_engine(name: str, workers: int, pairs: fastseg.Pairs, answers: Answers) -> dict[str, Any]:
    """One run of an engine: check its pixels, warm up, time the first and the later epochs, measure memory.

    Raises:
        ValueError: the pixels are wrong.
    """
    loader = _start(name, workers, pairs)
    errors = Errors(answers, ENGINES[name].on_blocks)
    for batch in _stream(loader, np.array_split(answers.indices, -(-len(answers.indices) // BATCH_SIZE))):
        errors.add(*batch)
    found = errors.result()
    if found["mean_abs_error"] > MAX_IMAGE_ERROR or (found["mask_disagreement"] or 0) > MAX_MASK_ERROR:
        raise ValueError(f"wrong pixels: {found}")
    first = _time_epochs(loader, [shuffled(len(pairs), 0)])
    later = _time_epochs(loader, [shuffled(len(pairs), 1 + i) for i in range(LATER_EPOCHS)])
    enough = min(500, round(LATER_SECONDS * median(later["rates"]) / len(pairs)))
    if enough > LATER_EPOCHS:
        later = _time_epochs(loader, [shuffled(len(pairs), 1 + i) for i in range(enough)])
    with PeakMemory() as memory:
        for batch in _stream(loader, shuffled(len(pairs), 0), whole_epoch=True):
            errors.add(*batch)
    return {"first": first, "later": later, "peak_rss_mib": memory.mib, **errors.result()}


def search_workers(name: str, candidates: list[int], pairs: fastseg.Pairs) -> int:
    """The number of workers that makes an engine fastest."""
    rates = {}
    for workers in candidates:
        loader = _start(name, workers, pairs)
        rates[workers] = max(_time_epochs(loader, [shuffled(len(pairs), i) for i in range(2)])["rates"])
        del loader  # and with it the worker processes
    return max(rates, key=lambda workers: rates[workers])


def _start(name: str, workers: int, pairs: fastseg.Pairs) -> "Epoch | fastseg.Loader":
    """A warm loader: its code is compiled, its pipeline built, its workers run; its cache is empty."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # creates the context before the clock starts
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, on purpose
    fill_page_cache(pairs)
    loader = ENGINES[name].make(pairs, workers)
    for _ in _stream(loader, shuffled(len(pairs), 0)[:WARM_UP_BATCHES]):
        pass
    return loader


def _stream(loader: "Epoch | fastseg.Loader", batches: Batches, whole_epoch: bool = False) -> Iterable[Any]:
    """(images, masks, indices) of batches; our Loader gives a whole epoch in its own random order."""
    if isinstance(loader, fastseg.Loader):
        return loader if whole_epoch else loader.decoder.decode(batches)  # the decoder does not fill the cache
    return loader(batches)


def _time_epochs(loader: "Epoch | fastseg.Loader", epochs: list[Batches]) -> dict[str, Any]:
    rates, pairs, cpu = [], 0, _cpu_seconds()
    for batches in epochs:
        started = time.perf_counter()
        count = sum(len(images) for images, _, _ in _stream(loader, batches, whole_epoch=True))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - started))
        pairs += count
    return {"rates": rates, "cpu_s_per_1000_pairs": (_cpu_seconds() - cpu) / pairs * 1000}


def _cpu_seconds() -> float:
    """CPU time of this process and its workers."""
    ticks = 0
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def run_limit(workers: int, pairs: fastseg.Pairs) -> dict[str, float]:
    """JPEGs per second of libjpeg-turbo's decode at 1/8 from memory: one thread, and `workers` threads together."""
    files = [Path(pairs.image_path(index)).read_bytes() for index in range(len(pairs))]

    def decode(part: list[bytes]) -> None:
        out = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        for data in part:
            simplejpeg.decode_jpeg(data, min_height=HEIGHT, min_width=WIDTH, buffer=out)

    decode(files[:BATCH_SIZE])
    started = time.perf_counter()
    decode(files)
    one = len(files) / (time.perf_counter() - started)
    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        list(pool.map(decode, [files[i::workers] for i in range(workers)]))
        all_threads = len(files) / (time.perf_counter() - started)
    return {"one_thread": one, "all_threads": all_threads}
