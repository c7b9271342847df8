"""Masks of photos, each at its photo's own size: `fastseg predict --checkpoint best.pt --images DIR --out DIR`.

    photo file -> decoded onto the grid -> batch -> network -> logits -> refined by the photo -> threshold -> mask file

Threads decode and write; the network runs in the calling thread between them. Each stage stays a few photos ahead of
the next one, so that memory does not grow with the number of photos.
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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
from fastseg.masks.inputs import MASK, Photo, find_photos, find_temporaries, make_folders
from fastseg.masks.outputs import OutputOptions, Row, Tally, failed_row, find_results, write_results, write_table
from fastseg.masks.refine import METHODS, choose_method
from fastseg.masks.sharing.batches import Batches
from fastseg.masks.sharing.claims import choose_claims
from fastseg.network.checkpoint import load_model
from fastseg.network.normalise import normalise
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.runtime.distributed import all_gather, barrier, get_rank, get_world_size, process_group
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.out_of_memory import halve_until_it_fits, report_out_of_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads, map_ahead

__all__ = ["PredictResult", "predict"]

TTA = ("none", "flip")
CHANGES = ("device", "precision", "batch_size", "num_workers")  # fields of Config that a prediction uses
BATCHES_AHEAD = 2  # of photos decoded ahead of the network, and of logits ahead of their files
LOG_EVERY_S = 30.0  # without a progress bar

T = TypeVar("T")
Clock = defaultdict[str, float]  # seconds by part of the work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """Counts and times of a prediction. With several ranks, all but `seconds_by_part` is about all of them."""

    images: int  #: found, the broken ones included
    masks: int  #: written by this run
    skipped: int  #: whose results existed
    broken: tuple[tuple[str, str], ...]  #: path and reason of each image without a mask, in the order given
    images_per_s: float  #: masks written per second, without start-up
    seconds: float
    seconds_by_part: dict[str, float]  #: of this rank: start-up, network, waiting for photos, waiting for files
    out: str

    @property
    def message(self) -> str:
        """Number of masks, rate, and parts of the time."""
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds_by_part.items())
        skipped = f", {self.skipped} existed" if self.skipped else ""
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
    refine: str = "auto",
    tta: str = "none",
    resume: bool = False,
    network: nn.Module | None = None,
    **changes: Any,
) -> PredictResult:
    """Write the mask of each photo, at its own size and as it is displayed.

    The mask of `sub/a.jpg` is `out/sub/a_mask.png`. Every file is complete or absent. Photos that cannot be read
    do not stop the others: they are in the result's `broken`, and in the CSV with their reason. The ranks of torchrun,
    and processes that `resume` into one folder at the same time, share the photos.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        images: a folder of JPEG, PNG, BMP or WebP photos, whose subfolders count, or a file, or several of these.
        out: folder for the results; made if it does not exist.
        mask_format: "png", one bit per pixel, or "gif", two colours like Carvana's masks. Masks of classes are PNGs
            with the classes' colours as palette, whose pixels are the classes' values, or their numbers if they have
            none.
        probabilities: also write `<stem>_probability.png`, grey 0..255 for a probability of 0..1; not with classes.
        overlays: also write `<stem>_overlay.jpg`, the photo at most 1280 pixels wide with its mask on it.
        csv: a table to write, one line per image in the order given: image, mask, width, height, share of foreground
            (with classes, `share_<name>` of each), and the error of a broken one.
        refine: how the photo refines the logits before they are upsampled: "crf" (a conditional random field), "none",
            or "auto": crf for masks of two values, none for classes.
        tta: "flip" averages the logits of the photo and of its mirror image; the network takes twice as long.
        resume: skip photos whose results all exist, and leave to other processes that `resume` into `out` what they
            are working on. When this returns, all results exist.
        network: as for `fastseg.load`.
        changes: fields of `Config` that differ from the checkpoint's: `device`, `precision`, `batch_size` (photos per
            batch and rank) and `num_workers` (threads; 0, the default: one per core).

    Raises:
        CheckpointError, ConfigError, DataError: before anything is written.
        OutputError: a file cannot be written; earlier ones stay.
        FastsegError: the memory is full, even with one photo per forward pass.
    """
    began = time.perf_counter()
    for field, value, known in (
        ("mask_format", mask_format, tuple(MASK)),
        ("refine", refine, ("auto", *METHODS)),
        ("tta", tta, TTA),
    ):
        if value not in known:
            raise ConfigError(f"{field}: must be one of {', '.join(known)}; got {value!r}.")
    paths = [images] if isinstance(images, str | os.PathLike) else images
    out, csv = str(Path(out)), os.fspath(csv)
    unused = changes.keys() - CHANGES
    if unused:
        field = min(unused)
        raise ConfigError(f"{field}: is not used by predict; it takes {', '.join(CHANGES)}. Leave {field} out.")
    model, trained = load_model(checkpoint, network)
    refine = choose_method(refine, trained)
    if trained.classes:
        _refuse_options_of_two_values(mask_format, probabilities)
    device = changes.get("device", "auto")
    with process_group(device), report_out_of_memory(device, "Lower batch_size or num_workers"):
        rank, world_size = get_rank(), get_world_size()
        defaults = {**trained.model_dump(exclude={"device", "precision"}), "num_workers": 0}
        config = Config(**{**defaults, **changes})
        runtime = choose_runtime(config.replace(batch_size=config.batch_size * world_size))
        photos = find_photos([os.fspath(path) for path in paths], out, csv=csv, resume=resume)
        cells = (config.image_height, config.image_width)
        options = OutputOptions(
            out, mask_format, probabilities, overlays, bool(csv), resume, refine, cells, config.classes
        )
        make_folders(photos, out, csv)
        temporaries = find_temporaries(photos, out)
        log.info("%d images, %s", len(photos), runtime.description)
        clock: Clock = defaultdict(float)
        predict_logits = partial(_predict_logits, runtime.to_device(model), runtime, tta == "flip")
        forward = halve_until_it_fits(predict_logits, runtime.device)
        barrier()  # before any rank writes a temporary file; and all begin to take batches at the same time
        started = time.perf_counter()
        clock["start-up"] = started - began
        claims = choose_claims(-(-len(photos) // config.batch_size), out, resume=resume)
        with retain_freed_memory(runtime.device), closing(claims):
            batches = Batches(photos, config.batch_size, claims, temporaries)
            mine = _predict_photos(batches, options, config, forward, clock)
        tally = Tally.merge(all_gather(mine))
        running = time.perf_counter() - started
        if csv and rank == 0:
            write_table(csv, tally, options)
        barrier()  # no rank returns before the table exists
    broken = tuple((path, reason) for _, path, reason in tally.broken)
    if rank == 0:
        for path, reason in broken:
            log.warning("no mask: %s: %s", path, reason)
    seconds, rate = time.perf_counter() - began, tally.masks / running
    return PredictResult(len(photos), tally.masks, tally.skipped, broken, rate, seconds, dict(clock), out)


def _refuse_options_of_two_values(mask_format: str, probabilities: bool) -> None:
    """Raise a ConfigError for options that a network of classes does not have."""
    if mask_format != "png":
        raise ConfigError(f"mask_format: must be png for a network of classes; got {mask_format}. Use png.")
    if probabilities:
        raise ConfigError(
            "probabilities: must be false for a network of classes (a file holds one value per pixel). Leave it out; "
            "the network of fastseg.load returns them."
        )


def _predict_photos(
    batches: Batches,
    options: OutputOptions,
    config: Config,
    forward: Callable[[Tensor], Tensor],
    clock: Clock,
) -> Tally:
    """What became of the photos of this process."""
    tally = Tally()
    ahead = BATCHES_AHEAD * config.batch_size
    pool = ThreadPoolExecutor(count_threads(config.num_workers), thread_name_prefix="fastseg-predict")
    total = -(-len(batches.photos) // get_world_size())  # about, for a rank
    try:
        with progress_bar(shown=get_rank() == 0) as bar:
            task = bar.add_task("predicting", total=total, note=" ")
            started = logged = time.perf_counter()
            for count, row in enumerate(_rows(batches, options, pool, ahead, forward, clock), start=1):
                tally.add(row, options)
                batches.finish(row.photo)
                now = time.perf_counter()
                rate = count / (now - started)
                bar.update(task, advance=1, note=f"{rate:.3g} images/s")
                if bar.disable and now - logged > LOG_EVERY_S:
                    log.info("%d of %d images, %.3g images/s", count, total, rate)
                    logged = now
    finally:  # after an error or Ctrl-C, drop what is queued and wait for what runs
        pool.shutdown(wait=True, cancel_futures=True)
    return tally


def _rows(
    batches: Batches,
    options: OutputOptions,
    pool: ThreadPoolExecutor,
    ahead: int,
    forward: Callable[[Tensor], Tensor],
    clock: Clock,
) -> Iterator[Row]:
    """The rows of this process's photos, in the order of their batches."""
    for photos in batches.rounds():
        read = map_ahead(pool, partial(_read, options=options), photos, ahead)
        outputs = _through_network(_results(read, clock, "waiting for photos"), batches.size, forward, clock)
        written = map_ahead(pool, partial(_write, options=options), outputs, ahead)
        yield from _results(written, clock, "waiting for files")


def _results(futures: Iterator[Future[T]], clock: Clock, part: str) -> Iterator[T]:
    """The results of futures; the time spent waiting for them is added to `part`."""
    for future in futures:
        began = time.perf_counter()
        result = future.result()
        clock[part] += time.perf_counter() - began
        yield result


def _read(photo: Photo, options: OutputOptions) -> Row | _Decoded:
    """Decode a photo onto the grid, unless it is broken or its results exist."""
    if photo.error:
        return Row(photo, error=photo.error)
    if options.resume and (row := find_results(photo, options)):
        return row
    pixels = np.empty((*options.cells, 3), np.uint8)
    try:
        return _Decoded(photo, decode_file(photo.path, decode_image, pixels), pixels)
    except DataError as error:
        return failed_row(photo, error)


def _through_network(
    read: Iterator[Row | _Decoded],
    batch_size: int,
    forward: Callable[[Tensor], Tensor],
    clock: Clock,
) -> Iterator[Row | tuple[Photo, Size, Tensor]]:
    """Photos with their logits (1 or C, h, w), and the rows of photos that need none, in order."""
    while batch := list(islice(read, batch_size)):
        decoded = {i: item for i, item in enumerate(batch) if isinstance(item, _Decoded)}
        logits: dict[int, Tensor] = {}
        if decoded:
            began = time.perf_counter()
            # A photo keeps its place in the batch, whatever the others are: a resumed run sums in the same order.
            blank = np.zeros_like(next(iter(decoded.values())).pixels)
            pixels = [decoded[i].pixels if i in decoded else blank for i in range(len(batch))]
            logits = dict(enumerate(forward(torch.from_numpy(np.stack(pixels)))))
            clock["network"] += time.perf_counter() - began
        for i, item in enumerate(batch):
            yield (item.photo, item.size, logits[i]) if isinstance(item, _Decoded) else item


def _predict_logits(model: nn.Module, runtime: Runtime, flip: bool, pixels: Tensor) -> Tensor:
    """(B, 1 or C, h, w) float32 on the CPU, where threads turn them into masks."""
    with torch.inference_mode(), runtime.autocast():
        inputs = normalise(pixels.to(runtime.device))
        logits = model(inputs).float()
        if flip:
            logits = (logits + model(inputs.flip(3)).float().flip(3)) / 2
    return logits.cpu()


def _write(item: Row | tuple[Photo, Size, Tensor], options: OutputOptions) -> Row:
    return item if isinstance(item, Row) else write_results(*item, options)
