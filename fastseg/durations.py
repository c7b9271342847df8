"""Durations as people write them: 600, 90s, 10m, 1h or 1h30m."""

import re
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

__all__ = ["Seconds", "format_duration", "parse_duration"]

PATTERN = re.compile(r"(?=\d)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)


def parse_duration(value: Any) -> Any:
    """Seconds of a text such as `10m`; anything else, and a plain number, is returned as it is.

    >>> parse_duration("90s"), parse_duration("10m"), parse_duration("1h30m"), parse_duration("600")
    (90.0, 600.0, 5400.0, '600')

    Raises:
        ValueError: the text is neither a number nor a time with the units h, m and s.
    """
    text = value.strip().lower() if isinstance(value, str) else ""
    if match := PATTERN.fullmatch(text):
        return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    if isinstance(value, str):
        try:
            float(text)
        except ValueError:
            raise ValueError("must be seconds, or a time such as 90s, 10m or 1h") from None
    return value


def format_duration(seconds: float) -> str:
    """Seconds as text: 45 s, 2 min 30 s or 1 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


Seconds: TypeAlias = Annotated[float, BeforeValidator(parse_duration)]  # a field of `Config`
