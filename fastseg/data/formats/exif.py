"""The EXIF orientation of photos."""

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

__all__ = ["exif_orientation", "exif_segment", "orient"]


def exif_segment(data: bytes) -> bytes | None:
    """The EXIF segment of a JPEG, empty without one; None if the chain of segments before its pixels is broken."""
    at = 2
    while data.startswith(b"\xff", at) and not data.startswith((b"\xff\xda", b"\xff\xff"), at):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data.startswith(b"Exif\0\0", at + 4):
            return data[at + 4 : end]
        at = end
    return b"" if data.startswith(b"\xff\xda", at) else None


def exif_orientation(source: Image.Image | bytes) -> int:
    """The orientation of an image or of an EXIF segment, 1..8; 1 if it has none that can be read."""
    try:
        if isinstance(source, bytes):
            exif = Image.Exif()
            exif.load(source)
        else:
            exif = source.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1  # an unreadable EXIF block
    return orientation if orientation in range(1, 9) else 1


def orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels (H, W, ...) as they are displayed. Source: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
