"""DaliDecoder: the same pairs through an NVIDIA DALI pipeline, on a GPU or on the CPU (which needs no driver).

Both devices run the same graph. nvImageCodec decodes the photos (on a GPU with its JPEG engines, `device="mixed"`), and
the pipeline averages them down to the sampling grid. DALI decodes no GIFs: the threads that read the files decode the
masks with our GIF decoder. (DALI's numba operator can run that decoder too, but compiles it for every pipeline: 8 s
each.) Only this file imports `nvidia.dali`.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import Batch, empty_batch, wait_on_current_stream
from fastseg.data.dali.errors import DaliFileError, dali_config_errors, dali_run_errors
from fastseg.data.decode import Size, as_dali_input
from fastseg.data.host import HostDecoder, check_sizes, decode_file
from fastseg.data.pairs import Pairs
from fastseg.data.resample import sampling_grid
from fastseg.errors import DataError, FastsegError

__all__ = ["DaliDecoder"]

HALVINGS = 3

log = logging.getLogger(__name__)


@dataclass
class _Sample:
    """What DALI needs of a pair."""

    index: int
    image: NDArray[np.uint8]  # the file's bytes
    mask: NDArray[np.uint8]  # (H, W) cells
    sizes: NDArray[np.float32]  # (1 + HALVINGS, 2) height and width: the grid's extent, then after each halving


class DaliDecoder(HostDecoder):
    """Decode batches of pairs with a DALI pipeline; interchangeable with `HostDecoder`, which it falls back to.

    JPEG damage that libjpeg-turbo reports but nvImageCodec ignores (flipped bits inside the scan) goes unnoticed here;
    truncated and unreadable files do not.

    Args:
        pairs, height, width: as for `HostDecoder`.
        device: where photos are decoded and where the batches arrive.
        hw_decoder_load: share of the JPEGs that a GPU's JPEG engines decode; its cores decode the others. 0 by default:
            nvJPEG's batched hardware decode ignores its stream and may overwrite memory that is still read (torchcodec
            issue 1634). Raise it only on a machine where `tests/test_gpu.py` finds no torn batch.
        batches_ahead: DALI's prefetch depth.
        largest_photo: height and width for which the JPEG engines allocate memory at the start; 0, 0: on demand.
        options: `mask_resize`, `classes`, `ignore_value`, `num_workers` and `bad`, as for `HostDecoder`.

    Raises:
        ConfigError: DALI is not installed, or cannot be loaded.
    """

    name = "dali"

    def __init__(
        self,
        pairs: Pairs,
        height: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        hw_decoder_load: float = 0.0,
        batches_ahead: int = 2,
        largest_photo: Size = (0, 0),
        **options: Any,
    ) -> None:
        with dali_config_errors():
            import nvidia.dali  # noqa: F401
        super().__init__(pairs, height, width, **options)
        self.device = torch.device(device)
        self.batches_ahead = batches_ahead
        self._decoder_options: dict[str, Any] = {"device": "cpu"}
        self._stream: torch.cuda.Stream | None = None  # copies batches out of DALI's buffers
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            self._decoder_options = {
                "device": "mixed",
                "hw_decoder_load": hw_decoder_load,
                "preallocate_height_hint": largest_photo[0],
                "preallocate_width_hint": largest_photo[1],
            }
            self._stream = torch.cuda.Stream(self.device)
        self._copying: tuple[Any, ...] = ()  # DALI's buffers that a copy still reads
        self._copied: torch.cuda.Event | None = None
        self._pipeline: Any = None
        self._batch_size = 0  # the largest that the pipeline takes
        self._samples: Iterator[list[_Sample]] = iter(())
        self._in_flight: deque[NDArray[np.int64]] = deque()  # batches that DALI has been fed and has not returned
        self._error: DataError | None = None  # of a file; raised after the batches that are in flight

    def decode(self, batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """Decode `batches` of pair indices, in order and ahead of the caller.

        Yields:
            A `Batch` of new tensors on the device each time, so that earlier batches stay valid.

        Raises:
            DataError: a pair cannot be decoded and bad samples are not skipped.
            FastsegError: DALI stopped for a reason that is not in a file, such as too little memory.
        """
        batches = list(batches)
        filled = self._decode_filled([indices for indices in batches if len(indices)])
        with contextlib.closing(filled):
            for indices in batches:  # DALI accepts no empty batch
                yield next(filled) if len(indices) else self._empty_batch(indices)

    def _decode_filled(self, batches: list[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        largest = max(map(len, batches), default=0)
        # Batches in flight belong to an earlier iterator that was left early, and would come out first.
        if self._in_flight:
            self._drop_pipeline()
        if largest:
            self.build(largest)
        if self._pipeline is not None:
            self._pipeline.reset()  # it is at the end of its previous batches
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="fastseg-read")
        samples = self._samples = self._read_ahead(pool, batches)
        self._error = None
        try:
            while self._samples is samples:
                try:
                    batch = self._run()
                except StopIteration:
                    if self._error is not None:
                        raise self._error from None
                    return
                except DaliFileError as error:
                    # One undecodable sample makes the whole pipeline unusable. The host decoder finds the file,
                    # names it and replaces it; a new pipeline continues after the batches that were in flight.
                    in_flight = list(self._in_flight)
                    self._drop_pipeline()
                    if not in_flight:
                        raise
                    yield from self._decode_on_host(in_flight, str(error))
                    continue
                except FastsegError:
                    self._copied = None  # to wait for it would raise once more
                    self._drop_pipeline()
                    raise
                yield batch
            raise RuntimeError("DaliDecoder: this iterator ended when a later one began")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def build(self, batch_size: int) -> None:
        """Build the pipeline for batches of up to `batch_size` pairs, unless it exists. `decode` does so when needed.

        Raises:
            ConfigError: DALI does not work on this machine: the driver is too old, a library or memory is missing.
        """
        if batch_size > self._batch_size:
            self._drop_pipeline()
            self._batch_size = batch_size
        if self._pipeline is None:
            with dali_config_errors():
                self._pipeline = self._build()

    def release(self) -> None:
        """Give the pipeline's memory back: about 1 GB at a batch size of 16. A later `decode` builds a new pipeline."""
        if self._pipeline is not None:
            from nvidia.dali import backend

            self._drop_pipeline()
            backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # missing from DALI's stubs

    def _drop_pipeline(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        self._copying, self._copied = (), None
        self._pipeline = None
        self._in_flight.clear()

    def _read_ahead(self, pool: ThreadPoolExecutor, batches: list[NDArray[np.int64]]) -> Iterator[list[_Sample]]:
        """The files of each batch, read while DALI decodes the batch before."""
        ahead: deque[Iterator[_Sample]] = deque()
        for indices in batches:
            ahead.append(pool.map(self._read, indices))
            if len(ahead) > 1:
                yield list(ahead.popleft())
        while ahead:
            yield list(ahead.popleft())

    def _read(self, index: int) -> _Sample:
        """Read a pair, or the pair that replaces it if it is broken: check the image's header and decode the mask."""
        target = (self.height, self.width)
        mask = np.empty(target, np.uint8)
        while True:
            index = self.bad.replacement(int(index))
            image_path, mask_path = self.pairs.image_path(index), self.pairs.mask_path(index)
            try:
                image, encoded_size, size = decode_file(image_path, as_dali_input, *target)
                mask_size = self.decode_mask_file(mask_path, mask)
                check_sizes(mask_path, mask_size, size)
                return _Sample(index, np.frombuffer(image, np.uint8), mask, _halvings(encoded_size, target))
            except DataError as error:
                self.bad.report(index, error)

    def _feed(self) -> tuple[list[NDArray[Any]], ...]:
        """The next batch, when DALI asks for it; StopIteration if there is none."""
        try:
            samples = next(self._samples)
        except DataError as error:  # raised after the batches in flight, as by the host decoder
            self._error = error
            raise StopIteration from None
        self._in_flight.append(np.array([sample.index for sample in samples], np.int64))
        sizes = ([sample.sizes[step] for sample in samples] for step in range(1 + HALVINGS))
        return [sample.image for sample in samples], [sample.mask for sample in samples], *sizes

    def _run(self) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        self.build(self._batch_size)
        if self._copied is not None:
            self._copied.synchronize()  # run() returns the previous buffers to DALI
        with dali_run_errors():
            images, masks = self._copying = self._pipeline.run(self._stream)
        with torch.cuda.stream(self._stream):  # does nothing on the CPU, where it is None
            batch = self._empty_batch(self._in_flight.popleft())
            feed_ndarray(masks.as_tensor(), batch.masks, cuda_stream=self._stream)
            if all(shape[:2] == (self.height, self.width) for shape in images.shape()):
                feed_ndarray(images.as_tensor(), batch.images, cuda_stream=self._stream)
            else:
                for at, cells in enumerate(batch.images):
                    pixels = torch.empty(images[at].shape(), dtype=torch.uint8, device=self.device)
                    feed_ndarray(images[at], pixels, cuda_stream=self._stream)
                    cells.copy_(_average_cells(pixels, self.height, self.width))
        if self._stream is None:
            return batch
        self._copied = self._stream.record_event()
        return wait_on_current_stream(batch, self._copied)

    def _empty_batch(self, indices: NDArray[np.int64]) -> Batch:
        return empty_batch(indices, self.height, self.width, device=self.device)

    def _decode_on_host(self, batches: list[NDArray[np.int64]], reason: str) -> Iterator[Batch]:
        """Decode the batches that were in flight when DALI stopped."""
        known_bad = len(self.bad.found)
        for count, batch in enumerate(super().decode(batches), start=1):
            if count == len(batches) and len(self.bad.found) == known_bad:
                log.warning("the host decoded %d batches that DALI could not: %s", count, reason)
            yield batch._replace(images=batch.images.to(self.device), masks=batch.masks.to(self.device))

    def _build(self) -> Any:
        """The graph; see the module's docstring."""
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        device_id = (self.device.index or 0) if on_gpu else None
        pipeline = Pipeline(
            self._batch_size,
            self.num_workers,
            device_id,
            prefetch_queue_depth=self.batches_ahead,
            exec_dynamic=True,  # run(stream) needs it
        )
        with pipeline:
            encoded, masks, *sizes = fn.external_source(
                source=self._feed,
                num_outputs=3 + HALVINGS,
                batch=True,
                dtype=[types.UINT8] * 2 + [types.FLOAT] * (1 + HALVINGS),
                ndim=[1, 2] + [1] * (1 + HALVINGS),
            )
            pixels = fn.decoders.image(encoded, output_type=types.RGB, **self._decoder_options)
            # Linear interpolation at half the size, on a grid of whole pairs of pixels, is the mean of 2x2 pixels.
            # Three such steps give the mean of 8x8 pixels that the host decoder takes from the DCT. They are in float,
            # so that the result is rounded once. A step without work leaves the pixels unchanged.
            halve = {"interp_type": types.INTERP_LINEAR, "antialias": False, "dtype": types.FLOAT}
            origin = np.zeros(2, np.float32)
            pixels = fn.resize(pixels, size=sizes[1], roi_start=origin, roi_end=sizes[0], **halve)
            for size in sizes[2:]:
                pixels = fn.resize(pixels, size=size, **halve)
            pixels = fn.cast(pixels, dtype=types.UINT8)  # rounds to nearest and saturates
            pipeline.set_outputs(pixels, masks.gpu() if on_gpu else masks)
        pipeline.build()
        return pipeline


def _halvings(size: Size, target: Size) -> NDArray[np.float32]:
    """(1 + HALVINGS, 2) heights and widths: the extent to sample, then its size after each halving."""
    grid = sampling_grid(size[1], size[0], target[1], target[0])
    extent = np.array([grid.extent_y, grid.extent_x], np.float32)
    return np.array([extent / min(2**step, grid.denominator) for step in range(1 + HALVINGS)])


def _average_cells(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Area averages of (H, W, 3) uint8 over height x width cells, like `resample.resize_area`, on any device."""
    cells = pixels.float()
    for dim, count in ((0, height), (1, width)):  # differences of the cumulative sum at the cells' edges
        length = cells.shape[dim]
        edges = torch.arange(count + 1, device=cells.device, dtype=torch.float64) * (length / count)
        whole = edges.long().clamp(max=length - 1)
        part = (edges - whole).float().unsqueeze(1).unsqueeze(1).transpose(0, dim)
        sums = cells.cumsum(dim)
        upto = sums.index_select(dim, whole) - cells.index_select(dim, whole) * (1 - part)
        cells = upto.diff(dim=dim) * (count / length)
    return cells.round()
