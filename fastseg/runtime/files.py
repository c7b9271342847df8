"""Files that are there whole or not at all: written beside their name, then renamed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastseg.errors import ConfigError

__all__ = ["replace_file", "written_whole"]


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes its name when the block ends; a reader finds the old one or the new one.

    Whatever the block raises goes on, and the old file stays.

    Yields:
        A path in the same folder, for the block to write.

    Raises:
        OSError: the file cannot be flushed or renamed.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` make a file, whole or not at all.

    Raises:
        ConfigError: it cannot be written; what was there before is intact.
    """
    try:
        with written_whole(path) as draft:
            write(draft)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Give another place, or make room.") from None
