"""Loader: epochs of decoded batches on the training device, in an order that depends on (seed, epoch) alone.

    pairs = fastseg.find_pairs("data/train_images", "data/train_masks")
    loader = fastseg.Loader(pairs, height=160, width=240, batch_size=16)
    for epoch in range(3):
        for images, masks, indices in loader:  # uint8 (16, 160, 240, 3), uint8 (16, 160, 240), int64 (16,)
            ...

The first epoch decodes the files and fills the cache; later epochs only gather from it.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.classes import SegClass
from fastseg.config import Config
from fastseg.data.batch import BadSamples, Batch, wait_on_current_stream
from fastseg.data.cache import Cache, open_cache
from fastseg.data.dali.choice import choose_decoder, count_decoding_threads
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.data.resample import MASK_MODES
from fastseg.data.verify import verify_rows
from fastseg.errors import ConfigError
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import is_group_of

__all__ = ["Loader", "epoch_order", "make_loader"]

MINIMUMS = {"height": 1, "width": 1, "batch_size": 1, "seed": 0, "rank": 0, "world_size": 1, "num_workers": 0}
CHOICES = {
    "decoder": ("auto", "host", "dali"),
    "mask_resize": tuple(MASK_MODES),
    "cache": ("auto", "device", "memory", "disk", "off"),
    "bad_samples": ("raise", "skip"),
}

log = logging.getLogger(__name__)


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of range(count) that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class Loader:
    """Batches of pairs. Each iteration over the loader is one epoch.

    Args:
        pairs: from `find_pairs`.
        height, width: of the decoded pixels.
        batch_size: pairs per step over all processes.
        shuffle: use a new permutation in each epoch; otherwise the order of `pairs`.
        drop_last: leave out the last, smaller batch, so that all shapes are the same; otherwise every pair comes once.
        seed: of the order.
        rank, world_size: this process and the number of processes that share the epoch. Each process takes its slice
            of every batch, so that all make the same number of steps. If the last batch has fewer pairs than there are
            processes, some slices are empty.
        whole_batches: each process takes whole batches in turn instead of slices, and may make another number of steps.
        device: where batches arrive.
        decoder: "host", "dali", or "auto".
        num_workers: decoding threads; 0: one per core, at most 8 beside a GPU.
        mask_resize: "area" or "nearest".
        classes: of the masks, from `Config.classes`; empty: masks of two values.
        ignore_value: with classes, the value of ignored pixels; -1: none.
        cache: "auto", "device", "memory", "disk" or "off".
        cache_dir: of the disk cache; empty: the user's cache folder.
        bad_samples: "raise", or "skip": the next pair replaces a broken one; see `bad`.
        pin_memory: use page-locked staging buffers if the device is a GPU.

    Attributes:
        bad: `BadSamples`; `bad.found` maps the index of each broken pair to the reason.
        wait_seconds: total time that the caller has waited for the decoder.

    Raises:
        ConfigError: a setting is out of range, there is no memory for the cache, or DALI is asked for by name and does
            not work here.
        OutputError: the disk cache cannot be written.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        height: int,
        width: int,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        whole_batches: bool = False,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        num_workers: int = 0,
        mask_resize: str = "area",
        classes: tuple[SegClass, ...] = (),
        ignore_value: int = 255,
        cache: str = "auto",
        cache_dir: str = "",
        bad_samples: str = "raise",
        pin_memory: bool = True,
    ) -> None:
        _check_settings(locals())
        self.pairs = pairs
        self.batch_size = batch_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size, self.whole_batches = rank, world_size, whole_batches
        self.device = torch.device(device)
        self.bad = BadSamples(pairs, bad_samples)
        self.wait_seconds = 0.0
        self._epoch, self._step = 0, 0
        on_gpu = self.device.type == "cuda"
        self._pin_memory = pin_memory and on_gpu
        # One stream for all epochs: torch caches freed memory per stream, and would allocate more for each new one.
        self._copy_stream = torch.cuda.Stream(self.device) if on_gpu else None
        log_level = logging.INFO if shuffle else logging.DEBUG  # validation repeats training's choices
        num_threads = count_decoding_threads(num_workers, on_gpu)
        options: dict[str, Any] = {"mask_resize": mask_resize, "classes": classes, "ignore_value": ignore_value}
        options |= {"num_workers": num_threads, "bad": self.bad}
        self.decoder = self._open_decoder(decoder, height, width, log_level, options)
        self.cache = open_cache(
            cache, self.decoder, self.device, cache_dir, shared=is_group_of(world_size), log_level=log_level
        )
        if self.cache is not None and self.cache.filled.all():
            self.decoder.release()

    def _open_decoder(
        self, choice: str, height: int, width: int, log_level: int, options: dict[str, Any]
    ) -> HostDecoder:
        name, reason = choose_decoder(choice, self.device.type == "cuda", options["num_workers"])
        if name == "dali":
            try:
                from fastseg.data.dali.decoder import DaliDecoder  # imports DALI, so only if it is used

                decoder = DaliDecoder(self.pairs, height, width, device=self.device, **options)
                local = self.batch_size if self.whole_batches else -(-self.batch_size // self.world_size)
                decoder.build(local)  # now, because the cache depends on the decoder
                log.log(log_level, "decoder: dali (%s)", reason)
                return decoder
            except ConfigError as error:
                if choice == "dali":
                    raise
                log.warning("%s decoder=auto takes the host decoder.", error)
                reason = "DALI does not work here"
        log.log(log_level, "decoder: host (%s)", reason)
        return HostDecoder(self.pairs, height, width, pin_memory=self._pin_memory, **options)

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.pairs), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def state_dict(self) -> dict[str, int]:
        """The state to resume from: the next batch is number `step` of `epoch`."""
        position = {"seed": self.seed, "epoch": self._epoch, "step": self._step}
        return {**position, "pairs": len(self.pairs), "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a `state_dict`, with any decoder, cache and number of threads.

        Raises:
            ConfigError: the state has another number of pairs, or is within an epoch of another batch size.
        """
        if state["pairs"] != len(self.pairs):
            raise ConfigError(
                f"pairs: must be those of the checkpoint, which had {state['pairs']}; got {len(self.pairs)}. "
                "Give the same data, or start from scratch with load_model=false."
            )
        if state["step"] and state["batch_size"] != self.batch_size:
            raise ConfigError(
                f"batch_size: must be {state['batch_size']} to resume within the checkpoint's epoch; got "
                f"{self.batch_size}. Give batch_size={state['batch_size']}, or start from scratch with "
                "load_model=false."
            )
        self.seed, self._epoch, self._step = state["seed"], state["epoch"], state["step"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; the next iteration begins the next epoch."""
        for batch in self._on_device(self._decode_or_gather(self.batches(self._epoch)[self._step :])):
            self._step += 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The pairs of this process in an epoch: its slice of every batch, or its whole batches."""
        count = len(self.pairs)
        order = epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        whole = [order[start : start + self.batch_size] for start in starts]
        if self.whole_batches:
            return whole[self.rank :: self.world_size]
        return [indices[self.rank :: self.world_size] for indices in whole]

    def _decode_or_gather(self, batches: list[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        cache = self.cache
        if cache is None:
            yield from self._decode(batches)
            return
        if self.bad.found:
            batches = [np.array([self.bad.replacement(int(i)) for i in indices], np.int64) for indices in batches]
        # An epoch has each pair once, in one rank, so the rows that are missing at its beginning are those to decode.
        cache.refresh()
        missing = [~cache.filled[indices] for indices in batches]
        todo = [indices[lack] for indices, lack in zip(batches, missing, strict=True) if lack.any()]
        pin_memory = self._pin_memory and cache.device.type == "cpu"
        with contextlib.closing(self._decode(todo)) as decoded:
            for indices, lack in zip(batches, missing, strict=True):
                if not lack.all():
                    self._repair(cache, indices[~lack])
                if not lack.any():
                    yield cache.gather(indices, pin_memory)
                    continue
                batch = next(decoded)
                if cache.device != batch.images.device and cache.device.type == "cuda":
                    batch = _move(batch, cache.device)
                cache.put(batch)
                if not lack.all():
                    indices = indices.copy()
                    indices[lack] = batch.indices  # others than requested where they replace bad samples
                    batch = cache.gather(indices, pin_memory)
                yield batch
        if self.world_size == 1 and not cache.filled.all():
            self._decode_rest(cache)
        if todo:
            verify_rows(cache, self.decoder)
        cache.refresh()
        cache.publish(list(self.bad.found))
        if cache.is_complete(list(self.bad.found)):
            self.decoder.release()

    def _decode(self, batches: list[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """The decoder's batches. The time until each is there counts as waiting."""
        with contextlib.closing(self.decoder.decode(batches)) as decoded:
            while True:
                started = time.perf_counter()
                batch = next(decoded, None)
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

    def _repair(self, cache: Cache, indices: NDArray[np.int64]) -> None:
        """Decode those cached pairs again whose pixels have been damaged on the disk."""
        damaged = cache.find_damaged(indices)
        for batch in self._decode([damaged] if len(damaged) else []):
            cache.put(batch)

    def _decode_rest(self, cache: Cache) -> None:
        """Decode the pairs that `drop_last` left out of the epoch, so that the cache is complete."""
        rest = [index for index in np.flatnonzero(~cache.filled) if index not in self.bad.found]
        for batch in self._decode(np.array_split(rest, -(-len(rest) // self.batch_size)) if rest else []):
            cache.put(batch)

    def _on_device(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """Copy each batch to the GPU on a stream of its own, during the step before."""
        if self._copy_stream is None:
            yield from (batches if self.device.type == "cpu" else (_move(batch, self.device) for batch in batches))
            return
        ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()
        with contextlib.closing(batches):
            for batch in batches:
                if batch.images.device.type == "cuda":
                    while ahead:  # the order of the epoch
                        yield wait_on_current_stream(*ahead.popleft())
                    yield batch
                    continue
                with torch.cuda.stream(self._copy_stream):
                    ahead.append((_move(batch, self.device), self._copy_stream.record_event()))
                if len(ahead) > 1:
                    yield wait_on_current_stream(*ahead.popleft())
        while ahead:
            yield wait_on_current_stream(*ahead.popleft())


def make_loader(
    pairs: Pairs, config: Config, runtime: Runtime, *, training: bool, whole_batches: bool = False
) -> Loader:
    """A loader as configured: shuffled full batches for training; otherwise every pair, in order."""
    same_name = ("batch_size", "seed", "decoder", "num_workers", "cache", "cache_dir", "bad_samples")
    masks = ("mask_resize", "classes", "ignore_value")
    return Loader(
        pairs,
        height=config.image_height,
        width=config.image_width,
        shuffle=training,
        drop_last=training,
        rank=runtime.rank,
        world_size=runtime.world_size,
        whole_batches=whole_batches,
        device=runtime.device,
        pin_memory=config.pin_memory,
        **{name: getattr(config, name) for name in (*same_name, *masks)},
    )


def _check_settings(given: dict[str, Any]) -> None:
    for field, minimum in MINIMUMS.items():
        if given[field] < minimum:
            raise ConfigError(f"{field}: must be at least {minimum}; got {given[field]}.")
    for field, known in CHOICES.items():
        if given[field] not in known:
            raise ConfigError(f"{field}: must be one of {', '.join(known)}; got {given[field]!r}.")
    if given["rank"] >= given["world_size"]:
        raise ConfigError(f"rank: must be below world_size, {given['world_size']}; got {given['rank']}.")


def _move(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(
        images=batch.images.to(device, non_blocking=True), masks=batch.masks.to(device, non_blocking=True)
    )
