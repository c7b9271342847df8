"""How mask files encode the classes: the class index of each value or colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.classes import IGNORED, SegClass
from fastseg.data.gif import Bytes
from fastseg.errors import DataError

__all__ = ["UNLISTED", "ClassEncoding", "class_encoding", "unlisted_error"]

UNLISTED = 254  # in tables: the value or colour is no class
MAX_NAMED = 5  # unlisted values in a message

Value = int | tuple[int, int, int]


@dataclass(frozen=True)
class ClassEncoding:
    """Classes and the value of ignored pixels, as tables for decoding. In RGB masks `ignore_value` is a grey."""

    classes: tuple[SegClass, ...]
    ignore_value: int

    @cached_property
    def indices(self) -> dict[Value, int]:
        """The class index, or `IGNORED`, of each value or, for RGB masks, of each colour."""
        found: dict[Value, int] = {}
        for index, item in enumerate(self.classes):
            found[item.colour if item.value is None else item.value] = index
        if self.ignore_value >= 0:
            found[(self.ignore_value,) * 3 if self.by_colour else self.ignore_value] = IGNORED
        return found

    @property
    def by_colour(self) -> bool:
        """Whether colours stand for the classes, not values."""
        return self.classes[0].value is None

    @cached_property
    def codes(self) -> tuple[NDArray[np.int32], Bytes]:
        """Colours as 65536 * red + 256 * green + blue, ascending, and the index of each."""
        coded = ((np.dot((65536, 256, 1), key), at) for key, at in self.indices.items() if isinstance(key, tuple))
        pairs = sorted((int(code), at) for code, at in coded)
        return np.array([code for code, _ in pairs], np.int32), np.array([at for _, at in pairs], np.uint8)

    @cached_property
    def greys(self) -> Bytes:
        """The class index of each grey value or, if classes have values, of each stored byte; see `table`."""
        keys: list[Value] = [(grey,) * 3 for grey in range(256)] if self.by_colour else list(range(256))
        return np.array([self.indices.get(key, UNLISTED) for key in keys], np.uint8)

    def table(self, palette: Bytes | None) -> Bytes:
        """The class index of each stored byte, (256,) uint8: `IGNORED`, or `UNLISTED` for bytes that are no class.

        Args:
            palette: (N, 3) uint8, the colours of the bytes; None if they are greys.
        """
        if palette is None or not self.by_colour:
            return self.greys
        found = [self.indices.get(tuple(colour), UNLISTED) for colour in palette.tolist()]
        return np.array(found + [UNLISTED] * (256 - len(found)), np.uint8)

    @property
    def key(self) -> list[Any]:
        """What decides the decoded masks: the values or colours in order, and the ignored value. Names do not."""
        return [list(self.indices.items()), self.ignore_value]


def class_encoding(classes: Sequence[SegClass], ignore_value: int) -> ClassEncoding | None:
    """The encoding of some classes; None if there are none."""
    return ClassEncoding(tuple(classes), ignore_value) if classes else None


def unlisted_error(encoding: ClassEncoding, counts: Mapping[Any, int]) -> DataError:
    """The error of a mask that has values or colours that are no class.

    Args:
        counts: pixels by value or colour, all of the mask.
    """
    unlisted = [(value, count) for value, count in counts.items() if value not in encoding.indices]
    what = ("colour" if encoding.by_colour else "value") + ("s" if len(unlisted) > 1 else "")
    most = sorted(unlisted, key=lambda item: -item[1])[:MAX_NAMED]
    named = ", ".join(f"{value} ({count} {'pixels' if count > 1 else 'pixel'})" for value, count in most)
    more = f" and {len(unlisted) - MAX_NAMED} more" if len(unlisted) > MAX_NAMED else ""
    remedy = "List every value in classes, or name the one to ignore in ignore_value"
    return DataError(f"has {what} {named}{more} of no class. {remedy}", "values")
