"""What goes wrong, in one sentence: which file or field, the rule, what was found, what to do."""

__all__ = ["CheckpointError", "ConfigError", "DataError", "FastsegError"]


class FastsegError(Exception):
    """Base of every error that a user can mend. The command line prints it and exits with status 2."""


class ConfigError(FastsegError, ValueError):
    """A setting is unknown, out of range, or does not fit this machine."""


class DataError(FastsegError):
    """A file of the data set is missing, unreadable, or does not fit its partner."""


class CheckpointError(FastsegError):
    """A checkpoint is missing, damaged, or belongs to another network."""
