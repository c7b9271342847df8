"""Masks, probabilities and overlays as the bytes of their files, and files written whole or not at all.

Pillow encodes these formats too, but a mask of 1918x1280 takes it 3 ms as PNG, and 8 ms as GIF, during which no other
thread runs; here it is 0.5 ms and 4 ms, side by side.
"""

import os
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastseg.data.gif import Bytes, compiled
from fastseg.errors import DataError

__all__ = ["DRAFT", "encode_gif", "encode_overlay", "encode_png", "write_file"]

DRAFT = ".draft"  # `.a_mask.png.draft` is what a killed run leaves of a_mask.png; the next run writes over it
LEVEL = 1  # of deflate: the higher ones take three times as long to save a fifth
TINT = np.array([255, 46, 136], np.uint8)  # the colour of predictions in overlay.png of a run
TINT_SHARE = 0.25  # of the colour within the outline
JPEG_QUALITY = 88


def write_file(path: str, data: bytes) -> None:
    """Write a file beside its name, then rename it: whoever looks finds all of it or nothing.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}{DRAFT}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
        os.replace(draft, path)
    except OSError as error:
        if os.path.isfile(draft):
            os.unlink(draft)
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); what was written before is intact. "
            "Make room for it and run again with --resume."
        ) from None


def encode_png(pixels: NDArray[np.bool_] | Bytes) -> bytes:
    """A PNG of (H, W): bool as one bit a pixel, black and white, uint8 as grey. Source: W3C PNG specification, 2003."""
    height, width = pixels.shape
    is_mask = pixels.dtype == np.bool_
    values = np.packbits(pixels, axis=1) if is_mask else pixels
    rows = np.zeros((height, values.shape[1] + 1), np.uint8)  # a row's first byte names its filter; 0 is none
    rows[:, 1:] = values
    if not is_mask:  # grey is smooth: filter 2 is the difference from the row above
        rows[1:, 0] = 2
        rows[1:, 1:] -= values[:-1]
    header = struct.pack(">IIBBBBB", width, height, 1 if is_mask else 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), LEVEL)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encode_gif(mask: NDArray[np.bool_]) -> bytes:
    """A GIF of (H, W) as Carvana's masks: GIF89a, one frame, not interlaced, black and white.

    Raises:
        DataError: a side is above 65535 pixels, which a GIF cannot say.
    """
    height, width = mask.shape
    if max(height, width) > 0xFFFF:
        raise DataError(f"has {width}x{height} pixels, and a GIF has at most 65535 a side. Use PNG masks")
    # A code stands for at least one pixel and has at most 12 bits; a clear code comes after thousands of others.
    codes = np.empty(2 * mask.size + 64, np.uint8)
    codes = codes[: _lzw_codes(mask.reshape(-1).view(np.uint8), codes)]
    blocks = bytearray()
    for start in range(0, codes.size, 255):
        block = codes[start : start + 255]
        blocks += bytes([block.size]) + block.tobytes()
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0)  # 0x80: with a palette of two colours
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0)
    return b"GIF89a" + screen + bytes(3) + b"\xff" * 3 + frame + b"\x02" + bytes(blocks) + b"\0;"


@compiled
def _lzw_codes(pixels: Any, out: Any) -> int:
    """GIF's LZW codes of pixels 0 and 1, packed from the lowest bit on; returns how many bytes of `out` they take.

    Source: GIF89a specification, CompuServe 1990, appendix F; the code size is 2, the least that it allows.
    """
    clear, end = 4, 5
    longer = np.zeros(2 * 4096, np.uint32)  # by 2 * code + pixel, the code of that string; 0: there is none yet
    bits, num_bits, size = np.uint64(clear), 3, 0
    width, next_code = 3, end + 1
    code = np.uint32(pixels[0])
    at = np.uint32(0)
    for i in range(1, pixels.size + 1):
        if i < pixels.size:
            at = np.uint32(2) * code + np.uint32(pixels[i])
            if longer[at]:
                code = longer[at]
                continue
        bits |= np.uint64(code) << np.uint64(num_bits)
        num_bits += width
        if next_code < 4096:
            if i < pixels.size:
                longer[at] = next_code
            if next_code == 1 << width:
                width += 1
            next_code += 1
        else:
            bits |= np.uint64(clear) << np.uint64(num_bits)
            num_bits += width
            longer[:] = 0
            width, next_code = 3, end + 1
        while num_bits >= 8:
            out[size] = bits & np.uint64(255)
            bits >>= np.uint64(8)
            num_bits -= 8
            size += 1
        code = at & np.uint32(1)
    bits |= np.uint64(end) << np.uint64(num_bits)
    num_bits += width
    while num_bits > 0:
        out[size] = bits & np.uint64(255)
        bits >>= np.uint64(8)
        num_bits -= 8
        size += 1
    return size


def encode_overlay(photo: Bytes, coverage: Bytes) -> bytes:
    """A JPEG of a photo on which the mask is tinted and outlined, two pixels wide.

    Args:
        photo: (H, W, 3), written over.
        coverage: (H, W), how much of each pixel the mask covers, 0..255.
    """
    inside = coverage >= 128
    around = np.pad(inside, 1, mode="edge")
    neighbours = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    outline = np.logical_or.reduce(neighbours) & ~np.logical_and.reduce(neighbours)
    tinted = photo[inside].astype(np.uint16)
    photo[inside] = (tinted + TINT_SHARE * (TINT - tinted.astype(np.float32))).astype(np.uint8)
    photo[outline] = TINT
    return bytes(simplejpeg.encode_jpeg(photo, quality=JPEG_QUALITY, colorsubsampling="420"))
