"""Command-line flags for the fields of `Config`: `--batch-size N` for `batch_size`."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from fastseg.config import Config, format_value
from fastseg.errors import ConfigError

__all__ = ["add_all_fields", "add_fields", "read_config", "read_fields", "read_search"]


def add_fields(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add a flag for each of these fields; `Config` parses and validates the text."""
    for name in names:
        field = Config.model_fields[name]
        default = f" (default: {format_value(field.default)})" if field.default not in ("", ()) else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field_{name}",
            metavar=_metavar(field.annotation),
            default=argparse.SUPPRESS,
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def add_all_fields(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and a flag for each field."""
    parser.add_argument("--config", metavar="FILE", help="JSON file of fields; flags override it")
    add_fields(parser, tuple(Config.model_fields))


def read_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The given fields and their text."""
    return {key.removeprefix("field_"): value for key, value in vars(options).items() if key.startswith("field_")}


def read_config(options: argparse.Namespace) -> Config:
    """The configuration of `--config` and the flags.

    Raises:
        ConfigError: the file cannot be used, or a field breaks a rule.
    """
    fields = read_fields(options)
    return Config(**fields) if options.config is None else Config.from_json(options.config).replace(**fields)


def read_search(texts: Sequence[str]) -> dict[str, str]:
    """Fields and their values, from texts FIELD=VALUES; the field may be written as a flag.

    Raises:
        ConfigError: a text has another form, or a field occurs twice.
    """
    search: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        field = name.lower().replace("-", "_")
        if not equals:
            raise ConfigError(f"search: must be FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C; got {text}.")
        if field in search:
            raise ConfigError(f"search: {field} is given twice. Keep one.")
        search[field] = values
    return search


def _metavar(annotation: Any) -> str:
    """A field's choices or type, for the help."""
    if get_origin(annotation) is Literal:
        return "|".join(filter(None, get_args(annotation)))
    return {bool: "true|false", int: "N", float: "X"}.get(annotation, "TEXT")
