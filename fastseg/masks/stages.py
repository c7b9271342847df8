"""The stages of a prediction: photos are decoded, go through the network and the outline refiner, and are written.

Threads decode and write; the network and the outline refiner run in the calling thread between them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.data.decode import Size, decode_image
from fastseg.data.host import decode_file
from fastseg.errors import DataError
from fastseg.masks.inputs import Photo
from fastseg.masks.outputs import OutputOptions, Row, failed_row, find_results, write_results
from fastseg.masks.refine import load_guide
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import Refiner, refine_outline
from fastseg.runtime.device import Runtime
from fastseg.runtime.threads import map_ahead

__all__ = ["Clock", "Stages", "predict_logits"]

BATCHES_AHEAD = 2  # of photos decoded ahead of the network, and of logits ahead of their files

T = TypeVar("T")
Clock = defaultdict[str, float]  # seconds by part of the work


@dataclass(frozen=True)
class _Decoded:
    """A photo before the network."""

    photo: Photo
    size: Size
    pixels: NDArray[np.uint8]  # (h, w, 3), on the network's grid
    guide: NDArray[np.uint8] | None  # (H, W, 3), on the outline refiner's grid


@dataclass(frozen=True)
class Stages:
    """What the stages of a prediction need."""

    options: OutputOptions
    config: Config
    forward: Callable[[Tensor], Tensor]  # (B, h, w, 3) uint8 to logits (B, 1 or C, h, w) on the CPU
    refiner: Refiner | None
    clock: Clock

    def run(self, photos: Iterator[Photo], pool: ThreadPoolExecutor) -> Iterator[Row]:
        """The rows of photos, in their order, each after its files are written."""
        ahead = BATCHES_AHEAD * self.config.batch_size
        decoded = self._results(map_ahead(pool, self._read, photos, ahead), "waiting for photos")
        written = map_ahead(pool, self._write, self._through_network(decoded), ahead)
        yield from self._results(written, "waiting for files")

    def _results(self, futures: Iterator[Future[T]], part: str) -> Iterator[T]:
        """The results of futures; the time spent waiting for them is added to `part`."""
        for future in futures:
            began = time.perf_counter()
            result = future.result()
            self.clock[part] += time.perf_counter() - began
            yield result

    def _read(self, photo: Photo) -> Row | _Decoded:
        """Decode a photo onto the grids, unless it is broken or its results exist."""
        if photo.error:
            return Row(photo, error=photo.error)
        if self.options.resume and (row := find_results(photo, self.options)):
            return row
        pixels = np.empty((*self.options.cells, 3), np.uint8)
        try:
            size = decode_file(photo.path, decode_image, pixels)
            guide = load_guide(photo.path, self.config, self.refiner)[1] if self.refiner else None
        except DataError as error:
            return failed_row(photo, error)
        return _Decoded(photo, size, pixels, guide)

    def _through_network(self, read: Iterator[Row | _Decoded]) -> Iterator[Row | tuple[Photo, Size, Tensor]]:
        """Photos with their logits, and the rows of photos that need none, in order.

        The logits are (1 or C, h, w), or (1 or C, H, W) on the grid of the outline refiner.
        """
        while batch := list(islice(read, self.config.batch_size)):
            decoded = {i: item for i, item in enumerate(batch) if isinstance(item, _Decoded)}
            logits: dict[int, Tensor] = {}
            if decoded:
                began = time.perf_counter()
                # A photo keeps its place in the batch, whatever the others are: a resumed run sums in the same order.
                blank = np.zeros_like(next(iter(decoded.values())).pixels)
                pixels = [decoded[i].pixels if i in decoded else blank for i in range(len(batch))]
                logits = dict(enumerate(self.forward(torch.from_numpy(np.stack(pixels)))))
                self.clock["network"] += time.perf_counter() - began
            if self.refiner:
                began = time.perf_counter()
                for i, photo in decoded.items():
                    assert photo.guide is not None
                    logits[i] = refine_outline(self.refiner, logits[i], torch.from_numpy(photo.guide), photo.size)
                self.clock["outline refiner"] += time.perf_counter() - began
            for i, item in enumerate(batch):
                yield (item.photo, item.size, logits[i]) if isinstance(item, _Decoded) else item

    def _write(self, item: Row | tuple[Photo, Size, Tensor]) -> Row:
        return item if isinstance(item, Row) else write_results(*item, self.options)


def predict_logits(model: nn.Module, runtime: Runtime, flip: bool, pixels: Tensor) -> Tensor:
    """(B, 1 or C, h, w) float32 on the CPU, where threads turn them into masks."""
    with torch.inference_mode(), runtime.autocast():
        inputs = normalise(pixels.to(runtime.device))
        logits = model(inputs).float()
        if flip:
            logits = (logits + model(inputs.flip(3)).float().flip(3)) / 2
    return logits.cpu()
