"""Checkpoints written by a background thread: training waits for a copy of the state, not for the disk."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastseg.errors import FastsegError
from fastseg.network.checkpoint import save_checkpoint

__all__ = ["CheckpointWriter", "copy_to_cpu"]

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints atomically and in order. As a context manager, it waits for the last one at its end.

    Used by one thread. At most one save is in progress, so there is at most one copy of the state.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: Future[None] | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save is in progress, for which the next one would wait."""
        return self._saving is not None and not self._saving.done()

    def save(self, states: Mapping[Path, dict[str, Any]], *, if_finite: bool = False) -> None:
        """Copy the states and start writing them; returns before they are on disk. Waits for the previous save.

        Args:
            states: by file, in the order of writing.
            if_finite: write nothing if a number of the weights or of `loss_sum` is infinite or NaN. The background
                thread checks it, so that training waits for nothing.

        Raises:
            OutputError: the previous save failed; its files are those of the save before it. Nothing is written.
        """
        self.wait()
        self._saving = self._thread.submit(_write, *copy_to_cpu(states), if_finite)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            OutputError: a file cannot be written; the previous one is intact.
        """
        if self._saving:
            try:
                self._saving.result()
            finally:
                if self._saving.done():  # Ctrl-C may interrupt the wait
                    self._saving = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except FastsegError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the first error ends the run; this one must not replace it
        finally:
            self._thread.shutdown()


def copy_to_cpu(states: Mapping[Path, dict[str, Any]]) -> tuple[dict[Path, dict[str, Any]], list[torch.cuda.Event]]:
    """Copy nested dictionaries and lists and their tensors. A tensor that occurs twice is copied once.

    Copies from a GPU go to pinned memory, between the step before and the step after; the host does not wait.

    Returns:
        The copies, and the events after which those from a GPU are complete.
    """
    copies: dict[int, Tensor] = {}
    devices: set[torch.device] = set()
    copied = _copy(states, copies, devices)
    return copied, [torch.cuda.current_stream(device).record_event() for device in devices]


def _copy(value: Any, copies: dict[int, Tensor], devices: set[torch.device]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", non_blocking=value.is_cuda, copy=True)
            if value.is_cuda:
                devices.add(value.device)
        return copies[id(value)]
    if isinstance(value, Mapping):
        return {key: _copy(item, copies, devices) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item, copies, devices) for item in value]
    return value


def _write(states: dict[Path, dict[str, Any]], ready: list[torch.cuda.Event], if_finite: bool) -> None:
    for event in ready:
        event.synchronize()
    if if_finite and not all(map(_is_finite, states.values())):
        return
    for path, state in states.items():
        save_checkpoint(path, state)


def _is_finite(state: dict[str, Any]) -> bool:
    tensors = [state["loss_sum"], *state["model"].values(), *(state["ema_model"] or {}).values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
