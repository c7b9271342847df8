"""How often each class occurs in the masks of a set, and a file of classes for masks that have none yet."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastseg.classes import MAX_CLASSES
from fastseg.data.host import read_file
from fastseg.data.labels.decode import count_values, read_stored
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.errors import DataError
from fastseg.quality.headers import map_files
from fastseg.quality.survey import Mask, ScannedSet

__all__ = ["RARE", "ClassCount", "Proposal", "count_pixels", "find_rare_classes", "propose_classes"]

RARE = 0.001  # share of the pixels


class ClassCount(NamedTuple):
    """How often a class occurs in the masks of a set."""

    name: str
    pixels: int
    share: float  # of the pixels that are not ignored
    images: int  # that have a pixel of it


class Proposal(NamedTuple):
    """Classes for masks that have more than two values."""

    classes: dict[str, Any]  # the content of a classes.json
    counts: list[list[ClassCount]]  # of each set
    remedy: str

    def as_text(self) -> str:
        """The file, with one class per line."""
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.classes.items()]
        return "{\n" + ",\n".join(lines) + "\n}"


def count_pixels(part: ScannedSet, encoding: ClassEncoding) -> list[ClassCount]:
    """How often each class occurs in the masks of a set that can be used."""
    masks = [mask.counts for mask in part.masks.values() if isinstance(mask, Mask)]
    per_mask = [dict(enumerate(map(int, counts))) for counts in masks]
    return _table({index: item.name for index, item in enumerate(encoding.classes)}, per_mask)


def find_rare_classes(counts: Sequence[ClassCount]) -> Iterator[tuple[str, str]]:
    """What is found of each class that is absent or rare, and a note."""
    for item in counts:
        if not item.pixels:
            yield f"class {item.name} occurs in no mask", ""
        elif item.share < RARE:
            pixels = f"{item.pixels} {'pixels' if item.pixels > 1 else 'pixel'}, {item.images} of the masks"
            yield f"class {item.name} covers {item.share:.3%} of the pixels", pixels


def propose_classes(sets: Sequence[ScannedSet], num_workers: int) -> Proposal | None:
    """Classes from the values of all masks, or from their colours if some are RGB.

    Returns:
        None if the masks have more values than there may be classes, as soft masks and photos do.
    """
    paths = [(at, path) for at, part in enumerate(sets) for path in sorted(part.masks)]

    def count(place: tuple[int, str]) -> tuple[Counter[Any], Counter[Any]]:
        try:
            stored = read_stored(read_file(place[1]))
        except DataError:
            return Counter(), Counter()
        values = count_values(stored, by_colour=False)
        colours = count_values(stored, by_colour=True) if len(values) <= MAX_CLASSES + 1 else values
        return values, colours

    counted = map_files(count, paths, num_workers)
    if any(len(values) > MAX_CLASSES + 1 for values, _ in counted):
        return None
    by_colour = any(isinstance(value, tuple) for values, _ in counted for value in values)
    per_mask = [colours if by_colour else values for values, colours in counted]
    found = sorted(set().union(*per_mask))
    ignored = [255] if len(found) > 2 and found == [*range(len(found) - 1), 255] else []
    listed = [value for value in found if value not in ignored]
    if len(listed) > MAX_CLASSES:
        return None
    names = {value: f"class_{at if by_colour else value}" for at, value in enumerate(listed)}
    classes = {name: list(value) if by_colour else value for value, name in names.items()}
    flag = " --ignore-value -1" if 255 in listed or (255, 255, 255) in listed else ""
    leaves_out = " 255 is left out: pixels of this value are ignored." if ignored else ""
    remedy = (
        "Save it as classes.json, give the classes their names, and use `fastseg train --classes classes.json"
        f"{flag}`.{leaves_out}"
    )
    counts = []
    for part in range(len(sets)):
        of_part = [counts for (at, _), counts in zip(paths, per_mask, strict=True) if at == part]
        counts.append(_table(names, of_part))
    return Proposal(classes, counts, remedy)


def _table(names: Mapping[Any, str], per_mask: Sequence[Mapping[Any, int]]) -> list[ClassCount]:
    pixels = {key: sum(counts.get(key, 0) for counts in per_mask) for key in names}
    total = max(sum(pixels.values()), 1)
    images = {key: sum(counts.get(key, 0) > 0 for counts in per_mask) for key in names}
    return [ClassCount(name, pixels[key], pixels[key] / total, images[key]) for key, name in names.items()]
