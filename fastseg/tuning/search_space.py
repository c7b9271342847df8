"""Which fields of `Config` a study searches: text, checked before the first trial, becomes Optuna's distributions.

learning_rate=1e-5:1e-3:log    any number from 1e-5 to 1e-3, uniform on a logarithmic scale
rotation=0:20                  any number from 0 to 20 (any whole number if the field takes whole numbers)
batch_size=8,16,32             one of these choices
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fastseg.config import Config, closest_match, format_value
from fastseg.errors import ConfigError

__all__ = ["Distribution", "choices_or_bounds", "format_distribution", "parse_search"]

Distribution: TypeAlias = FloatDistribution | IntDistribution | CategoricalDistribution

# Fields that all trials share: file locations, what the score is measured on, which the seed splits, and the length.
SHARED = (
    *("out_dir", "name", "load_model", "checkpoint", "cache_dir"),
    *("train_img_dir", "train_mask_dir", "val_img_dir", "val_mask_dir", "val_fraction", "bad_samples"),
    *("classes", "ignore_value", "seed"),
    *("image_height", "image_width", "mask_resize", "num_epochs", "min_steps", "time_budget", "refiner_steps"),
)


def parse_search(config: Config, search: Mapping[str, str]) -> dict[str, Distribution]:
    """The distribution of each searched field.

    Args:
        config: the settings that all trials share; must stay valid with any searched value.
        search: field to text: `low:high`, `low:high:log` or `choice,choice,...`.

    Raises:
        ConfigError: a field is unknown or cannot be searched, or a value is invalid.
    """
    if not search:
        raise ConfigError("search: must name at least one field, such as learning_rate=1e-5:1e-3:log; got none.")
    space: dict[str, Distribution] = {}
    for key, text in search.items():
        field = key.lower().replace("-", "_")
        if field not in Config.model_fields:
            raise ConfigError(
                f"search: {key} is no known field. Did you mean {closest_match(field, Config.model_fields)}?"
            )
        if field in SHARED:
            raise ConfigError(f"search: {field} must be the same in all trials to make scores comparable. Set it once.")
        if field in space:
            raise ConfigError(f"search: {field} is given twice. Keep one.")
        is_number = Config.model_fields[field].annotation in (int, float)
        parse = _parse_range if is_number and ":" in text else _parse_choices
        space[field] = parse(config, field, text)
    return space


def choices_or_bounds(distribution: Distribution) -> Sequence[Any]:
    """All choices, or the lowest and the highest number."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return distribution.low, distribution.high


def format_distribution(distribution: Distribution) -> str:
    """A distribution in the notation of a search."""
    separator = "," if isinstance(distribution, CategoricalDistribution) else ":"
    text = separator.join(map(format_value, choices_or_bounds(distribution)))
    return f"{text}:log" if getattr(distribution, "log", False) else text


def _parse_range(config: Config, field: str, text: str) -> Distribution:
    low_text, high_text, *scale = text.split(":")
    if scale not in ([], ["log"]):
        raise ConfigError(f"search: {field} must be LOW:HIGH or LOW:HIGH:log; got {text}.")
    low, high = _parse_value(config, field, low_text), _parse_value(config, field, high_text)
    if low >= high:
        raise ConfigError(f"search: {field} must be a range from a lower to a higher number; got {text}.")
    if scale and low <= 0:
        raise ConfigError(f"search: {field} must start above 0 on a logarithmic scale; got {text}. Leave out :log.")
    distribution = IntDistribution if isinstance(low, int) else FloatDistribution
    return distribution(low, high, log=bool(scale))


def _parse_choices(config: Config, field: str, text: str) -> Distribution:
    choices = [_parse_value(config, field, choice.strip()) for choice in text.split(",")]
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ConfigError(f"search: {field} must have two or more different choices; got {text}.")
    return CategoricalDistribution(choices)


def _parse_value(config: Config, field: str, text: str) -> Any:
    """A value, parsed and checked by `Config` together with the other fields."""
    try:
        return getattr(config.replace(**{field: text}), field)
    except ConfigError as error:
        raise ConfigError(f"search: {error}") from None
