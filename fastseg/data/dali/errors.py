"""The errors of DALI: which of them a file causes, and which end the run.

DALI raises RuntimeErrors. Their text names the operator and, after "encountered:", the reason. Everything here is read
from that text, as DALI 2.4 writes it.
"""

import contextlib
import re
from collections.abc import Iterator

from fastseg.errors import ConfigError, FastsegError

__all__ = ["DaliFileError", "dali_config_errors", "dali_run_errors"]

# Statuses of bad, unsupported and incomplete code streams, from nvImageCodec's core and its extensions. All others are
# about the machine. Source: nvimgcodecStatus_t in nvimgcodec.h 0.9.
BAD_FILE_STATUSES = {3, 4, 13, 14, 19}


class DaliFileError(RuntimeError):
    """DALI stopped at a file that it cannot decode; the pipeline object cannot be used again."""


@contextlib.contextmanager
def dali_config_errors() -> Iterator[None]:
    """Turn whatever the import of DALI or the build of a pipeline raises into a ConfigError."""
    try:
        yield
    except Exception as error:  # ImportError, OSError, RuntimeError; TypeError for arguments that old versions lack
        raise ConfigError(
            f"decoder: DALI does not work here ({_reason(error)}). Use decoder=host, or install nvidia-dali-cuda120 "
            "and a driver for CUDA 12."
        ) from None


@contextlib.contextmanager
def dali_run_errors() -> Iterator[None]:
    """Turn a RuntimeError of a running pipeline into a `DaliFileError` or, if no file is at fault, a FastsegError."""
    try:
        yield
    except RuntimeError as error:
        if _is_bad_file(str(error)):
            raise DaliFileError(_reason(error)) from None
        raise FastsegError(
            f"decoder: DALI stopped ({_reason(error)}). Use decoder=host, or a smaller batch_size."
        ) from None


def _is_bad_file(message: str) -> bool:
    operator, _, reason = message.partition("encountered:")
    if "operator `nvidia.dali.fn.decoders.image`" not in operator:
        return False
    if status := re.match(r"\s*nvImageCodec failure: '#(\d+)'", reason):
        return int(status[1]) in BAD_FILE_STATUSES
    return reason.lstrip().startswith("Failed to decode sample #")


def _reason(error: Exception) -> str:
    """The line that says what happened; the others say where."""
    lines = str(error).rpartition("encountered:")[2].strip().splitlines()
    return next((line for line in lines if line and not line.startswith("Critical error")), type(error).__name__)
