"""Decodes GIF masks at the speed of memcpy, because masks are GIFs and no image library decodes them fast.

A Carvana mask is about 4,000 LZW codes for 2.46 million pixels. The string of every code already stands in the output:
it is the string of the code before, plus the pixel that follows it. So the table holds (start, length) per code, and
decoding a code is one copy from an earlier position of the output.

The compiled functions release the GIL, raise nothing and return a status. A compiled function must not call one of
another file: numba's cache does not notice when that one changes.

Source: GIF89a specification, CompuServe 1990. Where it leaves a choice (a frame smaller than the canvas, stray bytes
between blocks), the pixels are Pillow's.
"""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray
from PIL import Image

from fastseg.errors import DataError
from fastseg.runtime.kernels import njit

__all__ = ["Bytes", "compiled", "decode_frame", "decode_gif_mask", "encode_gif", "parse_header"]

OK, TRUNCATED, DAMAGED, NO_IMAGE, TOO_LARGE, TOO_MANY_VALUES = range(6)
STATUS_MESSAGES = {
    TRUNCATED: "is a truncated GIF: it ends after {detail} pixels",
    DAMAGED: "is a damaged GIF: it has an impossible size or LZW code",
    NO_IMAGE: "is a GIF without an image",
    TOO_LARGE: "is a GIF of more than the 2**28 pixels that are decoded",
}

MAX_PIXELS = 2**28  # of what is decoded: a forged header must not exhaust memory
MAX_PIXELS_PER_BYTE = 2731  # a code of b <= 12 bits gives less than 2**b pixels, so a byte less than 8 / 12 * 4096
TABLE_SIZE = 4096

compiled = njit(nogil=True, cache=True, error_model="numpy")
Bytes = NDArray[np.uint8]


class _Header(NamedTuple):
    """The part of the file before the pixels of the first frame."""

    status: int
    width: int  # of the canvas, enlarged to hold the frame
    height: int
    left: int  # of the frame on the canvas
    top: int
    frame_width: int
    frame_height: int
    interlaced: int
    fill: int  # index of the canvas around the frame: the transparent index if there is one, else 0
    palette_start: int  # offset in the file
    palette_size: int  # in colours; 0 if there is no palette: index i is then the grey (i, i, i)
    code_size: int  # LZW minimum code size in bits
    lzw_start: int  # offset in the file of the first sub-block of pixels


@compiled
def _refuse(status: int) -> _Header:
    return _Header(status, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@register_jitable
def _item(values: NDArray[Any], position: int) -> Any:
    return np.int64(values[position])  # signed: numba makes int64 and uint64 together a float64


@register_jitable
def _uint16(data: Bytes, position: int) -> Any:
    return _item(data, position) | _item(data, position + 1) << 8


@compiled
def parse_header(data: Bytes) -> _Header:
    """Reads the uint8 (N,) file, which begins as a GIF, up to the pixels of its first frame.

    With status OK the frame lies within the canvas, the canvas has 1 to MAX_PIXELS pixels, the palette lies within the
    file and code_size is 1 to 8.
    """
    end = data.size
    if end < 13:
        return _refuse(TRUNCATED)
    width, height, flags = _uint16(data, 6), _uint16(data, 8), _item(data, 10)
    position, palette_start, palette_size, fill = 13, 0, 0, 0
    if flags & 128:
        palette_start, palette_size = position, 2 << (flags & 7)
        position += 3 * palette_size
    while True:
        if position >= end:
            return _refuse(TRUNCATED)
        kind = data[position]
        position += 1
        if kind == 44:  # ",": an image
            break
        if kind == 59:  # ";": the end
            return _refuse(NO_IMAGE)
        if kind == 33:  # "!": an extension; 249, graphic control, names the transparent index
            if position + 5 < end and data[position] == 249 and data[position + 1] >= 4 and data[position + 2] & 1:
                fill = _item(data, position + 5)
            position += 1
            while position < end and data[position] != 0:
                position += 1 + _item(data, position)
            position += 1
    if position + 9 >= end:
        return _refuse(TRUNCATED)
    left, top = _uint16(data, position), _uint16(data, position + 2)
    frame_width, frame_height = _uint16(data, position + 4), _uint16(data, position + 6)
    flags = _item(data, position + 8)
    position += 9
    if flags & 128:  # the frame has a palette of its own
        palette_start, palette_size = position, 2 << (flags & 7)
        position += 3 * palette_size
    if position >= end:
        return _refuse(TRUNCATED)
    code_size, position = _item(data, position), position + 1
    if frame_width == 0 or frame_height == 0 or code_size < 1 or code_size > 8:
        return _refuse(DAMAGED)
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    if width * height > MAX_PIXELS:
        return _refuse(TOO_LARGE)
    if frame_width * frame_height > MAX_PIXELS_PER_BYTE * (end - position):
        return _refuse(TRUNCATED)
    return _Header(
        OK, width, height, left, top, frame_width, frame_height, (flags >> 6) & 1, fill,
        palette_start, palette_size, code_size, position,
    )  # fmt: skip


@intrinsic
def _memcpy(typingctx: Any, target: Any, target_start: Any, source: Any, source_start: Any, count: Any) -> Any:
    """memcpy between uint8 arrays, or within one if the ranges do not overlap. Checks no bounds: call `_copy`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, start, out_of, source_start, count = args
        into = context.make_array(signature.args[0])(context, builder, into).data
        out_of = context.make_array(signature.args[2])(context, builder, out_of).data
        into, out_of = builder.gep(into, [start]), builder.gep(out_of, [source_start])
        cgutils.raw_memcpy(builder, into, out_of, count, itemsize=1)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), codegen


@compiled
def _copy(target: Bytes, target_start: int, source: Bytes, source_start: int, count: int) -> bool:
    """Copies if both ranges lie within their arrays; returns whether. (A loop decodes masks 1.5 times as slowly.)"""
    if count < 0 or target_start < 0 or source_start < 0:
        return False
    if target_start + count > target.size or source_start + count > source.size:
        return False
    _memcpy(target, target_start, source, source_start, count)  # type: ignore[call-arg]  # numba gives typingctx
    return True


@compiled
def _decode_lzw(data: Bytes, header: _Header, roots: Bytes, pixels: Bytes, used: Bytes) -> tuple[int, int]:
    """Fills `pixels`, in the order of the file, with roots[index] for each index.

    Sets used[index] to 1 for each index that occurs. This costs nothing: an index first occurs as a code of its own.
    Returns the status and the number of pixels decoded.
    """
    position, end, num_pixels = header.lzw_start, data.size, pixels.size
    code_size, clear = header.code_size, 1 << header.code_size
    starts, lengths = np.empty(TABLE_SIZE, np.int32), np.empty(TABLE_SIZE, np.int32)
    width, next_code = code_size + 1, clear + 2
    bits = num_bits = block = 0
    written = last_start = last_length = 0  # last: the string of the code before
    while written < num_pixels:
        while num_bits < width:
            if block == 0:
                if position >= end:
                    return TRUNCATED, written
                block = _item(data, position)
                position += 1
                if block == 0 or block > end - position:  # like Pillow, use no part of a truncated block
                    return TRUNCATED, written
            bits |= _item(data, position) << num_bits
            num_bits += 8
            position += 1
            block -= 1
        code = bits & ((1 << width) - 1)
        bits >>= width
        num_bits -= width
        if code == clear:
            width, next_code, last_length = code_size + 1, clear + 2, 0
            continue
        if code == clear + 1:  # end of information
            return TRUNCATED, written
        # The new entry is the last string and the pixel after it, the first of this code's string; so this code may
        # already be the new entry. A full table stays as it is until a clear code.
        if last_length > 0 and next_code < TABLE_SIZE:
            starts[next_code], lengths[next_code] = last_start, last_length + 1
            # With a code size of 1 the first entry is 4, beyond 2 bits: as in Pillow, the codes then never grow.
            if next_code == (1 << width) - 1 and width < 12:
                width += 1
            next_code += 1
        length = 1
        if code < clear:
            pixels[written] = roots[code]
            used[code] = 1
        else:
            if code >= next_code:
                return DAMAGED, written
            start, length = _item(starts, code), min(_item(lengths, code), num_pixels - written)
            # All but its last pixel are before `written`; the last may be the first that is copied here.
            if start + length > written + 1 or not _copy(pixels, written, pixels, start, length - 1):
                return DAMAGED, written
            pixels[written + length - 1] = pixels[start + length - 1]
        last_start, last_length = written, length
        written += length
    return OK, written


@compiled
def decode_frame(data: Bytes, header: _Header, roots: Bytes, used: Bytes) -> tuple[int, int, Bytes]:
    """Decodes the first frame onto a canvas (height, width) of roots[index]; otherwise as `_decode_lzw`."""
    width, height = header.frame_width, header.frame_height
    is_whole = width == header.width and height == header.height
    is_placed = header.interlaced or not is_whole
    # One buffer for both: malloc returns the memory of two to the system, and mapping those pages again takes longer
    # than all the decoding.
    buffer = np.empty(width * height + is_placed * header.width * header.height, np.uint8)
    frame, canvas = buffer[: width * height], buffer[width * height :]
    status, written = _decode_lzw(data, header, roots, frame, used)
    if status != OK or not is_placed:
        return status, written, frame.reshape(height, width)
    if not is_whole:
        canvas[:] = roots[header.fill]
        used[header.fill] = 1
    firsts, steps = (0, 4, 2, 1), (8, 8, 4, 2)  # rows of the four passes of an interlaced frame
    source = 0
    for turn in range(4 if header.interlaced else 1):
        first, step = (firsts[turn], steps[turn]) if header.interlaced else (0, 1)
        for row in range(first, height, step):
            _copy(canvas, (header.top + row) * header.width + header.left, frame, source, width)
            source += width
    return OK, written, canvas.reshape(header.height, header.width)


@compiled
def _binary_table(data: Bytes, header: _Header, used: Bytes, table: Bytes) -> int:
    """Sets table[index] to 1 where a used index is foreground, else 0; returns the number of distinct lumas in use."""
    lumas = np.full(256, -1, np.int64)  # Rec. 601 in 1 / 65536, not rounded: (0, 0, 1) is brighter than black
    num_lumas = 0
    for index in range(256):
        if used[index]:
            luma = index if header.palette_size == 0 else 0  # an index beyond the palette is black, as in Pillow
            if index < header.palette_size:
                at = header.palette_start + 3 * index
                luma = 19595 * _item(data, at) + 38470 * _item(data, at + 1) + 7471 * _item(data, at + 2)
            num_lumas += not (lumas == luma).any()
            lumas[index] = luma
    highest = lumas.max()
    table[:] = (lumas == highest) & (highest > 0)
    return num_lumas


@compiled
def _decode_mask(data: Bytes) -> tuple[int, int, Bytes]:
    """Status, detail for its message, and the mask of `decode_gif_mask`, which is valid only with status OK."""
    header = parse_header(data)
    if header.status != OK:
        return header.status, 0, np.empty((0, 0), np.uint8)
    indices, used, table = np.arange(256).astype(np.uint8), np.zeros(256, np.uint8), np.empty(256, np.uint8)
    status, detail, mask = decode_frame(data, header, indices, used)
    if status != OK:
        return status, detail, mask
    num_lumas = _binary_table(data, header, used, table)
    if num_lumas > 2:
        return TOO_MANY_VALUES, num_lumas, mask
    if (used & (table != indices)).any():  # decoding again with other roots is faster than a lookup per pixel
        return decode_frame(data, header, table, used)
    return OK, 0, mask


def decode_gif_mask(data: bytes) -> Bytes:
    """Decodes the first frame of a GIF (87a or 89a, interlaced or not) as a mask.

    Args:
        data: the file. Any palette of two colours does; indices beyond the palette are black.

    Returns:
        uint8 (H, W): 1 for the pixels of the brighter colour (Rec. 601 luma), 0 for the others. A frame of one luma is
        foreground unless it is black.

    Raises:
        DataError: the file is damaged or truncated, or has more than two lumas.
    """
    if not data.startswith((b"GIF87a", b"GIF89a")):
        raise DataError(f"is no GIF (it begins with {data[:6]!r}, not with GIF87a or GIF89a)")
    # Writable, because numba would compile everything again for a read-only array.
    status, detail, mask = _decode_mask(np.asarray(bytearray(data)))
    if status == TOO_MANY_VALUES:
        raise DataError(f"must have two values, background and foreground; found {detail}", "values")
    if status != OK:
        raise DataError(STATUS_MESSAGES[status].format(detail=detail))
    return mask


def encode_gif(mask: NDArray[Any]) -> bytes:
    """A mask (H, W), bool or uint8 of 0 and 1, as a GIF like Carvana's, by Pillow: GIF89a, one frame, black and white.

    Raises:
        DataError: a side is above 65535 pixels, the limit of the format.
    """
    height, width = mask.shape
    if max(height, width) > 0xFFFF:
        raise DataError(f"has {width}x{height} pixels, and a GIF has at most 65535 per side. Use PNG masks")
    picture, buffer = Image.fromarray(mask.view(np.uint8)), BytesIO()
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(buffer, "GIF", interlace=0, optimize=False)  # optimize would renumber a mask of one colour
    data = buffer.getvalue()
    # Pillow writes GIF87a and pads the palette to four colours. The blocks that follow are the same in GIF89a.
    flags, pixels = data[10], data[13 + 3 * 2 ** ((data[10] & 7) + 1) :]
    return b"GIF89a" + data[6:10] + bytes([flags & 0xF8]) + data[11:13] + bytes(3) + b"\xff" * 3 + pixels
