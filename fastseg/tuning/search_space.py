"""Which fields of `Config` a study varies and between which values, read from text and checked before the first trial.

learning_rate=1e-5:1e-3:log    every number between, evenly on a logarithmic scale
rotation=0:20                  every number between (whole ones for a field of whole numbers)
batch_size=8,16,32             one of these
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastseg.config import Config, closest_match, format_value
from fastseg.errors import ConfigError

__all__ = ["Range", "Values", "read_flags", "read_search", "values_as_text"]

# Fields that every trial must share: where things are and go, and what a score is measured on or how long a trial is.
SHARED = (
    *("out_dir", "name", "load_model", "checkpoint", "cache_dir"),
    *("train_img_dir", "train_mask_dir", "val_img_dir", "val_mask_dir", "val_fraction", "bad_samples"),
    *("image_height", "image_width", "mask_resize", "num_epochs", "min_steps", "time_limit_s"),
)


@dataclass(frozen=True)
class Range:
    """Every number from `low` to `high`, both included."""

    low: float  # both int where the field takes whole numbers
    high: float
    log: bool = False


Values: TypeAlias = Range | tuple[Any, ...]  # a tuple holds the choices


def read_search(config: Config, search: Mapping[str, str]) -> dict[str, Values]:
    """The values of each field to search.

    Args:
        config: what the trials have in common; with any value that is searched it must be a valid configuration.
        search: field to text: `low:high`, `low:high:log` or `choice,choice,...`.

    Raises:
        ConfigError: a field is unknown or must be shared by all trials, or a value breaks one of its rules.
    """
    if not search:
        raise ConfigError("search: must name at least one field, such as learning_rate=1e-5:1e-3:log; got none.")
    space: dict[str, Values] = {}
    for key, text in search.items():
        field = key.lower().replace("-", "_")
        if field not in Config.model_fields:
            raise ConfigError(
                f"search: {key} is no known field. Did you mean {closest_match(field, Config.model_fields)}?"
            )
        if field in SHARED:
            raise ConfigError(
                f"search: {field} must be the same in every trial, or their scores cannot be compared. Set it once."
            )
        if field in space:
            raise ConfigError(f"search: {field} is given twice. Keep one.")
        is_number = Config.model_fields[field].annotation in (int, float)
        space[field] = (
            _read_range(config, field, text) if is_number and ":" in text else _read_choices(config, field, text)
        )
    return space


def read_flags(flags: Iterable[str]) -> dict[str, str]:
    """Field to text, of `FIELD=VALUES` each."""
    search: dict[str, str] = {}
    for flag in flags:
        field, equals, text = flag.partition("=")
        if not equals:
            raise ConfigError(f"search: must be FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C; got {flag}.")
        if field in search:
            raise ConfigError(f"search: {field} is given twice. Keep one.")
        search[field] = text
    return search


def values_as_text(values: Values) -> str:
    """Values as they are written in a search."""
    if isinstance(values, Range):
        return f"{format_value(values.low)}:{format_value(values.high)}{':log' if values.log else ''}"
    return ",".join(map(format_value, values))


def _read_range(config: Config, field: str, text: str) -> Range:
    low_text, high_text, *rest = text.split(":")
    if rest not in ([], ["log"]):
        raise ConfigError(f"search: {field} must be LOW:HIGH or LOW:HIGH:log; got {text}.")
    low, high = _read_value(config, field, low_text), _read_value(config, field, high_text)
    if low >= high:
        raise ConfigError(f"search: {field} must go from a lower to a higher number; got {text}.")
    if rest and low <= 0:
        raise ConfigError(f"search: {field} must begin above 0 on a logarithmic scale; got {text}. Leave out :log.")
    return Range(low, high, log=bool(rest))


def _read_choices(config: Config, field: str, text: str) -> tuple[Any, ...]:
    choices = tuple(_read_value(config, field, choice.strip()) for choice in text.split(","))
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ConfigError(f"search: {field} must have two or more different choices; got {text}.")
    return choices


def _read_value(config: Config, field: str, text: str) -> Any:
    """A value as `Config` reads and checks it, beside the other fields."""
    try:
        return getattr(config.replace(**{field: text}), field)
    except ConfigError as error:
        raise ConfigError(f"search: {error}") from None
