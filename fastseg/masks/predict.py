"""Masks of photos, each at its photo's own size: `fastseg predict --checkpoint best.pt --images DIR --out DIR`.

    photo file -> decoded onto the grid -> batch -> network -> logits, corrected by the photo -> cut at 0 -> mask file

Threads decode and write; between them the network runs in this one. Each stage takes from the one before as many photos
as it needs and a few ahead, so that memory does not grow with the number of photos.
"""

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.data.decode import Size, decode_image
from fastseg.data.host import decode_file
from fastseg.errors import ConfigError, DataError
from fastseg.masks.inputs import MASK, Photo, find_photos, open_folders
from fastseg.masks.outputs import Plan, Row, broken_row, find_results, write_results, write_table
from fastseg.masks.refine import METHODS
from fastseg.network.checkpoint import load_model
from fastseg.network.normalise import normalise
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.runtime.distributed import all_gather, barrier, get_rank, get_world_size, process_group
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads

__all__ = ["PredictResult", "predict"]

TTA = ("none", "flip")
BATCHES_AHEAD = 2  # of photos decoded before the network takes them, and of logits before their files are written
LOG_EVERY_S = 30.0  # where no bar is shown

T = TypeVar("T")
U = TypeVar("U")
Clock = defaultdict[str, float]  # seconds by what they went into

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """How a prediction went; of a group of processes, all of it but the seconds is about all of them."""

    images: int  # found, the broken ones included
    masks: int  # written by this run
    skipped: int  # whose results were there already
    broken: tuple[tuple[str, str], ...]  # path and reason of each image without a mask, in the order given
    images_per_s: float  # masks written a second, start-up left out
    seconds: float
    seconds_by_part: dict[str, float]  # of this process: start-up, network, waiting for photos, waiting for files
    out: str

    @property
    def sentence(self) -> str:
        """How many, how fast, and where the time went."""
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds_by_part.items())
        skipped = f", {self.skipped} were there already" if self.skipped else ""
        broken = f", {len(self.broken)} images are broken" if self.broken else ""
        return (
            f"{self.masks} masks in {self.out}/{skipped}{broken}: {self.images_per_s:.3g} images/s, "
            f"{self.seconds:.1f} s ({parts})"
        )


@dataclass(frozen=True)
class _Decoded:
    """A photo before the network."""

    photo: Photo
    size: Size
    pixels: NDArray[np.uint8]  # (h, w, 3), on the grid


def predict(
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    mask_format: str = "png",
    probabilities: bool = False,
    overlays: bool = False,
    csv: str | os.PathLike[str] = "",
    refine: str = "crf",
    tta: str = "none",
    resume: bool = False,
    **changes: Any,
) -> PredictResult:
    """Write the mask of each photo, at its own size and as it is displayed.

    The mask of `sub/a.jpg` is `out/sub/a_mask.png`. Every file is written whole or not at all. Photos that cannot be
    read do not stop the others: they are in the result's `broken`, and in the CSV with their reason. Under torchrun
    each process takes its share of the photos.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        images: a folder of JPEG, PNG, BMP or WebP photos, whose subfolders count, or a file, or several of these.
        out: folder for the results; made where there is none.
        mask_format: "png", one bit a pixel, or "gif", two colours as Carvana's masks.
        probabilities: also write `<stem>_probability.png`, grey 0..255 for a probability of 0..1.
        overlays: also write `<stem>_overlay.jpg`, the photo at most 1280 pixels wide with its mask on it.
        csv: a table to write, one line an image in the order given: image, mask, width, height, share of foreground,
            and the error of one that is broken.
        refine: what corrects the logits by the photo before they are upsampled: "none" or
            "crf" (a conditional random field), as in `evaluate`.
        tta: "flip" takes the mean of the logits of the photo and of its mirror image, for twice the network's time.
        resume: leave photos alone whose results are all there.
        changes: fields of `Config` that differ from the checkpoint's: `device`, `precision`, `batch_size` (photos at a
            time, of each process) and `num_workers` (threads; 0, the default: one a core).

    Raises:
        CheckpointError, ConfigError, DataError: one sentence with the remedy, before anything is written; or, later, a
            file cannot be written: what was written before stays.
    """
    began = time.perf_counter()
    for field, value, known in (
        ("mask_format", mask_format, tuple(MASK)),
        ("refine", refine, METHODS),
        ("tta", tta, TTA),
    ):
        if value not in known:
            raise ConfigError(f"{field}: must be one of {', '.join(known)}; got {value!r}.")
    paths = [images] if isinstance(images, str | os.PathLike) else images
    out, csv = str(Path(out)), os.fspath(csv)
    model, trained = load_model(checkpoint)
    with process_group(changes.get("device", "auto")):
        rank, world_size = get_rank(), get_world_size()
        defaults = {**trained.model_dump(exclude={"device", "precision"}), "num_workers": 0}
        config = Config(**{**defaults, **changes})
        runtime = choose_runtime(config.replace(batch_size=config.batch_size * world_size))
        photos = find_photos([os.fspath(path) for path in paths], out, csv=csv, resume=resume)
        cells = (config.image_height, config.image_width)
        plan = Plan(out, mask_format, probabilities, overlays, bool(csv), resume, refine, cells)
        open_folders(photos, out, csv)
        log.info("%d images, %s", len(photos), runtime.description)
        clock: Clock = defaultdict(float)
        forward = partial(_logits, runtime.to_device(model), runtime, tta == "flip")
        started = time.perf_counter()
        clock["start-up"] = started - began
        with retain_freed_memory(runtime.device):
            mine = _predict_all(photos[rank::world_size], plan, config, forward, clock, shown=rank == 0)
        rows: list[Any] = [None] * len(photos)
        for other, theirs in enumerate(all_gather(mine)):
            rows[other::world_size] = theirs
        running = time.perf_counter() - started
        if csv and rank == 0:
            write_table(csv, rows, plan)
        barrier()  # the table is there when any process says so
    broken = tuple((row.photo.path, row.error) for row in rows if row.error)
    skipped = sum(row.skipped for row in rows)
    masks = len(rows) - len(broken) - skipped
    if rank == 0:
        for path, reason in broken:
            log.warning("no mask: %s: %s", path, reason)
    seconds = time.perf_counter() - began
    return PredictResult(len(rows), masks, skipped, broken, masks / running, seconds, dict(clock), out)


def _predict_all(
    photos: list[Photo],
    plan: Plan,
    config: Config,
    forward: Callable[[list[NDArray[np.uint8]]], Tensor],
    clock: Clock,
    *,
    shown: bool,
) -> list[Row]:
    """A row a photo, in their order."""
    rows: list[Row] = []
    ahead = BATCHES_AHEAD * config.batch_size
    pool = ThreadPoolExecutor(count_threads(config.num_workers), thread_name_prefix="fastseg-predict")
    try:
        with progress_bar(shown=shown) as bar:
            task = bar.add_task("predicting", total=len(photos), note=" ")
            started = said = time.perf_counter()
            read = _in_order(pool, partial(_read, plan=plan), photos, ahead, clock, "waiting for photos")
            through = _through_network(read, config.batch_size, forward, clock)
            for row in _in_order(pool, partial(_write, plan=plan), through, ahead, clock, "waiting for files"):
                rows.append(row)
                now = time.perf_counter()
                rate = len(rows) / (now - started)
                bar.update(task, advance=1, note=f"{rate:.3g} images/s")
                if bar.disable and now - said > LOG_EVERY_S:
                    log.info("%d of %d images, %.3g images/s", len(rows), len(photos), rate)
                    said = now
    finally:  # an error or Ctrl-C: what is queued is dropped, and what runs is waited for
        pool.shutdown(wait=True, cancel_futures=True)
    return rows


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int, clock: Clock, part: str
) -> Iterator[U]:
    """`map` by threads, up to `ahead` items ahead of the caller; the time spent waiting for them goes to `part`."""

    def result() -> U:
        began = time.perf_counter()
        try:
            return pending.popleft().result()
        finally:
            clock[part] += time.perf_counter() - began

    pending: deque[Future[U]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        while pending and (len(pending) > ahead or pending[0].done()):
            yield result()
    while pending:
        yield result()


def _read(photo: Photo, plan: Plan) -> Row | _Decoded:
    """Decode a photo onto the grid, unless it is broken or its results are there already."""
    if photo.fault:
        return Row(photo, error=photo.fault)
    if plan.resume and (row := find_results(photo, plan)):
        return row
    pixels = np.empty((*plan.cells, 3), np.uint8)
    try:
        return _Decoded(photo, decode_file(photo.path, lambda data: decode_image(data, pixels)), pixels)
    except DataError as error:
        return broken_row(photo, error)


def _through_network(
    read: Iterator[Row | _Decoded],
    batch_size: int,
    forward: Callable[[list[NDArray[np.uint8]]], Tensor],
    clock: Clock,
) -> Iterator[Row | tuple[Photo, Size, Tensor]]:
    """Photos with their logits (1, h, w), and the rows of those that need none, in order."""
    while batch := list(islice(read, batch_size)):
        decoded = {i: item for i, item in enumerate(batch) if isinstance(item, _Decoded)}
        logits: dict[int, Tensor] = {}
        if decoded:
            began = time.perf_counter()
            # A photo keeps its place whatever the others are: a run that was resumed sums up in the same order.
            blank = np.zeros_like(next(iter(decoded.values())).pixels)
            pixels = [decoded[i].pixels if i in decoded else blank for i in range(len(batch))]
            logits = dict(enumerate(forward(pixels)))
            clock["network"] += time.perf_counter() - began
        for i, item in enumerate(batch):
            yield (item.photo, item.size, logits[i]) if isinstance(item, _Decoded) else item


def _logits(model: nn.Module, runtime: Runtime, flip: bool, pixels: list[NDArray[np.uint8]]) -> Tensor:
    """(B, 1, h, w) float32 on the CPU, where threads make masks of them."""
    with torch.inference_mode(), runtime.autocast():
        images = torch.from_numpy(np.stack(pixels)).to(runtime.device)
        inputs = normalise(images)
        logits = model(inputs).float()
        if flip:
            logits = (logits + model(inputs.flip(3)).float().flip(3)) / 2
    return logits.cpu()


def _write(item: Row | tuple[Photo, Size, Tensor], plan: Plan) -> Row:
    return item if isinstance(item, Row) else write_results(*item, plan)
