"""Writes masks of classes."""

from collections.abc import Sequence
from io import BytesIO

from numpy.typing import NDArray
from PIL import Image

from fastseg.classes import IGNORED, Colour, SegClass

__all__ = ["classes_json", "encode_labels"]

IGNORED_COLOUR = (224, 224, 192)  # of the borders in Pascal VOC


def encode_labels(mask: NDArray, colours: Sequence[Colour]) -> bytes:
    """Encode an (H, W) uint8 mask of class indices as a palette PNG; `IGNORED` gets a colour if it occurs."""
    picture, buffer = Image.frombytes("P", mask.shape[::-1], mask.tobytes()), BytesIO()
    palette = list(colours)
    if (mask == IGNORED).any():
        palette += [(0, 0, 0)] * (IGNORED - len(palette)) + [IGNORED_COLOUR]
    picture.putpalette([channel for colour in palette for channel in colour])
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def classes_json(classes: Sequence[SegClass]) -> str:
    """The content of a classes.json, one class per line."""
    return "[\n" + ",\n".join(f"  {item.model_dump_json()}" for item in classes) + "\n]\n"
