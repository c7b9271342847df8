"""Messages about wrong settings: the field, the rule, the value, and what to do."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fastseg.errors import ConfigError

__all__ = ["closest_match", "count_of", "format_value", "shorten", "size_message", "unique_keys", "validation_message"]

# the rule in a message, by pydantic's error type or its first word
RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "value_error": "{error}",
}
MAX_SHOWN = 80  # characters of a wrong value in its error message


def closest_match(name: str, known: Iterable[str]) -> str:
    """The known name that is closest to a misspelt or abbreviated one; case and dashes are ignored."""
    name, known = name.lower().replace("-", "_"), list(known)
    initials = {"".join(word[:1] for word in field.split("_")): field for field in known}  # lr: learning_rate
    return initials.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def count_of(number: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_value(value: Any) -> str:
    """A field's value as written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(item.name for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def size_message(field: str, size: int, step: int, reason: str) -> str:
    """A message about a side of the images that is not divisible by `step`."""
    below, above = size // step * step, (size // step + 1) * step
    choice = f"{below} or {above}" if below else f"{above}"
    return f"{field}: must be divisible by {step} ({reason}); got {size}. Use {choice}."


def validation_message(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """One message for all wrong fields: field, rule, value and default of each."""
    messages = []
    for item in error.errors():
        kind = item["type"]
        bounds = {name: format_value(bound) for name, bound in item.get("ctx", {}).items()}
        rule = RULES[kind if kind in RULES else kind.partition("_")[0]].format(**bounds)
        if isinstance(item.get("ctx", {}).get("error"), ConfigError):  # a whole message
            rule = f"{item['loc'][0]}: {rule}"
        elif item["loc"]:
            field = str(item["loc"][0])
            default = format_value(fields[field].default)
            rule = f"{field}: {rule}; got {shorten(repr(item['input']))}. The default is {default}."
        messages.append(rule)
    return " ".join(messages)


def shorten(text: str) -> str:
    """The beginning of a value that is shown in a message."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values, for `object_pairs_hook`.

    Raises:
        ConfigError: a key occurs twice.
    """
    twice = next((key for key, count in Counter(key for key, _ in pairs).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice.lower()}: given twice. Keep one.")
    return dict(pairs)
