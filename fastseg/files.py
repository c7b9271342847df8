"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastseg.errors import ConfigError

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside the name, then rename it: a reader finds the old or the new one whole.

    Raises:
        ConfigError: it cannot be written; what was there before is intact.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        os.replace(draft, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Give another place, or make room.") from None
    finally:
        draft.unlink(missing_ok=True)
