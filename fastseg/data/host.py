"""HostDecoder: threads that read and decode pairs on the CPU, ahead of whoever takes the batches.

libjpeg-turbo, our GIF decoder and Pillow all release the GIL, so threads scale with the cores; there are no worker
processes to start, to copy from, or to die.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import BadSamples, Batch
from fastseg.data.decode import Size, decode_image, decode_mask
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError

__all__ = ["HostDecoder", "check_sizes", "decode_file", "load_photo", "decode_pair", "read_file", "size_mismatch"]

BATCHES_AHEAD = 3

T = TypeVar("T")


def read_file(path: str) -> bytes:
    """The bytes of a file; DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def decode_file(path: str, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the bytes of a file; a DataError names the file."""
    data = read_file(path)
    try:
        return decode(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def load_photo(path: str, size: Size) -> NDArray[np.uint8]:
    """A photo on a grid of `size`, (height, width): (H, W, 3) uint8. A DataError names the file."""
    pixels = np.empty((*size, 3), np.uint8)
    decode_file(path, lambda data: decode_image(data, pixels))
    return pixels


def decode_pair(
    pairs: Pairs, index: int, image: NDArray[np.uint8], mask: NDArray[np.uint8], mask_resize: str = "area"
) -> None:
    """Read and decode one pair.

    Args:
        image: (H, W, 3) uint8, written.
        mask: (H, W) uint8, written.
        mask_resize: "area" or "nearest".

    Raises:
        DataError: a file is missing or damaged, or the two differ in size; the message names the file.
    """
    mask_path = pairs.mask_path(index)
    size = decode_file(pairs.image_path(index), lambda data: decode_image(data, image))
    check_sizes(mask_path, decode_file(mask_path, lambda data: decode_mask(data, mask, mask_resize)), size)


def check_sizes(mask_path: str, mask_size: Size, image_size: Size) -> None:
    """DataError where a mask has another size than its image."""
    if mask_size != image_size:
        raise DataError(size_mismatch(mask_path, mask_size, image_size))


def size_mismatch(mask_path: str, mask_size: Size, image_size: Size) -> str:
    """The sentence about a mask of another size than its image."""
    (mask_height, mask_width), (height, width) = mask_size, image_size
    return f"{mask_path}: must have its image's size, {width}x{height}; it has {mask_width}x{mask_height}"


class HostDecoder:
    """Decode batches of pairs with threads.

    Args:
        pairs: the files.
        height, width: of the decoded pixels.
        mask_resize: "area" or "nearest".
        num_workers: threads.
        bad: what to do with broken files; by default the first one raises.
        pin_memory: batches in page-locked memory, from which a GPU copies without waiting.
    """

    name = "host"

    def __init__(
        self,
        pairs: Pairs,
        height: int,
        width: int,
        *,
        mask_resize: str = "area",
        num_workers: int = 2,
        bad: BadSamples | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.pairs = pairs
        self.height, self.width = height, width
        self.mask_resize = mask_resize
        self.num_workers = num_workers
        self.bad = bad or BadSamples(pairs, "raise")
        self.pin_memory = pin_memory

    def decode(self, batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """Decode `batches` of pair indices, in order, up to three batches ahead of the caller.

        Yields:
            A `Batch` of new tensors each time: what was yielded before stays valid.

        Raises:
            DataError: a pair cannot be decoded and bad samples are not skipped.
        """
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="fastseg-decode")
        ahead: deque[_Filling] = deque()
        todo = iter(batches)
        try:
            while True:
                for indices in itertools.islice(todo, BATCHES_AHEAD - len(ahead)):
                    ahead.append(self._start(pool, indices))
                if not ahead:
                    return
                filling = ahead.popleft()
                for thread in filling.threads:
                    thread.result()
                if filling.errors:
                    raise filling.errors[min(filling.errors)]
                yield filling.batch
        finally:  # the caller may leave early; then what is queued is dropped and what runs is waited for
            for filling in ahead:
                filling.places.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, indices: NDArray[np.int64]) -> "_Filling":
        shape = (len(indices), self.height, self.width)
        batch = Batch(
            torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=self.pin_memory),
            torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory),
            np.array(indices, dtype=np.int64),
        )
        filling = _Filling(batch, deque(range(len(indices))))
        # A job a thread and batch, not one a pair: handing a pair over costs a good part of what its mask costs.
        for _ in range(min(self.num_workers, len(indices))):
            filling.threads.append(pool.submit(self._fill, filling))
        return filling

    def _fill(self, filling: "_Filling") -> None:
        """Decode pairs of a batch, beside other threads, until none is left or one breaks."""
        images, masks, indices = filling.batch.images.numpy(), filling.batch.masks.numpy(), filling.batch.indices
        while not filling.errors:
            try:
                place = filling.places.popleft()
            except IndexError:
                return
            try:
                indices[place] = self._decode(int(indices[place]), images[place], masks[place])
            except DataError as error:
                filling.errors[place] = error

    def _decode(self, index: int, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> int:
        """Decode a pair, or the one that replaces it; returns which."""
        while True:
            index = self.bad.replacement(index)
            try:
                decode_pair(self.pairs, index, image, mask, self.mask_resize)
                return index
            except DataError as error:
                self.bad.report(index, error)


@dataclass
class _Filling:
    """A batch that threads are filling."""

    batch: Batch
    places: deque[int]  # that no thread has taken yet
    errors: dict[int, DataError] = field(default_factory=dict)  # by place; the first is raised, as one thread would
    threads: list[Future[None]] = field(default_factory=list)
