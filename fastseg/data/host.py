"""HostDecoder: threads that read and decode pairs on the CPU, ahead of the caller.

libjpeg-turbo, our GIF decoder and Pillow all release the GIL, so threads scale with the cores. There are no worker
processes to start, to copy from, or to lose.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastseg.classes import SegClass
from fastseg.data.batch import BadSamples, Batch, empty_batch
from fastseg.data.decode import Size, decode_image, decode_mask
from fastseg.data.labels.decode import decode_classes
from fastseg.data.labels.encoding import class_encoding
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError

__all__ = ["HostDecoder", "check_sizes", "decode_file", "load_photo", "read_file"]

BATCHES_AHEAD = 3

P = ParamSpec("P")
T = TypeVar("T")


class HostDecoder:
    """Decode batches of pairs with threads.

    Args:
        pairs: the files.
        height, width: of the decoded pixels.
        mask_resize: "area" or "nearest".
        classes: of the masks, from `Config.classes`; empty: masks of two values.
        ignore_value: with classes, the value of ignored pixels; -1: none.
        num_workers: threads.
        bad: policy for broken files; by default the first one raises.
        pin_memory: put batches in page-locked memory, from which a GPU copies asynchronously.
    """

    name = "host"

    def __init__(
        self,
        pairs: Pairs,
        height: int,
        width: int,
        *,
        mask_resize: str = "area",
        classes: tuple[SegClass, ...] = (),
        ignore_value: int = 255,
        num_workers: int = 2,
        bad: BadSamples | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.pairs = pairs
        self.height, self.width = height, width
        self.mask_resize = mask_resize
        self.encoding = class_encoding(classes, ignore_value)
        self.num_workers = num_workers
        self.bad = bad or BadSamples(pairs, "raise")
        self.pin_memory = pin_memory

    def decode(self, batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """Decode `batches` of pair indices, in order, up to three batches ahead of the caller.

        Yields:
            A `Batch` of new tensors each time, so that earlier batches stay valid.

        Raises:
            DataError: a pair cannot be decoded and bad samples are not skipped.
        """
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="fastseg-decode")
        ahead: deque[_BatchInProgress] = deque()
        remaining = iter(batches)
        try:
            while True:
                for indices in itertools.islice(remaining, BATCHES_AHEAD - len(ahead)):
                    ahead.append(self._start(pool, indices))
                if not ahead:
                    return
                first = ahead.popleft()
                for job in first.jobs:
                    job.result()
                if first.errors:
                    raise first.errors[min(first.errors)]
                yield first.batch
        finally:  # the caller may leave early: drop what is queued and wait for what runs
            for later in ahead:
                later.places.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def release(self) -> None:
        """Free what the decoder holds between epochs: nothing here; `DaliDecoder` has a pipeline."""

    def _start(self, pool: ThreadPoolExecutor, indices: NDArray[np.int64]) -> "_BatchInProgress":
        batch = empty_batch(indices, self.height, self.width, pin_memory=self.pin_memory)
        started = _BatchInProgress(batch, deque(range(len(indices))))
        # One job per thread and batch, not one per pair: submitting a job takes almost as long as decoding a mask.
        for _ in range(min(self.num_workers, len(indices))):
            started.jobs.append(pool.submit(self._fill, started))
        return started

    def _fill(self, started: "_BatchInProgress") -> None:
        """Decode pairs of a batch, beside other threads, until none is left or one is broken."""
        images, masks, indices = started.batch.images.numpy(), started.batch.masks.numpy(), started.batch.indices
        while not started.errors:
            try:
                place = started.places.popleft()
            except IndexError:
                return
            try:
                indices[place] = self._decode_pair(int(indices[place]), images[place], masks[place])
            except DataError as error:
                started.errors[place] = error

    def _decode_pair(self, index: int, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> int:
        """Read and decode one pair, or the pair that replaces it if it is broken.

        Args:
            image: (H, W, 3) uint8, written.
            mask: (H, W) uint8, written.

        Returns:
            The index of the pair that was decoded.
        """
        while True:
            index = self.bad.replacement(index)
            image_path, mask_path = self.pairs.image_path(index), self.pairs.mask_path(index)
            try:
                size = decode_file(image_path, decode_image, image)
                mask_size = self.decode_mask_file(mask_path, mask)
                check_sizes(mask_path, mask_size, size)
                return index
            except DataError as error:
                self.bad.report(index, error)

    def decode_mask_file(self, path: str, out: NDArray[np.uint8]) -> Size:
        """Decode a mask onto the grid, as coverage or, with classes, as class indices; returns its own size.

        Raises:
            DataError: see `decode_mask` and `decode_classes`.
        """
        if self.encoding is None:
            return decode_file(path, decode_mask, out, self.mask_resize)
        return decode_file(path, decode_classes, out, self.mask_resize, self.encoding)


@dataclass
class _BatchInProgress:
    batch: Batch
    places: deque[int]  # in the batch, that no thread has taken yet
    errors: dict[int, DataError] = field(default_factory=dict)  # by place; the lowest is raised, as by a single thread
    jobs: list[Future[None]] = field(default_factory=list)


def read_file(path: str) -> bytes:
    """The bytes of a file; a DataError, without the path, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def decode_file(path: str, decode: Callable[Concatenate[bytes, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`decode(data, ...)` for the bytes of a file; a DataError names the file."""
    try:
        return decode(read_file(path), *args, **kwargs)
    except DataError as error:
        raise error.in_file(path) from None


def check_sizes(mask_path: str, mask_size: Size, image_size: Size) -> None:
    """DataError if a mask has another size than its image; both are (height, width)."""
    if mask_size != image_size:
        (mask_height, mask_width), (height, width) = mask_size, image_size
        found = f"{width}x{height}; it has {mask_width}x{mask_height}"
        raise DataError(f"{mask_path}: must have its image's size, {found}", "size")


def load_photo(path: str, size: Size) -> NDArray[np.uint8]:
    """A photo on a grid of `size`, (height, width): (H, W, 3) uint8. A DataError names the file."""
    pixels = np.empty((*size, 3), np.uint8)
    decode_file(path, decode_image, pixels)
    return pixels
