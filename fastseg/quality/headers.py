"""What is wrong with a data set, found before hours are spent on it."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from fastseg.data.decode import check_readable, decode_mask
from fastseg.data.host import decode_file, size_mismatch
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads

__all__ = ["Fault", "check_pairs", "check_sets", "check_pair"]

UNREADABLE, OTHER_SIZE, OTHER_VALUES = (
    "unreadable",
    "with a mask of another size",
    "with a mask of more than two values",
)
MAX_NAMED = 3  # files named in the sentence about all that are wrong, of each kind one first

log = logging.getLogger(__name__)


class Fault(NamedTuple):
    """Why a pair cannot be used."""

    kind: str
    sentence: str  # names the file


def check_pair(pairs: Pairs, index: int) -> Fault | None:
    """What is wrong with a pair, or None.

    Of the image the header is read and its end looked for; the mask is decoded whole (a GIF in 0.1 ms), because only
    its pixels tell whether it has two values.
    """
    mask_path, cell = pairs.mask_path(index), np.empty((1, 1), np.uint8)
    try:
        size = decode_file(pairs.image_path(index), check_readable)
        mask_size = decode_file(mask_path, lambda data: decode_mask(data, cell, "nearest"))
    except DataError as error:
        return Fault(OTHER_VALUES if "two values" in str(error) else UNREADABLE, str(error))
    return None if mask_size == size else Fault(OTHER_SIZE, size_mismatch(mask_path, mask_size, size))


def check_pairs(pairs: Pairs, *, bad_samples: str = "raise", num_workers: int = 0) -> Pairs:
    """`check_sets` of one set."""
    return check_sets([pairs], bad_samples=bad_samples, num_workers=num_workers)[0]


def check_sets(sets: Sequence[Pairs], *, bad_samples: str = "raise", num_workers: int = 0) -> list[Pairs]:
    """Look at every file before training begins, and report all that is wrong together.

    Args:
        sets: such as the training and the validation pairs.
        bad_samples: "raise" refuses the data set, saying how many pairs are wrong in which way and naming the first;
            "skip" leaves them out and names each.
        num_workers: threads; 0: one a core.

    Returns:
        Of each set the pairs that can be used.

    Raises:
        DataError: pairs are wrong and are not skipped, or not one of a set can be used.
    """
    places = [(pairs, index) for pairs in sets for index in range(len(pairs))]
    faults: dict[int, Fault] = {}
    with progress_bar() as bar, ThreadPoolExecutor(count_threads(num_workers)) as pool:
        task = bar.add_task("checking files", total=len(places))
        for place, fault in enumerate(pool.map(lambda place: check_pair(*place), places)):
            if fault is not None:
                faults[place] = fault
            bar.advance(task)
    if faults and bad_samples == "raise":
        raise DataError(
            f"{_summarise(list(faults.values()), len(places))}. "
            'Replace the files, or pass bad_samples="skip" to leave them out.'
        )
    usable = []
    for pairs in sets:
        bad = {places[place][1]: fault for place, fault in faults.items() if places[place][0] is pairs}
        for fault in bad.values():
            log.warning("left out: %s", fault.sentence)
        if bad and len(bad) == len(pairs):
            raise DataError(f"{pairs.image_dir}: {_summarise(list(bad.values()), len(pairs))}. Replace the files.")
        usable.append(pairs.without(bad) if bad else pairs)
    return usable


def _summarise(faults: list[Fault], checked: int) -> str:
    counts = Counter(fault.kind for fault in faults)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    firsts = [next(fault for fault in faults if fault.kind == kind) for kind in counts]
    named = [*firsts, *(fault for fault in faults if fault not in firsts)][:MAX_NAMED]
    first = "; ".join(fault.sentence for fault in named)
    return f"{len(faults)} of {checked} pairs cannot be used ({kinds}); first: {first}"
