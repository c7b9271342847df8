"""What every file of a data set holds: each is decoded once, to its last byte; a JPEG at an eighth of its size."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastseg.data.decode import Size, decode_image, decode_mask, image_size
from fastseg.data.host import read_file
from fastseg.data.pairs import Matches
from fastseg.errors import DataError
from fastseg.quality.duplicates import CELLS, fingerprint
from fastseg.runtime.progress import progress_bar

__all__ = ["Mask", "Photo", "ScannedSet", "scan_files"]

BLOCK = 8  # pixels a side of the cells in which foreground is counted: no single pixel is lost in rounding

T = TypeVar("T")


class Photo(NamedTuple):
    """What an image file holds."""

    size: Size
    digest: bytes  # of the file
    bits: NDArray[np.bool_] | None  # its fingerprint, where copies are looked for


class Mask(NamedTuple):
    """What a mask file holds."""

    size: Size
    foreground: float  # share of its pixels


@dataclass(frozen=True)
class ScannedSet:
    """A set and what its files hold; a string is why a file cannot be used."""

    name: str
    matches: Matches
    photos: dict[str, Photo | str] = field(default_factory=dict)  # by path
    masks: dict[str, Mask | str] = field(default_factory=dict)

    def good_photos(self) -> tuple[list[str], list[Photo]]:
        """Paths and photos that could be decoded, by path."""
        good = sorted((path, photo) for path, photo in self.photos.items() if isinstance(photo, Photo))
        return [path for path, _ in good], [photo for _, photo in good]


def scan_files(parts: Sequence[ScannedSet], num_workers: int, copies: bool) -> None:
    """Decode every file and note what it holds in its part."""
    places: list[tuple[ScannedSet, str, str]] = []  # a pair, or a file alone
    for part in parts:
        pairs = part.matches.pairs
        for i, mask in enumerate(pairs.masks):
            places.append((part, pairs.image_path(i), pairs.mask_path(i) if mask else ""))
        for mask in (*part.matches.doubles.values(), *part.matches.without_image):
            places.append((part, "", os.path.join(pairs.mask_dir, mask)))

    def look(place: tuple[ScannedSet, str, str]) -> None:
        part, photo, mask = place
        if photo:
            part.photos[photo] = _or_reason(photo, lambda data: _look_at_photo(data, copies))
        if mask and mask not in part.masks:
            part.masks[mask] = _or_reason(mask, _look_at_mask)

    with progress_bar() as bar, ThreadPoolExecutor(num_workers) as pool:
        task = bar.add_task("checking files", total=len(places))
        for _ in pool.map(look, places):
            bar.advance(task)


def _or_reason(path: str, look: Callable[[bytes], T]) -> T | str:
    """What is in a file, or why it cannot be used."""
    try:
        return look(read_file(path))
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")


def _look_at_photo(data: bytes, copies: bool) -> Photo:
    cells = np.empty((CELLS, CELLS, 3), np.uint8)
    size = decode_image(data, cells)
    return Photo(size, hashlib.blake2b(data, digest_size=16).digest(), fingerprint(cells) if copies else None)


def _look_at_mask(data: bytes) -> Mask:
    height, width = image_size(data)
    cells = np.empty((-(-height // BLOCK), -(-width // BLOCK)), np.uint8)
    size = decode_mask(data, cells, "area")
    return Mask(size, float(cells.mean() / 255))
