"""Ctrl-C and SIGTERM as a request to stop, so that work ends at a point from which it resumes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastseg.runtime.distributed import get_world_size

__all__ = ["stop_on_signal"]


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block call `stop` when Ctrl-C or SIGTERM arrives; a second one has its usual effect.

    Not so under torchrun, which passes on a Ctrl-C that its ranks have received from the terminal already, and kills
    ranks that do not end within 30 s.

    Does nothing in another than the main thread, where the main program handles signals.
    """

    def handle(number: int, frame: object) -> None:
        stop()
        if get_world_size() == 1:
            signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
