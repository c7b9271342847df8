"""Classes of a mask: their names, the values or colours that stand for them in mask files, their colours in pictures.

["background", "car", "road"]                           the value of a pixel is the class's number
{"background": 0, "car": 7}                             other values
{"sky": [128, 128, 128], "road": [128, 64, 128]}        RGB masks
[{"name": "car", "value": 7, "colour": [0, 0, 142]}]    values, and the colours of pictures

A file holds one of these as JSON, or lines `name R G B` or `R G B name`, as CamVid's do.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastseg.errors import ConfigError

__all__ = ["IGNORED", "MAX_CLASSES", "Colour", "SegClass", "default_colours", "read_classes"]

IGNORED = 255  # in decoded masks: the pixel counts in no loss and no score
MAX_CLASSES = 254  # 254 and 255 are no classes in decoded masks
FILE_EXTENSIONS = (".json", ".txt", ".csv")
HEADER_LINE = r"name\W+r\W+g\W+b"  # of the class_dict.csv that some copies of CamVid have
COLOUR = r"(?P<red>\d+)[\s,]+(?P<green>\d+)[\s,]+(?P<blue>\d+)"
NAME = r"(?P<name>.*?[^\s,])"

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]


class SegClass(BaseModel):
    """One class.

    Attributes:
        value: grey value or palette index in mask files; None if `colour` stands for the class in RGB masks.
        colour: RGB, 0..255, in pictures and in the palettes of predicted masks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    value: Byte | None = None
    colour: Colour


def read_classes(given: Any) -> tuple[SegClass, ...]:
    """Complete classes of any form that `Config.classes` accepts.

    Args:
        given: names, or one text of names with commas; a path; a mapping of names to values or colours; or a sequence
            of `SegClass` or of mappings with "name" and, if all have it, "value" or "colour". "" and an empty sequence
            mean no classes.

    Returns:
        The classes in the order given. Names alone get their positions as values; missing colours are those of
        `default_colours` that no other class has.

    Raises:
        ConfigError: a rule is broken, or the file cannot be read; names the class and the file.
    """
    file = ""
    given = os.fspath(given) if isinstance(given, os.PathLike) else given
    if isinstance(given, str):
        text = given.strip()
        is_file = text.lower().endswith(FILE_EXTENSIONS) or "," not in text
        file, given = (text, _read_file(text)) if text and is_file else ("", text.split(",") if text else ())
    try:
        entries = [_check_entry(entry) for entry in _as_entries(given)]
        return _complete(entries) if entries or file else ()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from None


def default_colours(count: int) -> Sequence[Colour]:
    """Colours that are easy to tell apart: Pascal VOC's colour map, whose first colour is black.

    Source: the VOC2012 development kit, VOClabelcolormap.m.
    """
    return [tuple(_voc_channel(index, channel) for channel in range(3)) for index in range(count)]  # type: ignore[misc]


def _voc_channel(index: int, channel: int) -> int:
    """Three bits of the index per level, one for each channel, from the highest bit of the colour on."""
    return sum(((index >> (3 * level + channel)) & 1) << (7 - level) for level in range(3))


def _read_file(path: str) -> Any:
    """The content of a file of classes, not checked."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if path.lower().endswith(".json") or text.lstrip()[:1] in ("[", "{"):
            return json.loads(text, object_pairs_hook=_unique_keys)
    except OSError as error:
        remedy = "Give an existing file, or names separated by commas"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {remedy}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError, or bytes that are not text
        raise ConfigError(f"{path}: is no file of classes ({error}). Correct the file.") from None
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#") or re.fullmatch(HEADER_LINE, line, re.IGNORECASE):
            continue
        found = re.fullmatch(rf"{COLOUR}[\s,]+{NAME}", line) or re.fullmatch(rf"{NAME}[\s,]+{COLOUR}", line)
        if found is None:
            raise ConfigError(f"{path}, line {number}: must be `name R G B` or `R G B name`; got {line[:40]!r}.")
        entries.append({"name": found["name"], "colour": [int(found[part]) for part in ("red", "green", "blue")]})
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_duplicates("name", [key for key, _ in pairs])
    return dict(pairs)


def _as_entries(given: Any) -> list[dict[str, Any]]:
    """Each class as a dictionary of what is given for it."""
    if isinstance(given, Mapping):
        named = [(name, "colour" if isinstance(item, list | tuple) else "value", item) for name, item in given.items()]
        return [{"name": name, key: item} for name, key, item in named]
    if not isinstance(given, list | tuple):
        raise ConfigError(f"must be names, or a file or mapping of names and values or colours; got {given!r:.60}.")
    entries = []
    for item in given:
        if isinstance(item, SegClass):
            item = item.model_dump()
        if isinstance(item, str):
            item = {"name": item}
        if not isinstance(item, Mapping) or "name" not in item:
            raise ConfigError(f"each class must be a name or have a name; got {item!r:.60}.")
        entries.append({"colour" if key == "color" else key: part for key, part in item.items()})
    return entries


def _check_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its name stripped, its colour a tuple, and without keys whose value is None."""
    name = entry["name"].strip() if isinstance(entry["name"], str) else ""
    if not name:
        raise ConfigError(f"a class's name must be text that is not empty; got {entry['name']!r:.60}.")
    if unknown := sorted(map(str, entry.keys() - {"name", "value", "colour"})):
        raise ConfigError(f"class {name}: must have a name, value and colour alone; got {unknown[0]}. Remove it.")
    checked: dict[str, Any] = {"name": name}
    if (value := entry.get("value")) is not None:
        if not _is_byte(value):
            raise ConfigError(f"class {name}: its value must be a whole number, 0 to 255; got {value!r:.60}.")
        checked["value"] = int(value)
    if (colour := entry.get("colour")) is not None:
        if not isinstance(colour, list | tuple) or len(colour) != 3 or not all(map(_is_byte, colour)):
            raise ConfigError(f"class {name}: its colour must be three whole numbers, 0 to 255; got {colour!r:.60}.")
        checked["colour"] = tuple(map(int, colour))
    return checked


def _is_byte(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= 255


def _complete(entries: list[dict[str, Any]]) -> tuple[SegClass, ...]:
    if not 2 <= len(entries) <= MAX_CLASSES:
        names = f" ({entries[0]['name']})" if len(entries) == 1 else ""
        raise ConfigError(f"must be 2 to {MAX_CLASSES} classes; got {len(entries)}{names}. Name the background, too.")
    for part in ("name", "value", "colour"):
        _refuse_duplicates(part, [entry[part] for entry in entries if part in entry], entries)
    parts = [part for part in ("value", "colour") if any(part in entry for entry in entries)]
    if not parts:
        entries = [{**entry, "value": position} for position, entry in enumerate(entries)]
    elif without := [entry["name"] for entry in entries if parts[0] not in entry]:
        part = parts[0]
        other = next(entry["name"] for entry in entries if part in entry)
        raise ConfigError(
            f"class {without[0]}: has no {part}, but class {other} has one (masks hold values or colours, not both). "
            f"Give every class a {part}, or none."
        )
    taken = {entry.get("colour") for entry in entries}
    choices = default_colours(2 * MAX_CLASSES)
    classes = []
    for entry, default in zip(entries, choices, strict=False):
        colour = entry.get("colour") or next(each for each in (default, *choices) if each not in taken)
        taken.add(colour)
        classes.append(SegClass(name=entry["name"], value=entry.get("value"), colour=colour))
    return tuple(classes)


def _refuse_duplicates(part: str, found: list[Any], entries: Sequence[dict[str, Any]] = ()) -> None:
    twice = next((item for item, count in Counter(found).items() if count > 1), None)
    if twice is None:
        return
    names = [entry["name"] for entry in entries if entry.get(part) == twice]
    if part == "name" or not names:
        raise ConfigError(f"class {twice}: its name occurs twice. Give each class a name of its own.")
    raise ConfigError(f"class {names[1]}: has the {part} of class {names[0]}, {twice}. Give each its own.")
