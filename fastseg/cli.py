"""The command `fastseg`: an error prints one message to standard error and exits with status 2, Ctrl-C with 130."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastseg import __version__
from fastseg.commands import COMMANDS, INTERRUPTED
from fastseg.config import closest_match
from fastseg.errors import ConfigError, FastsegError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors as ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`.")

    def error_unknown(self, argument: str) -> NoReturn:
        """Raise the error for an unknown argument, with the closest known flag."""
        if not argument.startswith("--"):
            self.error(f"{argument}: unknown argument of `{self.prog}`")
        flag, _, _ = argument.partition("=")
        flags = {known[2:].replace("-", "_"): known for known in self._option_string_actions if known.startswith("--")}
        raise ConfigError(
            f"{flag}: unknown flag of `{self.prog}`. Did you mean {flags[closest_match(flag[2:], flags)]}?"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    parser = _parser()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        try:
            options, unknown = parser.parse_known_args(arguments)
            if unknown:
                options.parser.error_unknown(unknown[0])
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
            logging.getLogger("numba").setLevel(logging.WARNING)
            sys.exit(options.run(options))
        finally:
            sys.stdout.flush()
    except FastsegError as error:
        print(f"fastseg: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is not None:
            raise
        _fail_to_print(error)
    except KeyboardInterrupt:
        print("fastseg: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail_to_print(error: OSError) -> NoReturn:
    """Exit after standard output could not be written; a reader that has left, such as `head`, is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
    if not isinstance(error, BrokenPipeError):
        print(f"fastseg: standard output: cannot be written ({error.strerror}). Make room.", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseg", description="Train a segmentation UNet on folders of images and masks.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        usage = f"%(prog)s {command.usage}"
        sub = commands.add_parser(
            command.name, help=command.description, description=command.description, usage=usage, allow_abbrev=False
        )
        sub.set_defaults(run=command.run, parser=sub)
        command.add_arguments(sub)
    return parser
