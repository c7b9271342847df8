"""Loader: epochs of decoded batches on the training device, in an order that (seed, epoch) alone decides.

    pairs = fastseg.find_pairs("data/train_images", "data/train_masks")
    loader = fastseg.Loader(pairs, height=160, width=240, batch_size=16)
    for epoch in range(3):
        for images, masks, indices in loader:  # uint8 (16, 160, 240, 3), uint8 (16, 160, 240), int64 (16,)
            ...

The first epoch decodes files; what it decoded stays in the cache, and later epochs only gather.
"""

import contextlib
import importlib.util
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.config import Config
from fastseg.data.batch import BadSamples, Batch, wait_on_current_stream
from fastseg.data.cache import Cache, open_cache
from fastseg.data.host import HostDecoder
from fastseg.data.pairs import Pairs
from fastseg.data.resample import MASK_MODES
from fastseg.errors import ConfigError
from fastseg.runtime.device import Runtime
from fastseg.runtime.threads import count_threads

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
    """The order of an epoch: a permutation of range(count) that depends on (seed, epoch) and nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class Loader:
    """Batches of pairs; iterate over it once an epoch.

    Args:
        pairs: from `find_pairs`.
        height, width: of the decoded pixels.
        batch_size: pairs a step over all processes.
        shuffle: a new permutation each epoch; otherwise the order of `pairs`.
        drop_last: leave the last, smaller batch out (training: static shapes); otherwise every pair comes once.
        seed: of the order.
        rank, world_size: this process among those that share the epoch. Each takes its slice of every batch, so all
            make equally many steps; in a last batch of fewer pairs than processes some slices are empty.
        device: where batches arrive.
        decoder: "host", "dali", or "auto".
        num_workers: decoding threads; 0: one a core.
        mask_resize: "area" or "nearest".
        cache: "auto", "device", "memory", "disk" or "off".
        cache_dir: of the disk cache; empty: the user's cache folder.
        bad_samples: "raise", or "skip": another pair takes the place of one that breaks; see `bad`.
        pin_memory: page-locked staging buffers when the device is a GPU.

    Attributes:
        bad: `BadSamples`; `bad.found` maps the index of each broken pair to the reason.
        wait_seconds: time spent waiting for batches since the loader was made.

    Raises:
        ConfigError: a setting is out of range, or a decoder or cache that this machine lacks.
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
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        num_workers: int = 0,
        mask_resize: str = "area",
        cache: str = "auto",
        cache_dir: str = "",
        bad_samples: str = "raise",
        pin_memory: bool = True,
    ) -> None:
        _check_settings(locals())
        num_workers = count_threads(num_workers)
        self.pairs = pairs
        self.batch_size = batch_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.bad = BadSamples(pairs, bad_samples)
        self.wait_seconds = 0.0
        self._epoch, self._step = 0, 0
        on_gpu = self.device.type == "cuda"
        self._pin_memory = pin_memory and on_gpu
        # One stream for all epochs: torch keeps freed memory by stream, and would take more for each new one.
        self._copying = torch.cuda.Stream(self.device) if on_gpu else None
        name, reason = _choose_decoder(decoder, on_gpu)
        log_level = logging.INFO if shuffle else logging.DEBUG  # validation's choices are those of training, said there
        log.log(log_level, "decoder: %s (%s)", name, reason)
        if name == "dali":
            from fastseg.data.dali import DaliDecoder  # loads DALI: only for those who use it

            self.decoder: HostDecoder | DaliDecoder = DaliDecoder(
                pairs,
                height,
                width,
                mask_resize=mask_resize,
                num_workers=num_workers,
                bad=self.bad,
                device=self.device,
            )
        else:
            self.decoder = HostDecoder(
                pairs,
                height,
                width,
                mask_resize=mask_resize,
                num_workers=num_workers,
                bad=self.bad,
                pin_memory=self._pin_memory,
            )
        self.cache = open_cache(
            cache, pairs, height, width, mask_resize, name, self.device, cache_dir, log_level=log_level
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.pairs), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: the next batch it gives is number `step` of `epoch`."""
        place = {"seed": self.seed, "epoch": self._epoch, "step": self._step}
        return {**place, "pairs": len(self.pairs), "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with any decoder, cache and number of threads.

        Raises:
            ConfigError: the state belongs to another number of pairs, or stands within an epoch of other batches.
        """
        if state["pairs"] != len(self.pairs):
            raise ConfigError(
                f"the checkpoint's epoch had {state['pairs']} training pairs; there are {len(self.pairs)} now. "
                "Give the same data, or start anew with load_model=false."
            )
        if state["step"] and state["batch_size"] != self.batch_size:
            raise ConfigError(
                f"batch_size: must be {state['batch_size']}, as in the epoch that the checkpoint stands in; "
                f"got {self.batch_size}. Give batch_size={state['batch_size']}, or start anew with load_model=false."
            )
        self.seed, self._epoch, self._step = state["seed"], state["epoch"], state["step"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; the next call begins the next one."""
        source = self._on_device(self._decode_or_gather(self._batches(self._epoch)[self._step :]))
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                break
            self._step += 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """This process's slice of every batch of an epoch."""
        count = len(self.pairs)
        order = epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return [order[start : start + self.batch_size][self.rank :: self.world_size] for start in starts]

    def _decode_or_gather(self, batches: list[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        cache = self.cache
        if cache is None:
            yield from self.decoder.decode(batches)
            return
        if self.bad.found:
            batches = [np.array([self.bad.replacement(int(i)) for i in indices], np.int64) for indices in batches]
        # An epoch meets each pair once, so what is missing at its beginning decides what is decoded.
        missing = [~cache.filled[indices] for indices in batches]
        todo = [indices[lack] for indices, lack in zip(batches, missing, strict=True) if lack.any()]
        pin_memory = self._pin_memory and cache.device.type == "cpu"
        with contextlib.closing(self.decoder.decode(todo)) as decoded:
            for indices, lack in zip(batches, missing, strict=True):
                if not lack.any():
                    yield cache.gather(indices, pin_memory)
                    continue
                batch = next(decoded)
                if cache.device != batch.images.device and cache.device.type == "cuda":
                    batch = _move(batch, cache.device)
                cache.put(batch)
                if not lack.all():
                    indices = indices.copy()
                    indices[lack] = batch.indices  # those that replace bad samples are others than asked for
                    batch = cache.gather(indices, pin_memory)
                yield batch
        if self.world_size == 1 and not cache.filled.all():
            self._decode_rest(cache)
        cache.publish(list(self.bad.found))

    def _decode_rest(self, cache: Cache) -> None:
        """Decode what `drop_last` left out of the epoch, so that the cache is complete."""
        rest = [index for index in np.flatnonzero(~cache.filled) if index not in self.bad.found]
        for batch in self.decoder.decode(np.array_split(rest, -(-len(rest) // self.batch_size)) if rest else []):
            cache.put(batch)

    def _on_device(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """Copy each batch to the GPU on a stream of its own, while the step before it runs."""
        if self._copying is None:
            yield from batches
            return
        copying = self._copying
        ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()
        with contextlib.closing(batches):
            for batch in batches:
                if batch.images.device.type == "cuda":
                    while ahead:  # what was asked for first comes first
                        yield wait_on_current_stream(*ahead.popleft())
                    yield batch
                    continue
                with torch.cuda.stream(copying):
                    ahead.append((_move(batch, self.device), copying.record_event()))
                if len(ahead) > 1:
                    yield wait_on_current_stream(*ahead.popleft())
        while ahead:
            yield wait_on_current_stream(*ahead.popleft())


def make_loader(pairs: Pairs, config: Config, runtime: Runtime, *, training: bool) -> Loader:
    """A loader as configured: shuffled whole batches for training; otherwise every pair, in order."""
    same_name = ("batch_size", "seed", "decoder", "num_workers", "mask_resize", "cache", "cache_dir", "bad_samples")
    return Loader(
        pairs,
        height=config.image_height,
        width=config.image_width,
        shuffle=training,
        drop_last=training,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        pin_memory=config.pin_memory,
        **{name: getattr(config, name) for name in same_name},
    )


def _check_settings(given: dict[str, Any]) -> None:
    for field, least in MINIMUMS.items():
        if given[field] < least:
            raise ConfigError(f"{field}: must be at least {least}; got {given[field]}.")
    for field, known in CHOICES.items():
        if given[field] not in known:
            raise ConfigError(f"{field}: must be one of {', '.join(known)}; got {given[field]!r}.")
    if given["rank"] >= given["world_size"]:
        raise ConfigError(f"rank: must be below world_size, {given['world_size']}; got {given['rank']}.")


def _move(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(
        images=batch.images.to(device, non_blocking=True), masks=batch.masks.to(device, non_blocking=True)
    )


def _choose_decoder(name: str, on_gpu: bool) -> tuple[str, str]:
    if name != "auto":
        return name, "as asked"
    if on_gpu and _has_dali():
        return "dali", "the GPU decodes"
    if on_gpu:
        return "host", "DALI is not installed"
    return "host", "on a CPU measured several times faster than DALI: benchmarks/README.md"


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package above it
        return False
