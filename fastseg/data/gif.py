"""GIF to palette indices at the speed of memcpy, because mask files are GIFs and no image library reads them fast.

A Carvana mask is some 4,000 LZW codes for 2.46 million pixels. The string of every code already stands in the output:
it is the string of the code before it plus the pixel behind that. So the table holds (start, length) per code, and a
code is one copy from an earlier position of the output; no strings are kept and no pixel is looked at alone.

The compiled functions take no lock, raise nothing and return a status (see STATUS_MESSAGES), so that other compiled
code can call them; `decode_gif` is the one for Python. Source: GIF89a specification, CompuServe 1990. What it leaves
open (a frame smaller than the canvas, stray bytes between blocks) comes out as in Pillow.
"""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray
from PIL import Image

from fastseg.errors import DataError

__all__ = [
    "OK",
    "GifHeader",
    "as_uint8",
    "decode_binary",
    "decode_gif",
    "decode_indices",
    "encode_gif",
    "gif_error",
    "parse_gif",
]

OK, NOT_GIF, CUT_HEADER, NO_IMAGE, ZERO_SIZE, TOO_LARGE, CUT_FILE, BAD_CODE_SIZE, BAD_CODE, CUT_PIXELS = range(10)
NOT_BINARY, WRONG_BUFFER = 10, 11

STATUS_MESSAGES = {
    NOT_GIF: "not a GIF (it starts with {start}, not with GIF87a or GIF89a)",
    CUT_HEADER: "GIF ends before its first image begins; it is truncated",
    NO_IMAGE: "GIF has no image in it",
    ZERO_SIZE: "GIF has an image of {width} x {height} pixels; both must be above 0",
    TOO_LARGE: "GIF claims {width} x {height} pixels, above the limit of 2**28; it is damaged",
    CUT_FILE: "GIF claims {pixels} pixels, more than a file of {size} bytes can hold; it is truncated",
    BAD_CODE_SIZE: "GIF has an LZW code size of {code_size} bits, which must be 1 to 8; it is damaged",
    BAD_CODE: "GIF has an impossible LZW code after pixel {detail} of {pixels}; it is damaged",
    CUT_PIXELS: "GIF ends before its last pixel ({detail} of {pixels}); it is truncated",
    NOT_BINARY: "a mask must have two values; found {detail}",
    WRONG_BUFFER: "the pixel buffer must hold width * height pixels",
}

# Two guards against forged sizes. The canvas may be empty, so any limit on it is a choice: 65535 x 65535 would ask for
# 4 GiB. The frame's is a fact: a code of b <= 12 bits gives less than 2**b pixels, so a byte less than 8 / 12 * 4096.
MAX_PIXELS = 2**28
MAX_PIXELS_PER_BYTE = 2731
TABLE_SIZE = 4096

compiled = njit(nogil=True, cache=True, error_model="numpy")
Bytes = NDArray[np.uint8]


class GifHeader(NamedTuple):
    """What stands before the pixels of the first frame."""

    status: int  # OK, or why the rest is not to be used
    width: int  # of the canvas, enlarged where the frame sticks out of it
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
def _refuse(status: int, width: int, height: int, code_size: int) -> GifHeader:
    return GifHeader(status, width, height, 0, 0, width, height, 0, 0, 0, 0, code_size, 0)


@register_jitable
def _item(values: NDArray[Any], position: int) -> Any:
    return np.int64(values[position])  # signed: numba makes int64 and uint64 together a float64


@register_jitable
def _uint16(data: Bytes, position: int) -> Any:
    return _item(data, position) | _item(data, position + 1) << 8


@compiled
def parse_gif(data: Bytes) -> GifHeader:
    """Reads the uint8 (N,) file up to the pixels of its first frame and returns a GifHeader.

    With status OK the frame lies within the canvas, the canvas has 1 to MAX_PIXELS pixels, the palette lies within the
    file and code_size is 1 to 8.
    """
    end = data.size
    if end < 6 or data[0] != 71 or data[1] != 73 or data[2] != 70 or data[3] != 56 or data[5] != 97:  # GIF8?a
        return _refuse(NOT_GIF, 0, 0, 0)
    if data[4] != 55 and data[4] != 57:  # 7, 9
        return _refuse(NOT_GIF, 0, 0, 0)
    if end < 13:
        return _refuse(CUT_HEADER, 0, 0, 0)
    width, height, flags = _uint16(data, 6), _uint16(data, 8), _item(data, 10)
    position, palette_start, palette_size, fill = 13, 0, 0, 0
    if flags & 128:
        palette_start, palette_size = position, 2 << (flags & 7)
        position += 3 * palette_size
    while True:
        if position >= end:
            return _refuse(CUT_HEADER, width, height, 0)
        kind = data[position]
        position += 1
        if kind == 44:  # ",": an image
            break
        if kind == 59:  # ";": the end
            return _refuse(NO_IMAGE, width, height, 0)
        if kind == 33:  # "!": an extension; 249, graphic control, names the transparent index
            if position + 5 < end and data[position] == 249 and data[position + 1] >= 4 and data[position + 2] & 1:
                fill = _item(data, position + 5)
            position += 1
            while position < end and data[position] != 0:
                position += 1 + _item(data, position)
            position += 1
    if position + 9 >= end:
        return _refuse(CUT_HEADER, width, height, 0)
    left, top = _uint16(data, position), _uint16(data, position + 2)
    frame_width, frame_height = _uint16(data, position + 4), _uint16(data, position + 6)
    flags = _item(data, position + 8)
    position += 9
    if flags & 128:  # the frame has a palette of its own
        palette_start, palette_size = position, 2 << (flags & 7)
        position += 3 * palette_size
    if position >= end:
        return _refuse(CUT_HEADER, width, height, 0)
    code_size = _item(data, position)
    position += 1
    if frame_width == 0 or frame_height == 0:
        return _refuse(ZERO_SIZE, frame_width, frame_height, code_size)
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    if width * height > MAX_PIXELS:
        return _refuse(TOO_LARGE, width, height, code_size)
    if code_size < 1 or code_size > 8:
        return _refuse(BAD_CODE_SIZE, width, height, code_size)
    if frame_width * frame_height > MAX_PIXELS_PER_BYTE * (end - position):
        return _refuse(CUT_FILE, frame_width, frame_height, code_size)
    interlaced = (flags >> 6) & 1
    return GifHeader(
        OK, width, height, left, top, frame_width, frame_height, interlaced, fill, palette_start, palette_size,
        code_size, position,
    )  # fmt: skip


@intrinsic
def _memcpy(typingctx: Any, target: Any, target_start: Any, source: Any, source_start: Any, count: Any) -> Any:
    """memcpy between uint8 arrays, or within one where the ranges do not overlap. Checks nothing: call `_copy`."""

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
    """Copies if both ranges lie within their arrays; returns whether."""
    if count < 0 or target_start < 0 or source_start < 0:
        return False
    if target_start + count > target.size or source_start + count > source.size:
        return False
    _memcpy(target, target_start, source, source_start, count)  # type: ignore[call-arg]  # numba gives typingctx
    return True


@compiled
def _decode_lzw(
    data: Bytes, position: int, code_size: int, roots: Bytes, pixels: Bytes, used: Bytes
) -> tuple[int, int]:
    """Fills `pixels`, in the order of the file, from the sub-blocks at `position`; otherwise as decode_indices."""
    num_pixels, end, clear = pixels.size, data.size, 1 << code_size
    starts, lengths = np.empty(TABLE_SIZE, np.int32), np.empty(TABLE_SIZE, np.int32)
    width, next_code = code_size + 1, clear + 2
    bits = num_bits = block = 0
    written = last_start = last_length = 0  # last: where the string of the code before stands
    while written < num_pixels:
        while num_bits < width:
            if block == 0:
                if position >= end:
                    return CUT_PIXELS, written
                block = _item(data, position)
                position += 1
                if block == 0 or block > end - position:  # Pillow uses no part of a block that is cut either
                    return CUT_PIXELS, written
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
            return CUT_PIXELS, written
        # The new entry is the last string and the pixel behind it, which comes from this very code; so this code may
        # already be the new one. A full table stays as it is until a clear code.
        if last_length > 0 and next_code < TABLE_SIZE:
            starts[next_code], lengths[next_code] = last_start, last_length + 1
            # With a code size of 1 the first entry is 4, which 2 bits cannot say: as in Pillow codes never grow then.
            if next_code == (1 << width) - 1 and width < 12:
                width += 1
            next_code += 1
        length = 1
        if code < clear:
            pixels[written] = roots[code]
            used[code] = 1
        else:
            if code >= next_code:
                return BAD_CODE, written
            start, length = _item(starts, code), min(_item(lengths, code), num_pixels - written)
            # All but its last pixel stand before `written`; the last may be the first of those copied here.
            if start + length > written + 1 or not _copy(pixels, written, pixels, start, length - 1):
                return BAD_CODE, written
            pixels[written + length - 1] = pixels[start + length - 1]
        last_start, last_length = written, length
        written += length
    return OK, written


@compiled
def _order_rows(frame: Bytes, width: int, height: int) -> None:
    """Brings the rows of an interlaced frame from the order of the file into their own, in place.

    In place because fresh memory is dear: mapping the pages of a second frame takes longer than all the decoding.
    """
    firsts, steps = (0, 4, 2, 1), (8, 8, 4, 2)  # rows of the four passes
    stands_at, turn, row = np.empty(height, np.int64), 0, 0
    for position in range(height):
        stands_at[row] = position
        row += steps[turn]
        while row >= height and turn < 3:
            turn += 1
            row = firsts[turn]
    spare = np.empty(width, np.uint8)
    for start in range(height):  # each cycle of the permutation once; a row in place stands at itself
        source, row = stands_at[start], start
        if source == start:
            continue
        _copy(spare, 0, frame, start * width, width)
        while source != start:
            _copy(frame, row * width, frame, source * width, width)
            stands_at[row] = row
            row, source = source, stands_at[source]
        _copy(frame, row * width, spare, 0, width)
        stands_at[row] = row


@compiled
def decode_indices(data: Bytes, header: GifHeader, roots: Bytes, canvas: Bytes, used: Bytes) -> tuple[int, int]:
    """Decodes the first frame onto the canvas, row after row.

    Args:
        data: uint8 (N,), the file.
        header: what parse_gif(data) returned.
        roots: uint8 (256,), what to write for each index.
        canvas: uint8 (width * height,), written.
        used: uint8 (256,), set to 1 at each index that occurs, at no cost: each first comes as a code of its own.

    Returns:
        (status, number of pixels decoded).
    """
    if header.status != OK:
        return header.status, 0
    if canvas.size != header.width * header.height:
        return WRONG_BUFFER, 0
    num_pixels = header.frame_width * header.frame_height
    frame = canvas if num_pixels == canvas.size else np.empty(num_pixels, np.uint8)
    status, written = _decode_lzw(data, header.lzw_start, header.code_size, roots, frame, used)
    if status != OK:
        return status, written
    if header.interlaced:
        _order_rows(frame, header.frame_width, header.frame_height)
    if num_pixels < canvas.size:
        used[header.fill] = 1
        for pixel in range(canvas.size):
            canvas[pixel] = roots[header.fill]
        for row in range(header.frame_height):
            target = (header.top + row) * header.width + header.left
            if not _copy(canvas, target, frame, row * header.frame_width, header.frame_width):
                return WRONG_BUFFER, written
    return OK, written


@compiled
def _binary_table(data: Bytes, header: GifHeader, used: Bytes, table: Bytes) -> int:
    """Sets table[index] to 1 where a used index is foreground, else 0; returns the number of distinct lumas in use."""
    lumas = np.full(256, -1, np.int64)  # Rec. 601 in 1 / 65536, not rounded: (0, 0, 1) is brighter than black
    highest = num_lumas = 0
    for index in range(256):
        if used[index]:
            luma = index if header.palette_size == 0 else 0  # an index beyond the palette is black, as in Pillow
            if index < header.palette_size:
                at = header.palette_start + 3 * index
                luma = 19595 * _item(data, at) + 38470 * _item(data, at + 1) + 7471 * _item(data, at + 2)
            num_lumas += 1
            for other in range(index):
                if lumas[other] == luma:
                    num_lumas -= 1
                    break
            lumas[index] = luma
            highest = max(highest, luma)
    for index in range(256):
        table[index] = lumas[index] == highest and highest > 0
    return num_lumas


@compiled
def decode_binary(data: Bytes, header: GifHeader, canvas: Bytes) -> tuple[int, int]:
    """Decodes the first frame as a mask: 1 where it has the brighter of its two Rec. 601 lumas, else 0.

    So 0/1, 0/255 and any palette of two colours mean the same. A frame of one luma is foreground if that is above 0.

    Args:
        data, header, canvas: as for decode_indices.

    Returns:
        (status, detail): as decode_indices, or NOT_BINARY and the number of lumas.
    """
    roots, used, table = np.empty(256, np.uint8), np.zeros(256, np.uint8), np.empty(256, np.uint8)
    for index in range(256):
        roots[index] = index
    for _ in range(2):
        status, detail = decode_indices(data, header, roots, canvas, used)
        if status != OK:
            return status, detail
        num_lumas = _binary_table(data, header, used, table)
        if num_lumas > 2:
            return NOT_BINARY, num_lumas
        # To decode again with other roots costs far less than to look every pixel up.
        done = True
        for index in range(256):
            done = done and (not used[index] or table[index] == roots[index])
            roots[index] = table[index]
        if done:
            break
    return OK, detail


def as_uint8(data: bytes) -> Bytes:
    """The bytes as a writable uint8 (N,) array: numba would compile everything again for read-only ones."""
    return np.frombuffer(bytearray(data), np.uint8) if len(data) else np.zeros(0, np.uint8)


def gif_error(data: Bytes, header: GifHeader, status: int, detail: int = 0) -> DataError:
    """The DataError for a status other than OK and the detail that came with it."""
    values = header._asdict() | {"status": status, "detail": detail, "start": bytes(data[:6]), "size": data.size}
    return DataError(STATUS_MESSAGES[status].format(pixels=header.frame_width * header.frame_height, **values))


def decode_gif(data: bytes) -> tuple[Bytes, Bytes]:
    """Decodes the first frame of a GIF file (87a or 89a, interlaced or not).

    Returns:
        Indices uint8 (H, W), those of `PIL.Image.open`, and palette uint8 (N, 3), N = 2, 4, ... 256. An index may lie
        beyond the palette.

    Raises:
        DataError: why the file is refused, without its name.
    """
    file = as_uint8(data)
    header = parse_gif(file)
    if header.status != OK:
        raise gif_error(file, header, header.status)
    canvas = np.empty(header.width * header.height, np.uint8)
    status, detail = decode_indices(file, header, np.arange(256, dtype=np.uint8), canvas, np.zeros(256, np.uint8))
    if status != OK:
        raise gif_error(file, header, status, detail)
    palette = np.repeat(np.arange(256, dtype=np.uint8), 3)
    if header.palette_size:
        palette = file[header.palette_start : header.palette_start + 3 * header.palette_size]
    return canvas.reshape(header.height, header.width), palette.reshape(-1, 3)


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
