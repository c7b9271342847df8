"""What is wrong with a data set, found before hours are spent on it."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastseg.data.decode import check_readable, decode_mask
from fastseg.data.host import read_file, size_mismatch
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError
from fastseg.progress import progress_bar

__all__ = ["check_pairs", "fault_of"]

NAMED = 3  # files named in the sentence about all that are wrong

log = logging.getLogger(__name__)


def fault_of(pairs: Pairs, index: int) -> str | None:
    """Why a pair cannot be used, in a sentence that names the file; None if nothing is wrong.

    Of the image the header is read and its end looked for; the mask is decoded whole (a GIF in 0.1 ms), because only
    its pixels tell whether it has two values.
    """
    path = pairs.image_path(index)
    try:
        size = check_readable(read_file(path))
        path = pairs.mask_path(index)
        mask_size = decode_mask(read_file(path), np.empty((1, 1), np.uint8), "nearest")
    except DataError as error:
        message = str(error)
        return message if message.startswith(path) else f"{path}: {message}"
    return None if mask_size == size else size_mismatch(path, mask_size, size)


def check_pairs(pairs: Pairs, *, bad_samples: str = "raise", num_workers: int = 2) -> Pairs:
    """Look at every file before training begins.

    Args:
        bad_samples: "raise" refuses the data set, naming how many pairs are wrong and the first of them; "skip"
            leaves them out and names each.

    Returns:
        The pairs that can be used.

    Raises:
        DataError: pairs are wrong and are not skipped, or not one can be used.
    """
    faults: dict[int, str] = {}
    with progress_bar() as bar, ThreadPoolExecutor(num_workers) as pool:
        task = bar.add_task("checking files", total=len(pairs), note="")
        started = time.perf_counter()
        for index, fault in enumerate(pool.map(lambda i: fault_of(pairs, i), range(len(pairs)))):
            if fault is not None:
                faults[index] = fault
            if index % 64 == 63:
                rate = (index + 1) / (time.perf_counter() - started)
                bar.update(task, completed=index + 1, note=f"{rate:.0f} pairs/s")
    if not faults:
        return pairs
    if bad_samples == "raise":
        first = "; ".join(list(faults.values())[:NAMED])
        raise DataError(
            f"{len(faults)} of {len(pairs)} pairs cannot be used; first: {first}. "
            'Replace the files, or pass bad_samples="skip" to leave them out.'
        )
    for fault in faults.values():
        log.warning("left out: %s", fault)
    if len(faults) == len(pairs):
        raise DataError(f"{pairs.image_dir}: not one of its {len(pairs)} pairs can be used; first: {faults[0]}.")
    return pairs.without(faults)
