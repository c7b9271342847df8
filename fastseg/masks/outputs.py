"""The files of a photo: mask, probability and overlay at its own size, and its row in the table."""

import csv
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.data.decode import Size, decode_full_mask
from fastseg.data.gif import encode_gif
from fastseg.data.host import decode_file, load_photo
from fastseg.data.resample import mask_from_array
from fastseg.errors import DataError
from fastseg.masks.encode import encode_overlay, encode_png
from fastseg.masks.inputs import MASK, OVERLAY, PROBABILITY, Photo
from fastseg.masks.refine import guide_size, refine
from fastseg.masks.upsample import threshold_logits, upsample_logits
from fastseg.runtime.files import MAX_NAME_BYTES, atomic_write

__all__ = ["OutputOptions", "Row", "failed_row", "find_results", "write_results", "write_table"]

ENCODE_MASK = {"png": encode_png, "gif": encode_gif}
MAX_OVERLAY_WIDTH = 1280  # pixels
COLUMNS = ("image", "mask", "width", "height", "foreground", "error")


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

    def path(self, photo: Photo, suffix: str) -> str:
        return os.path.join(self.out, photo.stem + suffix)

    def paths(self, photo: Photo) -> list[str]:
        wanted = ((MASK[self.mask_format], True), (PROBABILITY, self.probabilities), (OVERLAY, self.overlays))
        return [self.path(photo, suffix) for suffix, is_wanted in wanted if is_wanted]


@dataclass(frozen=True)
class Row:
    """The result of one photo."""

    photo: Photo
    size: Size = (0, 0)
    foreground: float = 0.0  # share of the pixels
    error: str = ""
    skipped: bool = False


def failed_row(photo: Photo, error: DataError) -> Row:
    """The row of a photo that cannot be predicted."""
    return Row(photo, error=str(error).removeprefix(f"{photo.path}: "))


def find_results(photo: Photo, options: OutputOptions) -> Row | None:
    """The row of a photo whose results all exist; None for a photo to predict."""
    paths = options.paths(photo)
    if not all(map(os.path.exists, paths)):
        return None
    if not options.table:
        return Row(photo, skipped=True)
    try:
        mask = decode_file(paths[0], decode_full_mask)
    except DataError:
        return None  # not a readable mask: predict it again
    height, width = mask.shape
    return Row(photo, (height, width), float(mask.mean()), skipped=True)


def write_results(photo: Photo, size: Size, logits: Tensor, options: OutputOptions) -> Row:
    """Write all files of a photo.

    Args:
        size: the photo's own, (height, width), as displayed.
        logits: (1, h, w) float32, on the CPU.

    Raises:
        OutputError: a file cannot be written.
    """
    names = [os.path.basename(path) for path in options.paths(photo)]
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in names):
        return failed_row(photo, DataError(f"its results have names that are too long (over {MAX_NAME_BYTES} bytes)"))
    try:
        if options.refine != "none":
            guide = torch.from_numpy(load_photo(photo.path, guide_size(*options.cells)))
            logits = refine(logits[None], guide[None], size, options.refine)[0]
        mask, probability = _at_full_size(logits, size, options)
        files = {MASK[options.mask_format]: ENCODE_MASK[options.mask_format](mask)}
        if probability is not None:
            files[PROBABILITY] = encode_png(probability)
        if options.overlays:
            files[OVERLAY] = _overlay(photo, mask)
    except DataError as error:
        return failed_row(photo, error)
    for suffix, data in files.items():
        with atomic_write(options.path(photo, suffix), sync=False) as temporary:
            temporary.write_bytes(data)
    return Row(photo, size, float(mask.mean()))


def _at_full_size(
    logits: Tensor, size: Size, options: OutputOptions
) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
    """The mask (H, W), and the probability (H, W) 0..255 where it is wanted, of one photo's logits (1, h, w)."""
    if not options.probabilities:
        return threshold_logits(logits[0].numpy(), *size), None
    full = upsample_logits(logits[None], *size)
    return (full[0, 0] > 0).numpy(), full[0, 0].sigmoid().mul_(255).round_().to(torch.uint8).numpy()


def _overlay(photo: Photo, mask: NDArray[np.bool_]) -> bytes:
    height, width = mask.shape
    shown_width = min(width, MAX_OVERLAY_WIDTH)
    shown_height = max(1, round(height * shown_width / width))
    shown = load_photo(photo.path, (shown_height, shown_width))
    return encode_overlay(shown, mask_from_array(mask, shown_height, shown_width))


def write_table(path: str, rows: list[Row], options: OutputOptions) -> None:
    """Write the CSV: one line per photo, with the reason where there is no mask.

    Raises:
        OutputError: it cannot be written.
    """
    with (
        atomic_write(path) as temporary,
        # Names of files need not be UTF-8.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            height, width = row.size
            mask = [] if row.error else [options.paths(row.photo)[0], width, height, f"{row.foreground:.6f}"]
            writer.writerow([row.photo.path, *(mask or [""] * 4), row.error])
