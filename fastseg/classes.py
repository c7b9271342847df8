"""Classes of a mask: their names, the values or colours that stand for them in mask files, their colours in pictures.

["background", "car", "road"]                           the value of a pixel is the class's number
[{"name": "sky", "colour": [128, 128, 128]}, ...]       RGB masks
[{"name": "road", "value": 7}, ...]                     other values
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["IGNORED", "SegClass", "default_colours"]

IGNORED = 255  # in decoded masks: the pixel counts in no loss and no score

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


def default_colours(count: int) -> Sequence[Colour]:
    """Colours that are easy to tell apart: Pascal VOC's colour map, whose first colour is black.

    Source: the VOC2012 development kit, VOClabelcolormap.m.
    """
    return [tuple(_voc_channel(index, channel) for channel in range(3)) for index in range(count)]  # type: ignore[misc]


def _voc_channel(index: int, channel: int) -> int:
    """Three bits of the index per level, one for each channel, from the highest bit of the colour on."""
    return sum(((index >> (3 * level + channel)) & 1) << (7 - level) for level in range(3))
