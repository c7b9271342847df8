"""Caches of decoded pairs, uint8, filled in the first epoch: in GPU memory, in RAM, or in a memory-mapped file.

Carvana's training set takes 0.8 GB at 160x240. With a cache, each pair is decoded once. The processes that torchrun
starts on one machine share the caches in RAM and on disk.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastseg.data.caches.disk import DiskCache, file_stamps
from fastseg.data.caches.memory import Cache
from fastseg.data.caches.rows import STAMP_BYTES, TEMPORARY_SUFFIX, Rows
from fastseg.data.caches.shared import RowsCache
from fastseg.data.host import HostDecoder
from fastseg.errors import ConfigError, OutputError
from fastseg.runtime.distributed import barrier, from_local_leader, get_local_rank
from fastseg.runtime.files import user_cache
from fastseg.runtime.memory import free_host_memory

__all__ = ["Cache", "DiskCache", "open_cache"]

log = logging.getLogger(__name__)


def open_cache(
    kind: str,
    decoder: HostDecoder,
    device: torch.device,
    cache_dir: str = "",
    *,
    shared: bool = False,
    log_level: int = logging.INFO,
) -> Cache | None:
    """The cache for a loader; None for "off".

    Args:
        kind: "device", "memory", "disk", "off", or "auto": the fastest whose free space is twice the cache's size.
        decoder: of the pixels to cache.
        cache_dir: folder of disk caches; empty: `fastseg` in the user's cache folder.
        shared: map the cache of this machine's first process, if it is in memory or on disk. All ranks must call this.
        log_level: at which the choice is logged.

    Raises:
        OutputError: the folder cannot be written.
        ConfigError: there is not enough memory.
    """
    folder = _cache_folder(cache_dir)
    shape = (len(decoder.pairs), decoder.height, decoder.width)
    reason = "as configured"
    if kind == "auto":
        kind, reason = _choose_cache(math.prod(shape) * 4, device, folder)
    log.log(log_level, "cache: %s (%s)", kind, reason)
    open_own = partial(_open, kind, decoder, device, folder)
    return _share(kind, decoder, open_own) if shared else open_own()


def _share(kind: str, decoder: HostDecoder, open_own: Callable[[], Cache | None]) -> Cache | None:
    """The cache of this machine's first process; this process's own where the two cannot share one."""
    leads, path = get_local_rank() == 0, ""
    cache: Cache | None = None
    try:
        if leads:
            cache, path = _offer(kind, decoder, open_own)
    finally:  # after an error too, so that the other processes do not wait
        path = from_local_leader(path)
    if not leads:
        cache = (_map(kind, decoder, path) if path else None) or open_own()
    barrier()  # the first process holds its file open until the others have mapped it
    return cache


def _offer(kind: str, decoder: HostDecoder, open_own: Callable[[], Cache | None]) -> tuple[Cache | None, str]:
    """A cache, and the path where other processes can map it; empty if they cannot."""
    shape = (len(decoder.pairs), decoder.height, decoder.width)
    if kind == "memory" and hasattr(os, "memfd_create"):
        _check_memory(shape)
        rows, path = Rows.in_memory(shape)
        return RowsCache(rows, _no_stamps(shape[0])), path
    cache = open_own()
    if isinstance(cache, DiskCache) and cache.temporary is not None:
        return cache, str(cache.temporary.path)
    return cache, ""


def _map(kind: str, decoder: HostDecoder, path: str) -> Cache | None:
    """The cache of another process; None if this one wants another kind, or cannot open it."""
    if kind not in ("memory", "disk"):
        return None
    shape = (len(decoder.pairs), decoder.height, decoder.width)
    rows = Rows.open(path, shape, shared=True)
    if rows is None:
        return None
    stamps = file_stamps(decoder.pairs) if path.endswith(TEMPORARY_SUFFIX) else _no_stamps(shape[0])
    return RowsCache(rows, stamps)


def _open(kind: str, decoder: HostDecoder, device: torch.device, folder: Path) -> Cache | None:
    """A cache for this process alone."""
    if kind == "off":
        return None
    if kind == "disk":
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return DiskCache(decoder, folder)
        except OSError as error:
            raise OutputError(folder, error, "Make room, give another cache_dir, or use cache=off") from None
    place = device if kind == "device" else torch.device("cpu")
    shape = (len(decoder.pairs), decoder.height, decoder.width)
    if place.type == "cpu":
        _check_memory(shape)
    try:
        images = torch.empty((*shape, 3), dtype=torch.uint8, device=place)
        return Cache(images, torch.empty(shape, dtype=torch.uint8, device=place))
    except RuntimeError:  # torch raises no narrower class on the CPU
        raise _no_room(kind, shape) from None


def _no_stamps(count: int) -> NDArray[np.uint8]:
    """Stamps of rows that no later run reads."""
    return np.ones((count, STAMP_BYTES), np.uint8)


def _no_room(kind: str, shape: tuple[int, int, int]) -> ConfigError:
    size = f"{math.prod(shape) * 4 / 2**20:.0f} MiB"
    return ConfigError(f"cache: {kind} has no room for the {size} of {shape[0]} pairs. Use cache=disk or off.")


def _check_memory(shape: tuple[int, int, int]) -> None:
    """Refuse a cache that memory has no room for: its pages are allocated in the first epoch, when it is too late."""
    size, free = math.prod(shape) * 4, free_host_memory()
    if 0 < free < size:
        raise _no_room("memory", shape)


def _choose_cache(size: int, device: torch.device, folder: Path) -> tuple[str, str]:
    needs = f"{size / 2**20:.0f} MiB"
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 2:
        return "device", f"{needs} fit into half of the GPU's free memory"
    if size <= free_host_memory() / 2:
        return "memory", f"{needs} fit into half of the free memory"
    existing = next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))
    if size <= shutil.disk_usage(existing).free / 2 and os.access(existing, os.W_OK):
        return "disk", f"{needs} fit into half of the free disk space"
    return "off", f"{needs} fit nowhere"


def _cache_folder(cache_dir: str) -> Path:
    return Path(os.path.expanduser(cache_dir)) if cache_dir else user_cache()
