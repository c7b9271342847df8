"""What is written for a photo: mask, probability and overlay at its own size, and its row of the table."""

import csv
import io
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.data.decode import Size, decode_full_mask
from fastseg.data.host import decode_file, load_photo
from fastseg.data.resample import mask_from_array
from fastseg.errors import DataError
from fastseg.masks.encode import encode_gif, encode_overlay, encode_png, write_file
from fastseg.masks.inputs import MASK, OVERLAY, PROBABILITY, Photo
from fastseg.masks.refine import guide_size, refine
from fastseg.masks.upsample import threshold_logits, upsample_logits

__all__ = ["Plan", "Row", "broken_row", "find_results", "write_results", "write_table"]

ENCODE_MASK = {"png": encode_png, "gif": encode_gif}
OVERLAY_WIDTH = 1280  # pixels at most
COLUMNS = ("image", "mask", "width", "height", "foreground", "error")


@dataclass(frozen=True)
class Plan:
    """What is to be written for each photo."""

    out: str
    mask_format: str
    probabilities: bool
    overlays: bool
    table: bool  # a CSV is wanted
    resume: bool
    refine: str  # one of refinement.METHODS
    cells: Size  # height and width that the network sees

    def path(self, photo: Photo, suffix: str) -> str:
        return os.path.join(self.out, photo.stem + suffix)

    def paths(self, photo: Photo) -> list[str]:
        wanted = ((MASK[self.mask_format], True), (PROBABILITY, self.probabilities), (OVERLAY, self.overlays))
        return [self.path(photo, suffix) for suffix, is_wanted in wanted if is_wanted]


@dataclass(frozen=True)
class Row:
    """What became of one photo."""

    photo: Photo
    size: Size = (0, 0)
    foreground: float = 0.0  # share of the pixels
    error: str = ""
    skipped: bool = False


def broken_row(photo: Photo, error: DataError) -> Row:
    """The row of a photo that cannot be predicted."""
    return Row(photo, error=str(error).removeprefix(f"{photo.path}: "))


def find_results(photo: Photo, plan: Plan) -> Row | None:
    """The row of a photo all of whose results are there; None if it is to be predicted."""
    paths = plan.paths(photo)
    if not all(map(os.path.exists, paths)):
        return None
    if not plan.table:
        return Row(photo, skipped=True)
    try:
        mask = decode_file(paths[0], decode_full_mask)
    except DataError:
        return None  # it is no mask that can be read: made anew
    height, width = mask.shape
    return Row(photo, (height, width), float(mask.mean()), skipped=True)


def write_results(photo: Photo, size: Size, logits: Tensor, plan: Plan) -> Row:
    """Write all files of a photo.

    Args:
        size: the photo's own, (height, width), as displayed.
        logits: (1, h, w) float32, on the CPU.

    Raises:
        DataError: a file cannot be written.
    """
    try:
        if plan.refine != "none":
            pixels = torch.from_numpy(load_photo(photo.path, guide_size(*plan.cells)))
            logits = refine(logits[None], pixels[None], size, plan.refine)[0]
        mask, probability = _at_full_size(logits, size, plan)
        files = {MASK[plan.mask_format]: ENCODE_MASK[plan.mask_format](mask)}
        if probability is not None:
            files[PROBABILITY] = encode_png(probability)
        if plan.overlays:
            files[OVERLAY] = _overlay(photo, mask)
    except DataError as error:
        return broken_row(photo, error)
    for suffix, data in files.items():
        write_file(plan.path(photo, suffix), data)
    return Row(photo, size, float(mask.mean()))


def _at_full_size(logits: Tensor, size: Size, plan: Plan) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
    """The mask (H, W), and the probability (H, W) 0..255 if it is wanted, of one photo's logits (1, h, w)."""
    if not plan.probabilities:
        return threshold_logits(logits[0].numpy(), *size), None
    full = upsample_logits(logits[None], *size)
    return (full[0, 0] > 0).numpy(), full[0, 0].sigmoid().mul_(255).round_().to(torch.uint8).numpy()


def _overlay(photo: Photo, mask: NDArray[np.bool_]) -> bytes:
    height, width = mask.shape
    shown_width = min(width, OVERLAY_WIDTH)
    shown_height = max(1, round(height * shown_width / width))
    shown = load_photo(photo.path, (shown_height, shown_width))
    return encode_overlay(shown, mask_from_array(mask, shown_height, shown_width))


def write_table(path: str, rows: list[Row], plan: Plan) -> None:
    """Write the CSV: a line a photo, with the reason where there is no mask.

    Raises:
        DataError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        height, width = row.size
        found = ["", "", "", ""] if row.error else [plan.paths(row.photo)[0], width, height, f"{row.foreground:.6f}"]
        writer.writerow([row.photo.path, *found, row.error])
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8
