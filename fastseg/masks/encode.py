"""Masks, probabilities and overlays as the bytes of their files.

Pillow encodes PNG too, but takes 3 ms for a mask of 1918x1280 and holds the GIL; this takes 0.5 ms without the GIL.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastseg.classes import SegClass
from fastseg.data.gif import Bytes
from fastseg.plots import tint_classes

__all__ = ["encode_class_overlay", "encode_overlay", "encode_png"]

LEVEL = 1  # of deflate; higher ones take three times as long to save a fifth
TINT = np.array([255, 46, 136], np.uint8)  # the colour of predictions in overlay.png of a run
TINT_SHARE = 0.25  # of the colour within the outline
JPEG_QUALITY = 88
SWATCH, TEXT = 14, 13  # pixels, of the legend


def encode_png(pixels: NDArray[np.bool_] | Bytes, palette: Bytes | None = None) -> bytes:
    """A PNG of (H, W): bool in black and white, one bit per pixel; uint8 in grey, or in the colours of a palette.

    Args:
        palette: (N, 3) uint8 RGB, more than any pixel's value.

    Source: W3C PNG specification.
    """
    height, width = pixels.shape
    is_mask = pixels.dtype == np.bool_
    values = np.packbits(pixels, axis=1) if is_mask else pixels
    rows = np.zeros((height, values.shape[1] + 1), np.uint8)  # a row begins with its filter type; 0 is none
    rows[:, 1:] = values
    if not is_mask:  # rows resemble each other: filter 2 subtracts the row above
        rows[1:, 0] = 2
        rows[1:, 1:] -= values[:-1]
    depth, colour_type = 1 if is_mask else 8, 0 if palette is None else 3
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    colours = () if palette is None else ((b"PLTE", palette.tobytes()),)
    chunks = ((b"IHDR", header), *colours, (b"IDAT", zlib.compress(rows.tobytes(), LEVEL)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encode_overlay(photo: Bytes, coverage: Bytes) -> bytes:
    """A JPEG of a photo with the mask tinted, and an outline of two pixels.

    Args:
        photo: (H, W, 3), overwritten.
        coverage: (H, W) uint8, share of each pixel that the mask covers, 0..255.
    """
    inside = coverage >= 128
    around = np.pad(inside, 1, mode="edge")
    neighbours = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    outline = np.logical_or.reduce(neighbours) & ~np.logical_and.reduce(neighbours)
    tinted = photo[inside].astype(np.uint16)
    photo[inside] = (tinted + TINT_SHARE * (TINT - tinted.astype(np.float32))).astype(np.uint8)
    photo[outline] = TINT
    return bytes(simplejpeg.encode_jpeg(photo, quality=JPEG_QUALITY, colorsubsampling="420"))


def encode_class_overlay(photo: Bytes, labels: Bytes, classes: Sequence[SegClass]) -> bytes:
    """A JPEG of a photo in the colours of its classes, above a legend of those that occur; see `tint_classes`."""
    tinted = tint_classes(photo, labels, classes)
    legend = _draw_legend([classes[number] for number in np.unique(labels)], photo.shape[1])
    picture = np.ascontiguousarray(np.concatenate([tinted, legend]))
    return bytes(simplejpeg.encode_jpeg(picture, quality=JPEG_QUALITY, colorsubsampling="420"))


def _draw_legend(classes: Sequence[SegClass], width: int) -> Bytes:
    """Colours and names in rows on white, (height, width, 3)."""
    font, gap = ImageFont.load_default(TEXT), SWATCH // 2
    places, x, y = [], gap, gap
    for item in classes:
        needed = SWATCH + 2 * gap + round(font.getlength(item.name))
        if x > gap and x + needed > width:
            x, y = gap, y + SWATCH + gap
        places.append((x, y))
        x += needed + gap
    legend = Image.new("RGB", (width, y + SWATCH + gap), "white")
    draw = ImageDraw.Draw(legend)
    for item, (x, y) in zip(classes, places, strict=True):
        draw.rectangle((x, y, x + SWATCH - 1, y + SWATCH - 1), fill=item.colour, outline="grey")
        draw.text((x + SWATCH + gap, y - 1), item.name, fill="black", font=font)
    return np.asarray(legend)
