"""Inflates the pixels of mask PNGs, which are mostly long repetitions, several times as fast as zlib.

A mask of 2.46 million pixels is some ten thousand copies of up to 258 bytes. zlib copies three bytes at a time and
computes a checksum of all; the copies here are memcpy, and the checksums of the PNG's chunks guard the file.

The compiled functions release the GIL, raise nothing and return a count. A compiled function must not call one of
another file: numba's cache does not notice when that one changes.

Source: RFC 1951, DEFLATE Compressed Data Format Specification 1.3.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from fastseg.data.gif import Bytes, compiled

__all__ = ["inflate"]

MAX_BITS = 15  # of a code
CODE_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15])
LENGTH_BITS = np.array([0] * 8 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4 + [0])
LENGTH_BASE = np.array(
    [*range(3, 11), 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258]
)
DISTANCE_BITS = np.array([0, 0, 0, 0, *(bits for bits in range(1, 14) for _ in range(2))])
DISTANCE_BASE = np.cumsum(np.concatenate([[1], 2 ** DISTANCE_BITS[:-1]]))


@intrinsic
def _memcpy(typingctx: Any, target: Any, target_start: Any, source_start: Any, count: Any) -> Any:
    """memcpy within a uint8 array, between ranges that do not overlap. Checks no bounds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, start, source_start, count = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        cgutils.raw_memcpy(builder, builder.gep(data, [start]), builder.gep(data, [source_start]), count, itemsize=1)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp, types.intp), codegen


@register_jitable
def _build_table(lengths: NDArray[np.uint8], table: NDArray[np.int32]) -> int:
    """Write symbol << 4 | length of each code at every index whose low bits are the code; returns the longest length.

    An index of no code has 0. Returns 0 if codes are too many for their lengths, or if there is none.
    """
    counts = np.zeros(MAX_BITS + 2, np.int64)
    longest: Any = 0
    for length in lengths:
        counts[length] += 1
        longest = max(longest, np.int64(length))
    counts[0] = 0
    codes = np.zeros(MAX_BITS + 2, np.int64)
    for bits in range(1, MAX_BITS + 1):
        codes[bits + 1] = (codes[bits] + counts[bits]) << 1
        if codes[bits] + counts[bits] > 1 << bits:
            return 0
    table[: 1 << longest] = 0
    for symbol in range(lengths.size):
        length = np.int64(lengths[symbol])
        if length > 0:
            code, reverse = codes[length], 0
            codes[length] += 1
            for _ in range(length):
                reverse = reverse << 1 | code & 1
                code >>= 1
            for index in range(reverse, 1 << longest, 1 << length):
                table[index] = symbol << 4 | length
    return longest


@compiled
def _inflate(data: Bytes, out: Bytes) -> int:
    """Write the bytes of a DEFLATE stream; returns their number, or -1 if it is damaged or `out` is too short."""
    end, size = data.size, out.size
    position: Any = 0
    written: Any = 0
    num_bits: Any = 0
    bits = np.uint64(0)
    lengths = np.zeros(320, np.uint8)
    literals, distances = np.zeros(1 << MAX_BITS, np.int32), np.zeros(1 << MAX_BITS, np.int32)
    codes = np.zeros(1 << MAX_BITS, np.int32)
    last = False
    while not last:
        while num_bits <= 48:
            if position < end:
                bits |= np.uint64(data[position]) << np.uint64(num_bits)
            position += 1
            num_bits += 8
        last = bits & np.uint64(1) == np.uint64(1)
        kind = np.int64(bits >> np.uint64(1) & np.uint64(3))
        bits >>= np.uint64(3)
        num_bits -= 3
        if kind == 3:
            return -1
        if kind == 0:  # stored
            skip = num_bits & 7
            position -= (num_bits - skip) // 8
            bits, num_bits = np.uint64(0), 0
            if position + 4 > end:
                return -1
            count = np.int64(data[position]) | np.int64(data[position + 1]) << 8
            position += 4
            if position + count > end or written + count > size:
                return -1
            for i in range(count):
                out[written + i] = data[position + i]
            position += count
            written += count
            continue
        if kind == 1:
            lengths[:144], lengths[144:256], lengths[256:280], lengths[280:288], lengths[288:] = 8, 9, 7, 8, 5
            num_literals, num_distances = np.int64(288), np.int64(30)
        else:
            num_literals = 257 + np.int64(bits & np.uint64(31))
            num_distances = 1 + np.int64(bits >> np.uint64(5) & np.uint64(31))
            num_codes = 4 + np.int64(bits >> np.uint64(10) & np.uint64(15))
            bits >>= np.uint64(14)
            num_bits -= 14
            lengths[:] = 0
            for i in range(num_codes):
                if num_bits < 3:
                    while num_bits <= 48:
                        if position < end:
                            bits |= np.uint64(data[position]) << np.uint64(num_bits)
                        position += 1
                        num_bits += 8
                lengths[CODE_ORDER[i]] = np.uint8(bits & np.uint64(7))
                bits >>= np.uint64(3)
                num_bits -= 3
            longest = _build_table(lengths[:19], codes)
            if longest == 0:
                return -1
            lengths[:] = 0
            filled = 0
            while filled < num_literals + num_distances:
                while num_bits <= 48:
                    if position < end:
                        bits |= np.uint64(data[position]) << np.uint64(num_bits)
                    position += 1
                    num_bits += 8
                entry = np.int64(codes[np.int64(bits & np.uint64((1 << longest) - 1))])
                symbol, used = entry >> 4, entry & 15
                if used == 0:
                    return -1
                bits >>= np.uint64(used)
                num_bits -= used
                if symbol < 16:
                    lengths[filled] = symbol
                    filled += 1
                    continue
                extra = 2 if symbol == 16 else 3 if symbol == 17 else 7
                repeat = (11 if symbol == 18 else 3) + np.int64(bits & np.uint64((1 << extra) - 1))
                bits >>= np.uint64(extra)
                num_bits -= extra
                if filled + repeat > num_literals + num_distances or (symbol == 16 and filled == 0):
                    return -1
                value = lengths[filled - 1] if symbol == 16 else np.uint8(0)
                for _ in range(repeat):
                    lengths[filled] = value
                    filled += 1
        literal_bits = _build_table(lengths[:num_literals], literals)
        distance_bits = _build_table(lengths[num_literals : num_literals + num_distances], distances)
        if literal_bits == 0:
            return -1
        while True:
            while num_bits <= 48:  # 48 bits hold the longest pair of codes with their extra bits
                if position < end:
                    bits |= np.uint64(data[position]) << np.uint64(num_bits)
                position += 1
                num_bits += 8
            entry = np.int64(literals[np.int64(bits & np.uint64((1 << literal_bits) - 1))])
            symbol, used = entry >> 4, entry & 15
            if used == 0 or position > end + 8:
                return -1
            bits >>= np.uint64(used)
            num_bits -= used
            if symbol < 256:
                if written >= size:
                    return -1
                out[written] = symbol
                written += 1
                continue
            if symbol == 256:
                break
            if symbol > 285 or distance_bits == 0:
                return -1
            extra = LENGTH_BITS[symbol - 257]
            length = LENGTH_BASE[symbol - 257] + np.int64(bits & np.uint64((1 << extra) - 1))
            bits >>= np.uint64(extra)
            num_bits -= extra
            entry = np.int64(distances[np.int64(bits & np.uint64((1 << distance_bits) - 1))])
            symbol, used = entry >> 4, entry & 15
            if used == 0 or symbol > 29:
                return -1
            bits >>= np.uint64(used)
            num_bits -= used
            extra = DISTANCE_BITS[symbol]
            distance = DISTANCE_BASE[symbol] + np.int64(bits & np.uint64((1 << extra) - 1))
            bits >>= np.uint64(extra)
            num_bits -= extra
            if distance > written or written + length > size:
                return -1
            if distance >= length:
                _memcpy(out, written, written - distance, length)  # type: ignore[call-arg]  # numba gives typingctx
            elif distance == 1:
                out[written : written + length] = out[written - 1]
            else:
                for i in range(written, written + length):
                    out[i] = out[i - distance]
            written += length
    return written if position - num_bits // 8 <= end else -1


def inflate(data: bytes, size: int) -> Bytes | None:
    """The `size` bytes of a zlib stream; None if it has another number, needs a dictionary or is damaged.

    The checksum at the stream's end is not compared.
    """
    if len(data) < 6 or data[0] & 15 != 8 or data[1] & 32 or (data[0] << 8 | data[1]) % 31:
        return None
    out = np.empty(size, np.uint8)
    return out if _inflate(np.frombuffer(data, np.uint8)[2:-4], out) == size else None
