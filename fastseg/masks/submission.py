"""Kaggle's Carvana submission: one line per image with its run-length encoded mask, 100,064 for the test set.

    fastseg submission --masks predictions --images data/test --out submission.csv

A run is a first pixel and a length. Pixels are counted from 1, left to right and then top to bottom; a run may continue
in the next row. An empty mask is the empty string.
"""

import csv
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.data.decode import decode_full_mask, image_size
from fastseg.data.host import check_sizes, decode_file, read_file
from fastseg.data.pairs import find_images, find_masks, mask_stem
from fastseg.errors import ConfigError, DataError
from fastseg.messages import count_of
from fastseg.runtime.files import atomic_write
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads, map_ahead

__all__ = ["BrokenMasksError", "decode_rle", "encode_rle", "write_submission"]

HEADER = ("img", "rle_mask")
AHEAD = 4  # masks per thread that are encoded ahead of the CSV
MAX_NAMED = 3  # files named in a message about many
PALETTE_PNG = b"\x89PNG", 3  # the first bytes, and the colour type, byte 25
MAX_SHOWN = 40  # characters of a wrong text in its error

log = logging.getLogger(__name__)

Mask = NDArray[np.bool_] | NDArray[np.uint8]


class BrokenMasksError(DataError):
    """Masks cannot be used; `messages` has one for each. No CSV is written: Kaggle refuses one that lacks lines."""

    def __init__(self, summary: str, messages: list[str]) -> None:
        super().__init__(summary)
        self.messages = messages


class Job(NamedTuple):
    """A line of the CSV."""

    image: str  # name, as the CSV has it
    encode: Callable[[], str]  # called in a thread


def encode_rle(mask: Mask) -> str:
    """Run-length encoding of a mask as Kaggle's Carvana competition defines it.

    Args:
        mask: (H, W) bool or uint8; nonzero is foreground.

    Returns:
        `start length` pairs joined by spaces, row by row; the first pixel is number 1.

    Raises:
        ValueError: shape or dtype differ.

    >>> encode_rle(np.array([[0, 1, 1], [1, 0, 1]], np.uint8))
    '2 3 6 1'
    """
    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"a mask must be bool or uint8 (H, W); got {mask.dtype} {mask.shape}.")
    pixels = mask.ravel().astype(bool, copy=False)
    is_bound = np.empty(pixels.size + 1, bool)  # one array: allocating another costs more than the comparison
    is_bound[0], is_bound[-1] = pixels[0], pixels[-1]
    np.not_equal(pixels[1:], pixels[:-1], out=is_bound[1:-1])
    bounds = np.flatnonzero(is_bound)
    starts, ends = bounds[::2], bounds[1::2]
    return " ".join(map(str, np.stack([starts + 1, ends - starts], axis=1).ravel().tolist()))


def decode_rle(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of a run-length encoding.

    Raises:
        DataError: the text is not pairs of whole numbers, or a run is empty, overlaps another, is out of order, or
            leaves the mask.

    >>> decode_rle("2 3 6 1", 2, 3).astype(int)
    array([[0, 1, 1],
           [1, 0, 1]])
    """
    try:
        numbers = np.array([int(word) for word in text.split()], dtype=np.int64)
    except (ValueError, OverflowError):
        shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise DataError(f"run lengths must be whole numbers; got {shown!r}.") from None
    if numbers.size % 2:
        raise DataError(f"run lengths must be pairs of a start and a length; got {numbers.size} numbers.")
    starts, lengths, size = numbers[::2] - 1, numbers[1::2], height * width
    ends = starts + lengths
    previous = np.concatenate([[0], ends[:-1]]) if ends.size else ends
    wrong = (starts < previous) | (lengths < 1) | (lengths > size) | (starts > size - lengths)
    if wrong.any():
        first = wrong.argmax()
        raise DataError(
            f"runs must ascend without overlap within the {size} pixels of a {width}x{height} mask; "
            f"got {starts[first] + 1} {lengths[first]} after pixel {previous[first]}."
        )
    bounds = np.stack([starts, ends], axis=1).ravel()
    lengths = np.diff(bounds, prepend=0, append=size)  # of background and foreground, in turn
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths).reshape(height, width)


def write_submission(
    masks: str | os.PathLike[str] | Iterable[tuple[str, Mask]],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
) -> int:
    """Write the CSV of a submission, `img,rle_mask`, atomically and in constant memory.

    Args:
        masks: folder of GIF, PNG or BMP masks, `<stem>_mask.<ext>` or `<stem>.<ext>`; or pairs of an image's name, such
            as 0004d4463b50_01.jpg, and its mask (H, W), bool or uint8, consumed lazily.
        out: the file.
        images: for a folder of masks, the folder of the images to be answered: it gives the names, and every mask
            must have its image's size. Without it, names are `<stem>.jpg`.
        num_workers: threads that decode and encode; 0: one per core.

    Returns:
        Number of lines below the header, which are in the order of the names, or of the pairs.

    Raises:
        DataError: a folder is missing or empty, an image has no mask, or more than one.
        BrokenMasksError: mask files are damaged or of another size than their image; all of them are listed.
        OutputError: `out` cannot be written.
        ConfigError: `images` is given without a folder of masks, or the masks are of classes.
    """
    if isinstance(masks, str | os.PathLike):
        named = _masks_by_image(os.fspath(masks), images)
        _refuse_classes(os.path.join(masks, next(iter(named.values()))))
        jobs, total = _jobs_of_files(named, os.fspath(masks), images), len(named)
    elif images is not None:
        raise ConfigError(f"images: goes with a folder of masks, not with masks in memory; got {os.fspath(images)}.")
    else:
        jobs, total = (Job(name, partial(encode_rle, mask)) for name, mask in masks), None
    lines, done, began = 0, 0, time.perf_counter()
    broken: list[str] = []
    with (
        atomic_write(out) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        progress_bar() as bar,
        ThreadPoolExecutor(count_threads(num_workers), thread_name_prefix="fastseg-encode") as pool,
    ):
        task = bar.add_task("encoding masks", total=total, note=" ")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        ahead = AHEAD * count_threads(num_workers)
        with closing(map_ahead(pool, _encode_row, jobs, ahead)) as rows:
            for row in rows:
                try:
                    writer.writerow(row.result())
                    lines += 1
                except DataError as error:
                    broken.append(str(error))
                done += 1
                bar.update(task, completed=done, note=f"{done / (time.perf_counter() - began):.0f} masks/s")
        if broken:
            raise BrokenMasksError(
                f"{len(broken)} of {done} masks cannot be used, so {out} was not written; first: "
                f"{'; '.join(broken[:MAX_NAMED])}. Replace them and run again.",
                broken,
            )
    return lines


def _refuse_classes(path: str) -> None:
    """Raise a ConfigError if a mask is a palette PNG of more than two values, as `predict` writes of classes."""
    try:
        data = read_file(path)
        decode_full_mask(data)
    except DataError as error:  # other faults are reported with those of the other masks
        if error.kind == "values" and data.startswith(PALETTE_PNG[0]) and data[25] == PALETTE_PNG[1]:
            raise ConfigError(
                f"masks: must have two values (a submission separates cars from the rest); {path} has classes. Write "
                "masks with a network of two values."
            ) from None


def _encode_row(job: Job) -> tuple[str, str]:
    return job.image, job.encode()


def _masks_by_image(mask_dir: str, image_dir: str | os.PathLike[str] | None) -> dict[str, str]:
    """Mask file by image name, in the order of the images."""
    images = [] if image_dir is None else find_images(image_dir)
    stems = {os.path.splitext(name)[0] for name in images}
    masks: dict[str, str] = {}
    for name in find_masks(mask_dir):
        first = masks.setdefault(mask_stem(name, stems), name)
        if first != name:
            raise DataError(f"{mask_dir}: must hold one mask per image; found {first} and {name}. Keep one of each.")
    if image_dir is None:
        return {f"{stem}.jpg": masks[stem] for stem in sorted(masks)}
    by_image = {name: masks.get(os.path.splitext(name)[0], "") for name in images}
    missing = [name for name, mask in by_image.items() if not mask]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(by_image)} images in {os.fspath(image_dir)} have no mask in {mask_dir}; first: "
            f"{', '.join(missing[:MAX_NAMED])}. Add their masks."
        )
    if len(masks) > len(by_image):
        log.info("%s: left out %s without an image", mask_dir, count_of(len(masks) - len(by_image), "mask"))
    return by_image


def _jobs_of_files(named: dict[str, str], mask_dir: str, image_dir: str | os.PathLike[str] | None) -> Iterator[Job]:
    for image, mask in named.items():
        image_path = None if image_dir is None else os.path.join(image_dir, image)
        yield Job(image, partial(_encode_file, os.path.join(mask_dir, mask), image_path))


def _encode_file(mask_path: str, image_path: str | None) -> str:
    mask = decode_file(mask_path, decode_full_mask)
    if image_path is not None:
        check_sizes(mask_path, (mask.shape[0], mask.shape[1]), decode_file(image_path, image_size))
    return encode_rle(mask)
