"""The segments of a JPEG file: where its pixels begin, and how much memory decoding holds.

Source: ITU T.81, annex B; bytes between segments are skipped as libjpeg skips them.
"""

from collections.abc import Iterator

from fastseg.errors import DataError

__all__ = ["MAX_COEFFICIENT_BYTES", "check_memory", "find_scan"]

MAX_COEFFICIENT_BYTES = 768 * 2**20  # as many as the pixels of the largest image that is decoded
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers of a frame header
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}


def find_scan(data: bytes) -> int:
    """The position of the first scan's pixels; -1 if there is none. A thumbnail within a segment does not count."""
    for marker, _, end in _segments(data):
        if marker == START_OF_SCAN:
            return end
    return -1


def check_memory(data: bytes) -> None:
    """Check how much a decoder holds for a JPEG that comes in several scans: all its coefficients, two bytes each.

    libjpeg holds them at the photo's size, at whatever scale it decodes. It holds those of other JPEGs row by row.

    Raises:
        DataError: they take more than `MAX_COEFFICIENT_BYTES`.
    """
    progressive, frame = False, b""
    for marker, start, end in _segments(data):
        if marker in FRAMES:
            progressive, frame = marker in PROGRESSIVE, data[start:end]
        elif marker == START_OF_SCAN and len(frame) >= 8 and (progressive or data[start : start + 1] < frame[5:6]):
            height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
            factors = [(byte >> 4, byte & 15) for byte in frame[7::3]]  # horizontal and vertical, of each component
            largest = max(h for h, _ in factors) * max(v for _, v in factors)
            size = 2 * height * width * sum(h * v for h, v in factors) // max(largest, 1)
            if size > MAX_COEFFICIENT_BYTES:
                raise DataError(
                    f"is a JPEG of {width}x{height} pixels in several scans (progressive); decoding holds "
                    f"{size >> 20} MiB, more than the {MAX_COEFFICIENT_BYTES >> 20} MiB that are allowed"
                )


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of each segment, the first scan's header being the last one."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        while data.startswith(b"\xff", at):  # fill bytes
            at += 1
        if at + 2 >= len(data) or data[at] == END_OF_IMAGE:
            return
        marker, at = data[at], at + 1
        if marker in WITHOUT_LENGTH:
            continue
        end = at + max(int.from_bytes(data[at : at + 2], "big"), 2)
        yield marker, at + 2, end
        if marker == START_OF_SCAN:
            return
        at = end
