"""numba's compiler, with a cache wherever a folder can be written.

numba caches beside the source or in the user's cache folder. Where it can write neither, as in a container without
root, it refuses to compile at all; and it ends the program if the disk is full, or if a power failure has damaged a
file of its cache (https://github.com/numba/numba/issues/10434).
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

__all__ = ["njit"]

config: Any = numba.config  # its fields are set at run time
Function = TypeVar("Function", bound=Callable[..., Any])

log = logging.getLogger(__name__)


def njit(**options: Any) -> Callable[[Function], Function]:
    """`numba.njit`; with `cache=True` cached in numba's own folder, in a temporary one of this user, or not at all."""

    def decorate(function: Function) -> Function:
        configured = config.CACHE_DIR
        for folder in (lambda: configured, _temporary_folder):
            try:
                config.CACHE_DIR = folder()
                dispatcher: Any = numba.njit(**options)(function)
                cache = getattr(dispatcher, "_cache", None)  # none with NUMBA_DISABLE_JIT
                if isinstance(cache, FunctionCache):
                    _compile_without_cache_on_errors(cache)
                return dispatcher
            except (OSError, RuntimeError):  # numba raises RuntimeError where it can write no cache
                continue
            finally:
                config.CACHE_DIR = configured
        return numba.njit(**{**options, "cache": False})(function)

    return decorate


def _compile_without_cache_on_errors(cache: Any) -> None:
    """Let a cache that cannot be read or written cost the time to compile, and no more."""
    save, load = cache.save_overload, cache.load_overload

    def flush(error: Exception) -> None:
        # An index must not name a file that an older version of the kernel has left.
        log.debug("numba's cache of a kernel is emptied: %s", error)
        with contextlib.suppress(OSError):
            cache.flush()

    def save_overload(*arguments: Any) -> None:
        try:
            save(*arguments)
        except Exception as error:
            flush(error)

    def load_overload(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except Exception as error:  # a damaged pickle raises any kind
            flush(error)
            return None

    cache.save_overload, cache.load_overload = save_overload, load_overload


def _temporary_folder() -> str:
    """A folder that this user alone can write: numba executes what it reads from its cache.

    Raises:
        OSError: it cannot be made, or belongs to somebody else.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = os.path.join(tempfile.gettempdir(), f"fastseg-kernels-{user}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if hasattr(os, "getuid") and (status.st_uid != user or status.st_mode & 0o170077 != 0o040000):
        raise PermissionError(f"{folder} does not belong to this user alone")
    return folder
