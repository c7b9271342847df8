"""Messages about wrong settings: the rule, the value and the closest known name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fastseg.errors import ConfigError

__all__ = ["closest_match", "describe_errors", "format_value", "shorten"]

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


def format_value(value: Any) -> str:
    """A field's value as written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(item.name for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_errors(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
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
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
