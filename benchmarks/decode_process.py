"""The host decoder in a process of its own, for the comparison in dali_knobs.py.

Its threads then compete for the GIL of that process, not for that of the training loop; batches arrive in shared
memory and are copied to pinned memory. SPDL reports that decoding threads halved a training loop's step rate.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from numpy.typing import NDArray

import fastseg
from fastseg.data.batch import Batch, empty_batch
from fastseg.data.host import HostDecoder

SLOTS = 4  # batches in shared memory


def decode_in_process(
    pairs: fastseg.Pairs,
    height: int,
    width: int,
    batches: list[NDArray[np.int64]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """What `HostDecoder.decode` yields, for batches of one size; the process ends when the iterator is closed."""
    context = multiprocessing.get_context("spawn")
    images = torch.empty((SLOTS, len(batches[0]), height, width, 3), dtype=torch.uint8).share_memory_()
    masks = torch.empty((SLOTS, len(batches[0]), height, width), dtype=torch.uint8).share_memory_()
    free, ready = context.Queue(), context.Queue()
    for slot in range(SLOTS):
        free.put(slot)
    process = context.Process(target=_decode, args=(pairs, batches, num_workers, images, masks, free, ready))
    process.start()
    try:
        for _ in batches:
            slot, indices = ready.get()
            batch = empty_batch(indices, height, width, pin_memory=pin_memory)
            batch.images.copy_(images[slot])
            batch.masks.copy_(masks[slot])
            free.put(slot)
            yield batch
    finally:
        process.terminate()
        process.join()


def _decode(
    pairs: fastseg.Pairs,
    batches: list[NDArray[np.int64]],
    num_workers: int,
    images: torch.Tensor,
    masks: torch.Tensor,
    free: Any,
    ready: Any,
) -> None:
    torch.set_num_threads(1)
    decoder = HostDecoder(pairs, *masks.shape[2:], num_workers=num_workers)
    for batch in decoder.decode(batches):
        slot = free.get()
        images[slot].copy_(batch.images)
        masks[slot].copy_(batch.masks)
        ready.put((slot, batch.indices))
