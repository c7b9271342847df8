"""The palette indices of a GIF, whose decoder otherwise makes masks of two values of them."""

import numpy as np

from fastseg.data.gif import OK, STATUS_MESSAGES, Bytes, decode_frame, parse_header
from fastseg.errors import DataError

__all__ = ["read_gif"]


def read_gif(data: bytes) -> tuple[Bytes, Bytes | None]:
    """Decode the first frame of a GIF.

    Returns:
        The palette indices, (H, W) uint8; and the palette, (N, 3) uint8, None if there is none.

    Raises:
        DataError: the file is damaged or truncated.
    """
    if not data.startswith((b"GIF87a", b"GIF89a")):
        raise DataError(f"is no GIF (it begins with {data[:6]!r}, not with GIF87a or GIF89a)")
    source = np.asarray(bytearray(data))  # writable, because numba would compile everything again
    header = parse_header(source)
    status, detail, indices = header.status, 0, np.arange(256).astype(np.uint8)
    if status == OK:
        status, detail, indices = decode_frame(source, header, indices, np.zeros(256, np.uint8))
    if status != OK:
        raise DataError(STATUS_MESSAGES[status].format(detail=detail))
    palette = source[header.palette_start :][: 3 * header.palette_size].reshape(-1, 3)
    return indices, palette if header.palette_size else None
