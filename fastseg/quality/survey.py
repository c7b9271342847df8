"""Decodes every file of a data set once: a mask at its full size, a JPEG at an eighth, which reads all of its bytes."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastseg.data.decode import Size, decode_image, decode_mask, image_size
from fastseg.data.host import read_file
from fastseg.data.labels.decode import count_classes
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.data.pairs import Matches
from fastseg.errors import DataError
from fastseg.quality.duplicates import THUMBNAIL_SIDE, perceptual_hash
from fastseg.quality.headers import Fault, map_files

__all__ = ["Mask", "Photo", "ScannedSet", "scan_files"]

BLOCK = 8  # pixels: foreground is averaged in blocks of this side, so small that rounding loses no single pixel

T = TypeVar("T")


class Photo(NamedTuple):
    """Properties of an image file."""

    size: Size
    digest: bytes  # of the file
    phash: NDArray[np.bool_] | None  # None if no duplicates are sought


class Mask(NamedTuple):
    """Properties of a mask file."""

    size: Size
    foreground: float  # share of its pixels; 0 with classes
    counts: NDArray[np.int64]  # its pixels of each class; empty without classes
    ignored: int = 0  # pixels, with classes


@dataclass(frozen=True)
class ScannedSet:
    """A set, and the properties or the fault of each of its files by path."""

    name: str
    matches: Matches
    images: dict[str, Photo | Fault] = field(default_factory=dict)
    masks: dict[str, Mask | Fault] = field(default_factory=dict)

    def photos(self) -> dict[str, Photo]:
        """The images without a fault, sorted by path."""
        return {path: photo for path, photo in sorted(self.images.items()) if isinstance(photo, Photo)}


def scan_files(
    sets: Sequence[ScannedSet], num_workers: int, duplicates: bool, encoding: ClassEncoding | None = None
) -> None:
    """Decode every file and record its properties, or its fault, in its set."""
    jobs: list[tuple[ScannedSet, str, str]] = []  # set, image and mask; "" where there is none
    for part in sets:
        pairs = part.matches.pairs
        for i, mask in enumerate(pairs.masks):
            jobs.append((part, pairs.image_path(i), pairs.mask_path(i) if mask else ""))
        for mask in (*part.matches.second_masks.values(), *part.matches.masks_without_image):
            jobs.append((part, "", os.path.join(pairs.mask_dir, mask)))

    def scan(job: tuple[ScannedSet, str, str]) -> None:
        part, image, mask = job
        if image:
            part.images[image] = _try_file(image, lambda data: _scan_image(data, duplicates))
        if mask:
            part.masks[mask] = _try_file(mask, lambda data: _scan_mask(data, encoding))

    map_files(scan, jobs, num_workers)


def _try_file(path: str, scan: Callable[[bytes], T]) -> T | Fault:
    """The result of `scan`, or a fault whose message leaves out the path."""
    try:
        return scan(read_file(path))
    except DataError as error:
        return Fault(error.kind, str(error))


def _scan_image(data: bytes, duplicates: bool) -> Photo:
    thumbnail = np.empty((THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    size = decode_image(data, thumbnail)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return Photo(size, digest, perceptual_hash(thumbnail) if duplicates else None)


def _scan_mask(data: bytes, encoding: ClassEncoding | None) -> Mask:
    if encoding is not None:
        size, counts, ignored = count_classes(data, encoding)
        return Mask(size, 0.0, counts, ignored)
    height, width = image_size(data)
    blocks = np.empty((-(-height // BLOCK), -(-width // BLOCK)), np.uint8)
    size = decode_mask(data, blocks, "area")
    return Mask(size, float(blocks.mean() / 255), np.empty(0, np.int64))
