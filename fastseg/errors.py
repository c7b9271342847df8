"""Errors that a user can fix. Each message names the file or field, the rule, what was found and what to do."""

from typing import Literal

__all__ = ["CheckpointError", "ConfigError", "DataError", "FastsegError", "OutputError"]


class FastsegError(Exception):
    """Base of every error that a user can fix. The command line prints it and exits with status 2."""


class ConfigError(FastsegError, ValueError):
    """A setting is unknown, out of range, or does not fit this machine."""


class DataError(FastsegError):
    """A file of the data set is missing, unreadable, or does not fit its partner.

    Args:
        message: names the file, or, where a decoder raises it that knows only bytes, begins with the verb.
        kind: what is wrong: "unreadable", "size" (mask and image differ) or "values" (a mask of too many
            or unlisted values).
    """

    def __init__(self, message: str, kind: Literal["unreadable", "size", "values"] = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind

    def in_file(self, path: str) -> "DataError":
        """The same error with the name of its file in front."""
        return DataError(f"{path}: {self}", self.kind)


class CheckpointError(FastsegError):
    """A checkpoint is missing, damaged, or belongs to another network."""


class OutputError(FastsegError):
    """A file or folder cannot be written: the disk is full, or permissions forbid it.

    Args:
        path: the file or folder.
        error: what the operating system reported.
        remedy: what the user can do.
    """

    def __init__(self, path: object, error: OSError, remedy: str = "Make room, or choose another place") -> None:
        super().__init__(f"{path}: cannot be written ({error.strerror}). {remedy}.")
