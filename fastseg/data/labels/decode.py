"""One file's bytes to the class of each cell. We decode GIFs and plain PNGs ourselves, Pillow the others."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.classes import IGNORED
from fastseg.data.decode import GIF_MAGIC, Size, open_image, pillow_errors
from fastseg.data.formats.exif import exif_orientation, orient
from fastseg.data.gif import Bytes
from fastseg.data.labels.encoding import UNLISTED, ClassEncoding, unlisted_error
from fastseg.data.labels.gif import read_gif
from fastseg.data.labels.png import read_png
from fastseg.data.labels.vote import count_bytes, index_colours, vote
from fastseg.errors import DataError

__all__ = ["Stored", "count_classes", "count_values", "decode_classes", "decode_full_classes", "read_stored"]


class Stored(NamedTuple):
    """The pixels of a mask as its file stores them."""

    pixels: NDArray[Any]  # (H, W) uint8, or wider integers of 16-bit files, or (H, W, 3) uint8 RGB
    palette: Bytes | None  # (N, 3) uint8, if the pixels are indices of it


def read_stored(data: bytes) -> Stored:
    """Decode a GIF, PNG or BMP as it is stored; a palette's indices stay.

    Bits are 0 and 1. Greys of 2 and 4 bits are scaled to 0..255. Transparency is ignored.

    Raises:
        DataError: the file is no image, or is damaged or truncated.
    """
    if data.startswith(GIF_MAGIC):
        return Stored(*read_gif(data))
    if plain := read_png(data):
        return Stored(*plain)
    with pillow_errors():
        image = open_image(data)
        image.load()
        palette = None
        if image.mode in ("P", "PA"):
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            pixels = np.asarray(image)
            pixels = pixels if pixels.ndim == 2 else pixels[..., 0]
        elif image.mode in ("1", "L") or image.mode.startswith("I"):
            pixels = np.asarray(image)
        elif image.mode in ("LA", "La"):
            pixels = np.asarray(image.getchannel("L"))
        else:
            image.info.pop("transparency", None)
            pixels = np.asarray(image.convert("RGB"))
        pixels = pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels
        return Stored(np.ascontiguousarray(orient(pixels, exif_orientation(image))), palette)


def decode_classes(data: bytes, out: NDArray[np.uint8], mask_resize: str, encoding: ClassEncoding) -> Size:
    """Decode a mask of classes onto the grid.

    Args:
        data: a GIF, PNG or BMP file. Its grey value or palette index is the class's value; or its colour, as RGB or by
            its palette, is the class's colour.
        out: (H, W) uint8, written: the index of the class that covers most of each cell ("area"; of equal areas the
            lowest), or that under its centre ("nearest"); `IGNORED` where that is the ignored value.
        mask_resize: "area" or "nearest".
        encoding: the classes.

    Returns:
        The mask's own size, (height, width).

    Raises:
        DataError: the file is no image, is damaged or truncated, or has a value or colour of no class; names them and
            counts their pixels.
    """
    stored = read_stored(data)
    indices, table = _index(stored, encoding)
    if not vote(indices, table, len(encoding.classes), out, mask_resize):
        raise unlisted_error(encoding, count_values(stored, encoding.by_colour))
    return indices.shape[0], indices.shape[1]


def decode_full_classes(data: bytes, encoding: ClassEncoding) -> NDArray[np.uint8]:
    """The class indices of a mask at its own size, (H, W) uint8. Files and errors as for `decode_classes`."""
    stored = read_stored(data)
    indices, table = _index(stored, encoding)
    full: NDArray[np.uint8] = table[indices]
    if (full == UNLISTED).any():
        raise unlisted_error(encoding, count_values(stored, encoding.by_colour))
    return full


def count_classes(data: bytes, encoding: ClassEncoding) -> tuple[Size, NDArray[np.int64], int]:
    """A mask's size, its pixels of each class, and its ignored pixels. Files and errors as for `decode_classes`."""
    stored = read_stored(data)
    indices, table = _index(stored, encoding)
    counts = np.zeros(256, np.int64)
    np.add.at(counts, table, count_bytes(indices))
    if counts[UNLISTED]:
        raise unlisted_error(encoding, count_values(stored, encoding.by_colour))
    return (indices.shape[0], indices.shape[1]), counts[: len(encoding.classes)], int(counts[IGNORED])


def count_values(stored: Stored, by_colour: bool) -> Counter[Any]:
    """Pixels by value, or by colour as (red, green, blue)."""
    pixels, palette = stored
    if pixels.ndim == 3:
        codes = (pixels.astype(np.int32) << (16, 8, 0)).sum(2)
        found = {(code >> 16, code >> 8 & 255, code & 255): count for code, count in _unique(codes)}
        if not by_colour and all(red == green == blue for red, green, blue in found):
            return Counter({red: count for (red, _, _), count in found.items()})
        return Counter(found)
    if not by_colour:
        return Counter(dict(_unique(pixels)))
    counts: Counter[Any] = Counter()
    for value, count in _unique(pixels):
        colour = (value, value, value) if palette is None else _colour_of(palette, value)
        counts[colour] += count
    return counts


def _unique(values: NDArray[Any]) -> list[tuple[int, int]]:
    if values.dtype == np.uint8:
        counts = count_bytes(values)
        return [(int(value), int(counts[value])) for value in np.flatnonzero(counts)]
    found, counts = np.unique(values, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def _colour_of(palette: Bytes, index: int) -> tuple[int, ...]:
    return tuple(palette[index].tolist()) if index < len(palette) else (0, 0, 0)


def _index(stored: Stored, encoding: ClassEncoding) -> tuple[Bytes, Bytes]:
    """Bytes of a mask, (H, W) uint8, and the class index of each byte, (256,) uint8."""
    pixels, palette = stored
    if pixels.ndim == 3 and encoding.by_colour:
        return index_colours(pixels, *encoding.codes), np.arange(256).astype(np.uint8)
    if pixels.ndim == 3:
        grey = np.ascontiguousarray(pixels[..., 0])
        if (pixels != grey[..., None]).any():
            colour = tuple(pixels[(pixels != grey[..., None]).any(2)][0].tolist())
            raise DataError(
                f"has RGB colours, such as {colour}, but the classes have values. Give classes their colours instead",
                "values",
            )
        return grey, encoding.table(None)
    if pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 255:
            raise unlisted_error(encoding, count_values(stored, encoding.by_colour))
        pixels = pixels.astype(np.uint8)
    return pixels, encoding.table(palette)
