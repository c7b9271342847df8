"""Reads the bytes of 8-bit grey and of palette PNGs, which most masks of classes are.

Our own function inflates them, and another undoes the row filters and unpacks the bits. Files that are unusual or
damaged are left to Pillow.

Source: PNG specification, third edition (W3C 2025), chapters 5, 7 and 9.
"""

import struct
import zlib

import numpy as np

from fastseg.data.gif import MAX_PIXELS, Bytes, compiled
from fastseg.data.labels.inflate import inflate

__all__ = ["PNG_MAGIC", "read_png"]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3  # colour types
UNUSUAL = (b"eXIf", b"acTL", b"fcTL")  # chunks of orientation and of animations


@compiled
def _restore_rows(filtered: Bytes, bits: int, out: Bytes) -> bool:
    """Undo the filter of each row, and unpack its pixels; returns whether every filter is known.

    Args:
        filtered: (H, 1 + bytes per row) uint8: the filter, then the row. All filters work on whole bytes.
        bits: per pixel, 1, 2, 4 or 8.
        out: (H, W) uint8, written.
    """
    width, size = out.shape[1], filtered.shape[1]
    row, above = np.zeros((size + 7) // 8 * 8, np.uint8), np.zeros((size + 7) // 8 * 8, np.uint8)
    pairs = np.empty(size, np.uint16)  # of pixels of 4 bits
    pixels = pairs.view(np.uint8)
    for y in range(out.shape[0]):
        row, above = above, row
        kind = filtered[y, 0]
        for x in range(1, size):
            row[x] = filtered[y, x]
        if kind == 1:
            value = np.uint8(0)
            for x in range(1, size):
                value += row[x]
                row[x] = value
        elif kind == 2:
            for x in range(1, size):
                row[x] += above[x]
        elif kind == 3:
            for x in range(1, size):
                row[x] += np.uint8((np.int64(row[x - 1]) + np.int64(above[x])) >> 1)
        elif kind == 4:
            by_8, above_by_8 = row.view(np.uint64), above.view(np.uint64)
            a = c = np.int64(0)
            x = 1
            while x < size:
                same = np.uint64(a) * np.uint64(0x0101010101010101)
                if x % 8 == 0 and a == c and by_8[x // 8] == 0 and above_by_8[x // 8] == same:
                    by_8[x // 8] = same  # eight bytes that equal their neighbours, as most of a mask do
                    x += 8
                    continue
                b = np.int64(above[x])
                from_a, from_b, from_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
                nearest = a if from_a <= from_b and from_a <= from_c else b if from_b <= from_c else c
                a, c = (np.int64(row[x]) + nearest) & 255, b
                row[x] = a
                x += 1
        elif kind != 0:
            return False
        if bits == 8:
            for x in range(width):
                out[y, x] = row[x + 1]
        elif bits == 4:
            for x in range(size - 1):
                pairs[x] = np.uint16(row[x + 1]) >> np.uint16(4) | (np.uint16(row[x + 1]) & np.uint16(15)) << np.uint16(
                    8
                )
            for x in range(width):
                out[y, x] = pixels[x]
        else:
            for x in range(width):
                shift = 8 - bits - x * bits % 8
                out[y, x] = (row[x * bits // 8 + 1] >> shift) & ((1 << bits) - 1)
    return True


def read_png(data: bytes) -> tuple[Bytes, Bytes | None] | None:
    """The stored bytes of a PNG, grey values or palette indices, (H, W) uint8, and its palette.

    Returns:
        The bytes and the palette, (N, 3) uint8, None of a grey PNG. None instead of both if Pillow should read the
        file: it is damaged, interlaced, turned, animated, 16-bit, grey of fewer than 8 bits, or has colours.
    """
    if not data.startswith(PNG_MAGIC) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, bits, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    known = (kind == GREY and bits == 8) or (kind == PALETTE and bits in (1, 2, 4, 8))
    if not known or interlaced or not 0 < width * height <= MAX_PIXELS:
        return None
    palette, parts, at = None, [], 33
    while (name := data[at + 4 : at + 8]) != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if name in UNUSUAL or end + 4 > len(data):
            return None
        if name == b"IDAT":
            parts.append(data[at + 8 : end])
            if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                return None
        elif name == b"PLTE" and kind == PALETTE:
            palette = np.frombuffer(data[at + 8 : end - (end - at - 8) % 3], np.uint8).reshape(-1, 3)
        at = end + 4
    if (kind == PALETTE) != (palette is not None):
        return None
    row_bytes = 1 + (width * bits + 7) // 8
    filtered = inflate(parts[0] if len(parts) == 1 else b"".join(parts), height * row_bytes)
    if filtered is None:
        return None
    out = np.empty((height, width), np.uint8)
    return (out, palette) if _restore_rows(filtered.reshape(height, row_bytes), bits, out) else None
