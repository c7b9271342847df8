"""The files of a photo: mask, probability and overlay at its own size, and its row in the table."""

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.classes import SegClass
from fastseg.data.decode import Size, decode_full_mask
from fastseg.data.gif import Bytes, encode_gif
from fastseg.data.host import decode_file, load_photo
from fastseg.data.labels.decode import decode_full_classes
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.data.resample import mask_from_array
from fastseg.errors import DataError
from fastseg.masks.encode import encode_class_overlay, encode_overlay, encode_png
from fastseg.masks.inputs import MASK, OVERLAY, PROBABILITY, Photo
from fastseg.masks.refine import refine_by_crf
from fastseg.network.outline.upsample import label_logits, threshold_logits, upsample_logits
from fastseg.runtime.files import MAX_NAME_BYTES, atomic_write

__all__ = ["OutputOptions", "Row", "Tally", "failed_row", "find_results", "write_results", "write_table"]

ENCODE_MASK: dict[str, Callable[[Any], bytes]] = {"png": encode_png, "gif": encode_gif}
MAX_OVERLAY_WIDTH = 1280  # pixels
MAX_OVERLAY_HEIGHT = 60000  # without the legend; a JPEG has at most 65500 rows


@dataclass(frozen=True)
class OutputOptions:
    """What is written for each photo, and where."""

    out: str
    mask_format: str
    probabilities: bool
    overlays: bool
    table: bool  # whether a CSV is written
    resume: bool
    refine: str  # one of refine.METHODS
    cells: Size  # height and width of the network's output
    classes: tuple[SegClass, ...] = ()  # empty: masks of two values
    since: int = 0  # nanoseconds; files that are older do not count as results when a prediction resumes

    def path(self, photo: Photo, suffix: str) -> str:
        return os.path.join(self.out, photo.stem + suffix)

    def paths(self, photo: Photo) -> list[str]:
        wanted = ((MASK[self.mask_format], True), (PROBABILITY, self.probabilities), (OVERLAY, self.overlays))
        return [self.path(photo, suffix) for suffix, is_wanted in wanted if is_wanted]

    @property
    def values(self) -> Bytes:
        """(C,) the pixels that stand for the classes in a mask file: their values, or their numbers."""
        given = [item.value for item in self.classes if item.value is not None]
        return np.array(given if len(given) == len(self.classes) else range(len(self.classes)), np.uint8)


@dataclass(frozen=True)
class Row:
    """The result of one photo."""

    photo: Photo
    size: Size = (0, 0)
    shares: tuple[float, ...] = ()  # of the pixels: foreground, or each class
    error: str = ""
    skipped: bool = False


def failed_row(photo: Photo, error: DataError) -> Row:
    """The row of a photo that cannot be predicted."""
    return Row(photo, error=str(error).removeprefix(f"{photo.path}: "))


def find_results(photo: Photo, options: OutputOptions) -> Row | None:
    """The row of a photo whose results all exist; None for a photo to predict."""
    paths = options.paths(photo)
    if not all(_is_result(path, options.since) for path in paths):
        return None
    if not options.table:
        return Row(photo, skipped=True)
    try:
        if options.classes:
            mask: NDArray[Any] = decode_file(paths[0], decode_full_classes, ClassEncoding(options.classes, -1))
        else:
            mask = decode_file(paths[0], decode_full_mask)
    except DataError:
        return None  # not a readable mask: predict it again
    height, width = mask.shape
    return Row(photo, (height, width), _shares(mask, options), skipped=True)


def _is_result(path: str, since: int) -> bool:
    try:
        return os.stat(path).st_mtime_ns >= since
    except OSError:
        return False


def _shares(mask: NDArray[np.bool_] | Bytes, options: OutputOptions) -> tuple[float, ...]:
    if not options.classes:
        return (float(mask.mean()),)
    return tuple((np.bincount(mask.ravel(), minlength=len(options.classes)) / mask.size).tolist())


def write_results(photo: Photo, size: Size, logits: Tensor, options: OutputOptions) -> Row:
    """Write all files of a photo.

    Args:
        size: the photo's own, (height, width), as displayed.
        logits: (1, h, w) or, with classes, (C, h, w) float32, on the CPU; of the network's cells or a finer grid.

    Raises:
        OutputError: a file cannot be written.
    """
    names = [os.path.basename(path) for path in options.paths(photo)]
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in names):
        return failed_row(photo, DataError(f"its results have names that are too long (over {MAX_NAME_BYTES} bytes)"))
    try:
        if options.refine == "crf":  # "learned" has already happened, beside the network
            logits = refine_by_crf(logits, photo.path, size)
        mask, probability = _at_full_size(logits, size, options)
        if options.classes:
            files = {MASK["png"]: _encode_classes(mask, options)}
        else:
            files = {MASK[options.mask_format]: ENCODE_MASK[options.mask_format](mask)}
        if probability is not None:
            files[PROBABILITY] = encode_png(probability)
        if options.overlays:
            files[OVERLAY] = _overlay(photo, mask, options)
    except DataError as error:
        return failed_row(photo, error)
    for suffix, data in files.items():
        with atomic_write(options.path(photo, suffix), sync=False) as temporary:
            temporary.write_bytes(data)
    return Row(photo, size, _shares(mask, options))


def _at_full_size(logits: Tensor, size: Size, options: OutputOptions) -> tuple[Any, Bytes | None]:
    """The mask (H, W), and the probability (H, W) 0..255 where it is wanted, of one photo's logits."""
    if options.classes:
        return label_logits(logits.numpy(), *size), None
    if not options.probabilities:
        return threshold_logits(logits[0].numpy(), *size), None
    full = upsample_logits(logits[None], *size)
    return (full[0, 0] > 0).numpy(), full[0, 0].sigmoid().mul_(255).round_().to(torch.uint8).numpy()


def _encode_classes(mask: Bytes, options: OutputOptions) -> bytes:
    """A PNG in the classes' colours."""
    values = options.values
    palette = np.zeros((int(values.max()) + 1, 3), np.uint8)
    palette[values] = [item.colour for item in options.classes]
    return encode_png(values[mask], palette)


def _overlay(photo: Photo, mask: NDArray[Any], options: OutputOptions) -> bytes:
    height, width = mask.shape
    shown_width = min(width, MAX_OVERLAY_WIDTH)
    shown_height = max(1, round(height * shown_width / width))
    if shown_height > MAX_OVERLAY_HEIGHT:
        shown_width = max(1, round(shown_width * MAX_OVERLAY_HEIGHT / shown_height))
        shown_height = MAX_OVERLAY_HEIGHT
    shown = load_photo(photo.path, (shown_height, shown_width))
    if options.classes:
        rows, columns = (
            (np.arange(count) + 0.5) * size // count for count, size in ((shown_height, height), (shown_width, width))
        )
        labels = mask[np.ix_(rows.astype(np.int64), columns.astype(np.int64))]
        return encode_class_overlay(shown, labels, options.classes)
    return encode_overlay(shown, mask_from_array(mask, shown_height, shown_width))


@dataclass
class Tally:
    """What became of photos. Nothing is kept of a photo with a mask but its line of the table, if there is one."""

    masks: int = 0
    skipped: int = 0
    broken: list[tuple[int, str, str]] = field(default_factory=list)  # index, path, reason
    lines: list[tuple[int, str]] = field(default_factory=list)  # of the table: index, line

    def add(self, row: Row, options: OutputOptions) -> None:
        if row.error:
            self.broken.append((row.photo.index, row.photo.path, row.error))
        elif row.skipped:
            self.skipped += 1
        else:
            self.masks += 1
        if options.table:
            self.lines.append((row.photo.index, _table_line(row, options)))

    @classmethod
    def merge(cls, parts: list["Tally"]) -> "Tally":
        """All photos, in the order given."""
        broken = sorted(item for part in parts for item in part.broken)
        lines = sorted(item for part in parts for item in part.lines)
        return cls(sum(part.masks for part in parts), sum(part.skipped for part in parts), broken, lines)


def _table_line(row: Row, options: OutputOptions) -> str:
    height, width = row.size
    mask = [] if row.error else [options.paths(row.photo)[0], width, height, *map("{:.6f}".format, row.shares)]
    return _csv_line([row.photo.path, *(mask or [""] * (3 + len(_share_names(options)))), row.error])


def _csv_line(cells: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _share_names(options: OutputOptions) -> list[str]:
    return [f"share_{item.name}" for item in options.classes] or ["foreground"]


def write_table(path: str, tally: Tally, options: OutputOptions) -> None:
    """Write the CSV: one line per photo, with the reason where there is no mask.

    Raises:
        OutputError: it cannot be written.
    """
    with (
        atomic_write(path) as temporary,
        # Names of files need not be UTF-8.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.write(_csv_line(["image", "mask", "width", "height", *_share_names(options), "error"]))
        file.writelines(line for _, line in tally.lines)
