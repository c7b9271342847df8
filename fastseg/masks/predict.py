"""Masks of photos, each at its photo's own size: `fastseg predict --checkpoint best.pt --images DIR --out DIR`.

    photo file -> decoded onto the grid -> batch -> network -> logits -> refined by the photo -> threshold -> mask file

Threads decode and write; the network and the outline refiner run in the calling thread between them. Each stage stays a
few photos ahead of the next one, so that memory does not grow with the number of photos.
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from fastseg.errors import ConfigError
from fastseg.masks.inputs import MASK, find_photos, find_temporaries, make_folders
from fastseg.masks.outputs import OutputOptions, Tally, write_table
from fastseg.masks.refine import check_method, choose_refinement
from fastseg.masks.sharing.batches import Batches
from fastseg.masks.sharing.claims import choose_claims
from fastseg.masks.sharing.settings import checksum, record_settings, refuse_other_settings, time_of_settings
from fastseg.masks.stages import Clock, Stages, predict_logits
from fastseg.messages import count_of
from fastseg.network.checkpoint import load_model
from fastseg.runtime.device import choose_inference_runtime
from fastseg.runtime.distributed import all_gather, barrier, get_rank, get_world_size, process_group
from fastseg.runtime.memory import retain_freed_memory
from fastseg.runtime.out_of_memory import halve_until_it_fits, report_out_of_memory
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads

__all__ = ["PredictResult", "predict"]

TTA = ("none", "flip")
CHANGES = ("device", "precision", "batch_size", "num_workers")  # fields of Config that a prediction uses
LOG_EVERY_S = 30.0  # without a progress bar

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
    seconds_by_part: dict[str, float]  #: of this rank: start-up, network, outline refiner, and waits
    out: str

    @property
    def message(self) -> str:
        """Number of masks, rate, and parts of the time."""
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds_by_part.items())
        skipped = f", {self.skipped} existed" if self.skipped else ""
        broken = f", broken: {count_of(len(self.broken), 'image')}" if self.broken else ""
        return (
            f"{count_of(self.masks, 'mask')} in {self.out}/{skipped}{broken}: {self.images_per_s:.3g} images/s, "
            f"{self.seconds:.1f} s ({parts})"
        )


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
        refine: how the photo refines the outline: "learned" (the checkpoint's outline refiner), "crf" (a conditional
            random field), "none", or "auto": "learned" if the checkpoint has it, else "crf", with more than 32 classes
            "none".
        tta: "flip" averages the logits of the photo and of its mirror image; the network takes twice as long.
        resume: skip photos whose results all exist, and leave to other processes that `resume` into `out` what they
            are working on. When this returns, all results exist. `out/.fastseg.json` says which weights, `refine` and
            `tta` they were made with; with others, `resume` is refused.
        network: as for `fastseg.load`.
        changes: fields of `Config` that differ from the checkpoint's: `device`, `precision`, `batch_size` (photos per
            batch and rank) and `num_workers` (threads; 0, the default: one per core).

    Raises:
        CheckpointError, ConfigError, DataError: before anything is written.
        OutputError: a file cannot be written; earlier ones stay.
        FastsegError: the memory is full, even with one photo per forward pass.
    """
    began = time.perf_counter()
    check_method(refine)
    for field, value, known in (("mask_format", mask_format, tuple(MASK)), ("tta", tta, TTA)):
        if value not in known:
            raise ConfigError(f"{field}: must be one of {', '.join(known)}; got {value!r}.")
    paths = [images] if isinstance(images, str | os.PathLike) else images
    out, csv = str(Path(out)), os.fspath(csv)
    unused = changes.keys() - CHANGES
    if unused:
        field = min(unused)
        raise ConfigError(f"{field}: is not used by predict; it takes {', '.join(CHANGES)}. Leave {field} out.")
    model, trained = load_model(checkpoint, network)
    refine, refiner = choose_refinement(refine, checkpoint, trained)
    if trained.classes:
        _refuse_options_of_two_values(mask_format, probabilities)
    device = changes.get("device", "auto")
    with process_group(device), report_out_of_memory(device, "Lower batch_size or num_workers"):
        rank = get_rank()
        runtime, config = choose_inference_runtime(trained, {"num_workers": 0, **changes})
        photos = find_photos([os.fspath(path) for path in paths], out, csv=csv, resume=resume)
        refined = f"{refine} {checksum(refiner)}" if refiner else refine
        made_with = {
            "checkpoint": os.fspath(checkpoint),
            "weights": checksum(model),
            "refine": refined,
            "tta": tta,
        }
        if resume:
            refuse_other_settings(out, made_with)
        make_folders(photos, out, csv)
        if rank == 0:
            record_settings(out, made_with, resume=resume)
        temporaries = find_temporaries(photos, out)
        log.info("%s, refine=%s; %s", count_of(len(photos), "image"), refine, runtime.description)
        clock: Clock = defaultdict(float)
        forward = halve_until_it_fits(
            partial(predict_logits, runtime.to_device(model), runtime, tta == "flip"), runtime.device
        )
        refiner = refiner.to(runtime.device) if refiner else None
        barrier()  # before any rank writes a temporary file; and all begin to take batches at the same time
        started = time.perf_counter()
        clock["start-up"] = started - began
        if resume:  # another process may have begun at the same time
            refuse_other_settings(out, made_with)
        since = time_of_settings(out)
        cells = (config.image_height, config.image_width)
        options = OutputOptions(
            out, mask_format, probabilities, overlays, bool(csv), resume, refine, cells, config.classes, since
        )
        claims = choose_claims(-(-len(photos) // config.batch_size), out, resume=resume)
        with retain_freed_memory(runtime.device), closing(claims):
            batches = Batches(photos, config.batch_size, claims, temporaries)
            stages = Stages(options, config, forward, refiner, clock)
            mine = _predict_photos(batches, stages)
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


def _predict_photos(batches: Batches, stages: Stages) -> Tally:
    """What became of the photos of this process."""
    tally = Tally()
    num_threads = count_threads(stages.config.num_workers)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastseg-predict")
    total = -(-len(batches.photos) // get_world_size())  # about, for a rank
    try:
        with progress_bar(shown=get_rank() == 0) as bar:
            task = bar.add_task("predicting", total=total, note=" ")
            started = logged = time.perf_counter()
            rows = chain.from_iterable(stages.run(photos, pool) for photos in batches.rounds())
            for count, row in enumerate(rows, start=1):
                tally.add(row, stages.options)
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
