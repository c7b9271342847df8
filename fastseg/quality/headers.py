"""Checks every file before training: an image by its header and its end, a mask by its pixels."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastseg.classes import SegClass
from fastseg.data.decode import check_readable, decode_mask
from fastseg.data.host import check_sizes, decode_file
from fastseg.data.labels.decode import count_classes
from fastseg.data.labels.encoding import ClassEncoding, class_encoding
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads

__all__ = ["Fault", "check_pair", "check_pairs", "check_sets", "map_files"]

KINDS = {
    "unreadable": "unreadable",
    "size": "with a mask of another size",
    "values": "with a mask of more than two values",
    "classes": "with a mask of unlisted values",
}
MAX_NAMED = 3  # faults in the message, the first of each kind before the others

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


class Fault(NamedTuple):
    """Why a file cannot be used. Unlike a DataError it has no traceback, which would hold the file's bytes."""

    kind: str  # as `DataError.kind`
    message: str


def check_pair(pairs: Pairs, index: int, encoding: ClassEncoding | None = None) -> Fault | None:
    """Check one pair.

    The image's pixels are not decoded. The mask's are (a GIF takes 0.1 ms): nothing else shows which values it has.

    Args:
        encoding: of the classes; None for masks of two values.

    Returns:
        The first fault, its message with the path of the file; None if there is none.
    """
    mask_path, cell = pairs.mask_path(index), np.empty((1, 1), np.uint8)
    try:
        size = decode_file(pairs.image_path(index), check_readable)
        if encoding is None:
            mask_size = decode_file(mask_path, decode_mask, cell, "nearest")
        else:
            mask_size, _, _ = decode_file(mask_path, count_classes, encoding)
        check_sizes(mask_path, mask_size, size)
    except DataError as error:
        return Fault(error.kind, str(error))
    return None


def check_pairs(pairs: Pairs, **options: Any) -> Pairs:
    """`check_sets` for one set."""
    return check_sets([pairs], **options)[0]


def check_sets(
    sets: Sequence[Pairs],
    *,
    bad_samples: str = "raise",
    num_workers: int = 0,
    classes: tuple[SegClass, ...] = (),
    ignore_value: int = 255,
) -> list[Pairs]:
    """Check every pair of all sets, and report all faults in one error.

    Args:
        sets: for example the training and the validation pairs.
        bad_samples: "raise" refuses the data set; "skip" leaves out the faulty pairs and logs each.
        num_workers: threads; 0 for one per core.
        classes, ignore_value: of the masks, from the `Config`.

    Returns:
        The usable pairs of each set.

    Raises:
        DataError: pairs are faulty and bad_samples is "raise", or a set has no usable pair. The message counts the
            faults by kind and names the first files.
    """
    places = [(pairs, index) for pairs in sets for index in range(len(pairs))]
    encoding = class_encoding(classes, ignore_value)
    results = map_files(lambda place: check_pair(*place, encoding), places, count_threads(num_workers))
    faults = [fault for fault in results if fault]
    if faults and bad_samples == "raise":
        summary = _summarise(faults, len(places), encoding)
        raise DataError(f'{summary}. Replace the files, or pass bad_samples="skip" to leave them out.')
    usable, remaining = [], iter(results)
    for pairs in sets:
        bad = {index: fault for index, fault in enumerate(islice(remaining, len(pairs))) if fault}
        for fault in bad.values():
            log.warning("left out: %s", fault.message)
        if bad and len(bad) == len(pairs):
            raise DataError(
                f"{pairs.image_dir}: {_summarise(list(bad.values()), len(pairs), encoding)}. Replace the files."
            )
        usable.append(pairs.without(bad) if bad else pairs)
    return usable


def map_files(function: Callable[[T], U], items: Sequence[T], num_workers: int) -> list[U]:
    """`map` in `num_workers` threads, with a progress bar."""
    with progress_bar() as bar, ThreadPoolExecutor(num_workers) as pool:
        return list(bar.track(pool.map(function, items), total=len(items), description="checking files"))


def _summarise(faults: list[Fault], checked: int, encoding: ClassEncoding | None) -> str:
    counts = Counter(fault.kind for fault in faults)
    texts = {**KINDS, "values": KINDS["classes"]} if encoding else KINDS
    kinds = ", ".join(f"{count} {texts[kind]}" for kind, count in counts.items())
    firsts = [next(fault for fault in faults if fault.kind == kind) for kind in counts]
    named = [*firsts, *(fault for fault in faults if fault not in firsts)][:MAX_NAMED]
    first = "; ".join(fault.message for fault in named)
    return f"{len(faults)} of {checked} pairs cannot be used ({kinds}); first: {first}"
