"""DaliDecoder: the same pairs through an NVIDIA DALI pipeline, on a GPU or on the CPU (which needs no driver).

One graph for both devices. Photos are decoded by nvImageCodec (on a GPU by its JPEG engines, `device="mixed"`) and
averaged down to the sampling grid there. Masks are decoded on the CPU by our GIF decoder, which DALI's numba operator
runs inside the pipeline without the GIL: DALI itself decodes no GIF. Only this file imports `nvidia.dali`.
"""

import itertools
import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.batch import BadSamples, Batch
from fastseg.data.decode import as_dali_input, decode_mask, gif_size, is_gif
from fastseg.data.host import HostDecoder, read_file, size_mismatch
from fastseg.data.pairs import Pairs
from fastseg.data.resample import MASK_MODES, decode_mask_into, sampling_grid
from fastseg.errors import ConfigError, DataError

__all__ = ["DaliDecoder"]

BATCHES_AHEAD = 2  # DALI's prefetch depth
SIZES = 5  # rows of _Sample.sizes
CELLS = b"CELL"  # in front of a mask that the host has decoded, because it is no GIF

log = logging.getLogger(__name__)


@dataclass
class _Sample:
    index: int
    image: NDArray[np.uint8]  # the file's bytes
    mask: NDArray[np.uint8]  # the file's bytes, or CELLS and the decoded cells
    sizes: NDArray[np.float32]  # (SIZES, 2) height and width: the grid's extent, after each halving, the target


class DaliDecoder:
    """Decode batches of pairs with a DALI pipeline; interchangeable with `HostDecoder`.

    JPEG damage that libjpeg-turbo reports but nvImageCodec passes over (flipped bits inside the scan) is not seen
    here; truncated and unreadable files are.

    Args:
        pairs, height, width, mask_resize, num_workers, bad: as for `HostDecoder`.
        device: where photos are decoded and where the batches arrive.

    Raises:
        ConfigError: DALI is not installed.
    """

    name = "dali"

    def __init__(
        self,
        pairs: Pairs,
        height: int,
        width: int,
        *,
        mask_resize: str = "area",
        num_workers: int = 2,
        bad: BadSamples | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"decoder: DALI cannot be loaded ({error}). Install nvidia-dali-cuda120 or use decoder=host."
            ) from None
        self.pairs = pairs
        self.height, self.width = height, width
        self.mask_resize = mask_resize
        self.num_workers = num_workers
        self.bad = bad or BadSamples(pairs, "raise")
        self.device = torch.device(device)
        self._pipeline: Any = None
        self._batch_size = 0
        self._samples: Iterator[list[_Sample]] = iter(())
        self._in_flight: deque[NDArray[np.int64]] = deque()  # what DALI has been fed and has not given back

    def decode(self, batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """Decode `batches` of pair indices, in order, two batches ahead of the caller.

        Yields:
            A `Batch` of new tensors on the device: what was yielded before stays valid.

        Raises:
            DataError: a pair cannot be decoded and bad samples are not skipped.
        """
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="fastseg-read")
        self._samples = self._read_ahead(pool, batches)
        try:
            while True:
                try:
                    batch = self._run()
                except StopIteration:
                    if self._pipeline is not None:
                        self._pipeline.reset()
                    return
                except _PipelineBrokenError as error:
                    # One undecodable sample makes the whole pipeline useless. The host decoder finds the file,
                    # names it and replaces it; a new pipeline goes on behind the batches that were under way.
                    self._pipeline = None
                    yield from self._on_host(str(error))
                    continue
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if self._in_flight:  # left early: what is under way would come out first the next time
                self._pipeline = None
                self._in_flight.clear()

    def _read_ahead(self, pool: ThreadPoolExecutor, batches: Iterable[NDArray[np.int64]]) -> Iterator[list[_Sample]]:
        """The files of each batch, read while DALI works on the one before."""
        ahead: deque[Iterator[_Sample]] = deque()
        for indices in batches:
            ahead.append(pool.map(self._read, indices))
            if len(ahead) > 1:
                yield list(ahead.popleft())
        while ahead:
            yield list(ahead.popleft())

    def _read(self, index: int) -> _Sample:
        """The files of a pair, or of the one that replaces it, checked as far as their headers tell."""
        while True:
            index = self.bad.replacement(int(index))
            path = self.pairs.image_path(index)
            try:
                image, image_size = as_dali_input(read_file(path))
                path = self.pairs.mask_path(index)
                mask = read_file(path)
                if is_gif(mask):
                    size = gif_size(mask)
                else:
                    cells = np.empty((self.height, self.width), np.uint8)
                    size = decode_mask(mask, cells, self.mask_resize)
                    mask = CELLS + cells.tobytes()
                if size != image_size:
                    raise DataError(size_mismatch(path, size, image_size))
                break
            except DataError as error:
                message = str(error)
                self.bad.report(index, DataError(message if message.startswith(path) else f"{path}: {message}"))
        target = (self.height, self.width)
        return _Sample(index, _bytes(image), _bytes(mask), _resize_steps(image_size, target))

    def _feed(self) -> tuple[list[NDArray[Any]], ...]:
        """The next batch for DALI, which asks for it; StopIteration where there is none."""
        samples = next(self._samples)
        self._in_flight.append(np.array([sample.index for sample in samples], np.int64))
        sizes = ([sample.sizes[step] for sample in samples] for step in range(SIZES))
        return [sample.image for sample in samples], [sample.mask for sample in samples], *sizes

    def _run(self) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        if self._pipeline is None:
            first = next(self._samples)
            self._samples = itertools.chain([first], self._samples)
            self._pipeline = self._build(max(len(first), self._batch_size))
            self._batch_size = max(len(first), self._batch_size)
        try:
            images, masks, status = self._pipeline.run()
        except RuntimeError as error:
            reason = str(error).partition("encountered:")[2].strip() or str(error)
            raise _PipelineBrokenError(reason.splitlines()[0]) from None
        if np.any(np.array(status.as_tensor())):
            raise _PipelineBrokenError("a mask could not be decoded")
        indices = self._in_flight.popleft()
        shape = (len(indices), self.height, self.width)
        batch = Batch(
            torch.empty((*shape, 3), dtype=torch.uint8, device=self.device),
            torch.empty(shape, dtype=torch.uint8, device=self.device),
            indices,
        )
        # Copied out, on the stream of whoever takes the batch, before DALI reuses its buffers.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(images.as_tensor(), batch.images, cuda_stream=stream)
        feed_ndarray(masks.as_tensor(), batch.masks, cuda_stream=stream)
        return batch

    def _on_host(self, reason: str) -> Iterator[Batch]:
        """Decode what was under way when DALI stopped."""
        known_bad = len(self.bad.found)
        batches = list(self._in_flight)
        self._in_flight.clear()
        host = HostDecoder(
            self.pairs,
            self.height,
            self.width,
            mask_resize=self.mask_resize,
            num_workers=self.num_workers,
            bad=self.bad,
        )
        for batch in host.decode(batches):
            yield batch._replace(images=batch.images.to(self.device), masks=batch.masks.to(self.device))
        if len(self.bad.found) == known_bad:
            log.warning("the host decoded %d batches that DALI could not: %s", len(batches), reason)

    def _build(self, batch_size: int) -> Any:
        """The graph; see the module's docstring."""
        from nvidia.dali import Pipeline, fn, types
        from nvidia.dali.plugin.numba.fn.experimental import numba_function

        on_gpu = self.device.type == "cuda"
        device_id = (self.device.index or 0) if on_gpu else None
        pipeline = Pipeline(batch_size, self.num_workers, device_id, prefetch_queue_depth=BATCHES_AHEAD)
        with pipeline:
            encoded, masks, *sizes = fn.external_source(
                source=self._feed,
                num_outputs=2 + SIZES,
                batch=True,
                dtype=[types.UINT8] * 2 + [types.FLOAT] * SIZES,
                ndim=[1] * (2 + SIZES),
            )

            pixels = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            # Linear interpolation at half the size, on a grid of whole pairs of pixels, is the mean of 2x2 pixels;
            # three times that is the mean of 8x8 which the host decoder has from the DCT. In float, so that it is
            # rounded once. A step that has nothing to do leaves the pixels as they are.
            halve = {"interp_type": types.INTERP_LINEAR, "antialias": False, "dtype": types.FLOAT}
            origin = np.zeros(2, np.float32)
            pixels = fn.resize(pixels, size=sizes[1], roi_start=origin, roi_end=sizes[0], **halve)
            pixels = fn.resize(pixels, size=sizes[2], **halve)
            pixels = fn.resize(pixels, size=sizes[3], **halve)
            pixels = fn.resize(pixels, size=sizes[4], interp_type=types.INTERP_TRIANGULAR, antialias=True)
            pixels = fn.cast(pixels, dtype=types.UINT8)  # rounds to nearest and saturates

            run, setup = _mask_operator(self.height, self.width, MASK_MODES[self.mask_resize])
            cells, status = numba_function(
                masks,
                run_fn=run,
                setup_fn=setup,
                in_types=[types.UINT8],
                ins_ndim=[1],
                out_types=[types.UINT8, types.UINT8],
                outs_ndim=[2, 1],
                device="cpu",
            )
            pipeline.set_outputs(pixels, cells.gpu() if on_gpu else cells, status)
        pipeline.build()
        return pipeline


class _PipelineBrokenError(Exception):
    """DALI's executor stopped; the pipeline object cannot be used again."""


def _mask_operator(height: int, width: int, mode: int) -> tuple[Any, Any]:
    """Run and set-up functions of the numba operator: a mask's bytes in, (H, W) cells and (1,) status out."""
    tag = np.frombuffer(CELLS, np.uint8)

    def run(cells: Any, status: Any, data: Any) -> None:
        if data.size == tag.size + height * width and np.array_equal(data[: tag.size], tag):
            cells[:] = data[tag.size :].reshape(height, width)
            status[0] = 0
        else:
            status[0] = min(decode_mask_into(data, cells, mode), 255)

    def setup(outs: Any, ins: Any) -> None:
        cells, status = outs[0], outs[1]
        for sample in range(len(cells)):
            cells[sample][0] = height
            cells[sample][1] = width
            status[sample][0] = 1

    return run, setup


def _resize_steps(size: tuple[int, int], target: tuple[int, int]) -> NDArray[np.float32]:
    """(SIZES, 2) heights and widths: the extent to sample, then after each of three halvings, then the target."""
    grid = sampling_grid(size[1], size[0], target[1], target[0])
    extent = np.array([grid.extent_y, grid.extent_x], np.float32)
    steps = [extent] + [extent / min(2**halvings, grid.denominator) for halvings in (1, 2, 3)]
    return np.array([*steps, target], np.float32)


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
