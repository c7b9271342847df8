"""One file's bytes to pixels on the sampling grid: photos to (H, W, 3), masks to (H, W).

A JPEG is decoded by libjpeg-turbo at the DCT scale nearest above the target size: at 1/8 it skips the inverse DCT,
the colour conversion and the upsampling of 98 % of the samples, and equals the mean of 8x8 pixels within rounding.
A GIF mask is decoded by our own decoder. Everything else, and JPEGs that libjpeg-turbo's simple interface refuses
(CMYK, odd sampling factors), goes through Pillow. What a file holds is read from its first bytes, not from its name.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from fastseg.data.gif import OK, as_uint8, parse_gif
from fastseg.data.resample import (
    MASK_MODES,
    decode_mask_into,
    mask_from_array,
    mask_from_gif,
    resize_area,
    sampling_grid,
)
from fastseg.errors import DataError

__all__ = [
    "as_dali_input",
    "check_readable",
    "decode_full_mask",
    "decode_full_photo",
    "decode_image",
    "decode_mask",
    "image_size",
    "is_gif",
    "orient",
]

JPEG_MAGIC, GIF_MAGIC = b"\xff\xd8", b"GIF8"
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"  # markers: the pixels begin, the picture ends
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF")  # it knows others, some of which start other programs
MAX_PIXELS = 2**28  # of what is decoded; a forged header must not exhaust memory

Size = tuple[int, int]  # height, width


def image_size(data: bytes) -> Size:
    """Height and width of a photo as it is displayed (after EXIF orientation), from its header alone.

    Raises:
        DataError: the bytes are no image.
    """
    if data.startswith(JPEG_MAGIC):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return (width, height) if _orientation(data) >= 5 else (height, width)
        except ValueError:
            pass  # Pillow reads some that TurboJPEG does not; what it cannot read it names
    with _pillow_errors():
        image = _open(data)
        width, height = image.size
        return (width, height) if _exif_orientation(image) >= 5 else (height, width)


def decode_image(data: bytes, out: NDArray[np.uint8]) -> Size:
    """Decode a photo onto the grid.

    Args:
        data: a whole JPEG, PNG, BMP or WebP file; grey (also of 16 bits), palette, CMYK and transparent ones become
            RGB, whatever is behind what is transparent.
        out: (H, W, 3) uint8, written: the area average of the photo over each cell (`resample.sampling_grid`).

    Returns:
        The photo's own size as displayed, (height, width).

    Raises:
        DataError: the file is no image, is damaged or truncated.
    """
    if data.startswith(JPEG_MAGIC):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            colorspace = "CMYK"
        if colorspace not in ("CMYK", "YCCK"):
            return _decode_jpeg(data, height, width, out)
    pixels = _photo_pixels(data)
    height, width = pixels.shape[:2]
    _to_grid(pixels, (height, width), out)
    return height, width


def decode_mask(data: bytes, out: NDArray[np.uint8], mask_resize: str) -> Size:
    """Decode a mask onto the grid.

    Args:
        data: a whole GIF, PNG or BMP file of two values, of which the brighter is foreground. In a mask of one
            colour that is transparent in places, the opaque part is.
        out: (H, W) uint8, written: coverage 0..255 of each cell ("area"), or 0 or 255 by its centre ("nearest").
        mask_resize: "area" or "nearest".

    Returns:
        The mask's own size, (height, width).

    Raises:
        DataError: the file is no image, is damaged or truncated, or has more than two values.
    """
    if is_gif(data):
        file = as_uint8(data)
        if decode_mask_into(file, out, MASK_MODES[mask_resize]) != OK:
            mask_from_gif(data, 1, 1)  # raises, with the reason
        header = parse_gif(file)  # its size counts a frame that sticks out of the canvas, as Pillow's does
        return header.height, header.width
    values = _mask_values(data)
    out[:] = mask_from_array(values, out.shape[0], out.shape[1], mask_resize)
    return values.shape[0], values.shape[1]


def decode_full_photo(data: bytes) -> NDArray[np.uint8]:
    """A photo at its own size, as displayed: (H, W, 3) uint8. Files and errors as for `decode_image`."""
    photo = np.empty((*image_size(data), 3), np.uint8)
    decode_image(data, photo)
    return photo


def decode_full_mask(data: bytes) -> NDArray[np.bool_]:
    """A mask at its own size, as displayed: (H, W) bool, foreground true. Files and errors as for `decode_mask`."""
    mask = np.empty(image_size(data), np.uint8)
    decode_mask(data, mask, "nearest")
    return mask > 0


def is_gif(data: bytes) -> bool:
    """Whether a file's first bytes are those of a GIF."""
    return data.startswith(GIF_MAGIC)


def as_dali_input(data: bytes, height: int, width: int) -> tuple[bytes, Size, Size]:
    """A photo's bytes as every DALI decoder reads them alike.

    JPEGs pass as they are; what else libjpeg-turbo does not read (PNG, WebP, CMYK) is decoded here, onto the grid of
    height x width cells, and becomes an uncompressed PPM of those.

    Returns:
        The bytes, the size to which they decode, and the photo's own, both as displayed, (height, width).

    Raises:
        DataError: the file is no image, or it is truncated.
    """
    if data.startswith(JPEG_MAGIC):
        try:
            _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            colorspace = "CMYK"
        if colorspace not in ("CMYK", "YCCK"):
            size = check_readable(data)
            return data, size, size
    cells = np.empty((height, width, 3), np.uint8)
    size = decode_image(data, cells)
    return b"P6 %d %d 255\n" % (width, height) + cells.tobytes(), (height, width), size


def check_readable(data: bytes) -> Size:
    """Height and width of a photo as displayed, having looked at its header and for its end, without decoding it.

    Raises:
        DataError: the file is no image, or it is truncated.
    """
    size = image_size(data)
    if data.startswith(JPEG_MAGIC):
        if data.rfind(JPEG_END, max(data.find(JPEG_SCAN), 0)) < 0:  # phones write films behind the end
            raise DataError(f"is a truncated JPEG (its {len(data)} bytes have no end-of-image marker)")
    else:
        with _pillow_errors():
            image = _open(data)
            image.load() if image.format == "BMP" else image.verify()  # a BMP has nothing to verify but its length
    return size


def _decode_jpeg(data: bytes, height: int, width: int, out: NDArray[np.uint8]) -> Size:
    """A JPEG of `height` x `width` stored pixels, which EXIF may say to turn."""
    orientation = _orientation(data)
    shown = (width, height) if orientation >= 5 else (height, width)
    grid = sampling_grid(shown[1], shown[0], out.shape[1], out.shape[0])
    scale = grid.denominator
    if orientation != 1 and (height % scale or width % scale):
        # The cells of the scaled decode begin at the stored picture's corner; turned, that corner lies elsewhere.
        scale = 1
    scaled = (-(-height // scale), -(-width // scale))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise DataError(f"is a JPEG of {width}x{height} pixels, more than the {MAX_PIXELS} that are decoded")
    direct = orientation == 1 and scaled == out.shape[:2] and out.flags.c_contiguous
    arguments = {"min_height": scaled[0], "min_width": scaled[1], "buffer": out if direct else None}
    try:
        pixels = simplejpeg.decode_jpeg(data, **arguments)
    except ValueError as error:
        if "extraneous bytes" not in str(error):  # stray bytes between segments: some cameras write them
            raise DataError(f"is a damaged or truncated JPEG ({error})") from None
        pixels = simplejpeg.decode_jpeg(data, strict=False, **arguments)
    if not direct:
        turned = np.ascontiguousarray(orient(pixels, orientation))
        _to_grid(turned, shown, out)
    return shown


def _to_grid(pixels: NDArray[np.uint8], size: Size, out: NDArray[np.uint8]) -> None:
    """Average pixels, decoded at full size or at the grid's scale, over the cells of an image of `size`."""
    height, width = out.shape[:2]
    resize_area(pixels, sampling_grid(size[1], size[0], width, height), height, width, out)


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 (as stored) where there is none."""
    if not _may_have_exif(data):
        return 1
    try:
        with _pillow_errors():
            return _exif_orientation(_open(data))
    except DataError:
        return 1  # what Pillow cannot read, libjpeg-turbo may


def _may_have_exif(data: bytes) -> bool:
    """Whether an EXIF segment stands before a JPEG's pixels; also True where the segments do not join up."""
    at = 2
    while data.startswith(b"\xff", at) and not data.startswith((b"\xff\xda", b"\xff\xff"), at):
        if data.startswith(b"Exif\0\0", at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return not data.startswith(b"\xff\xda", at)


def _exif_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1  # an EXIF block that nobody can read says nothing
    return orientation if orientation in range(1, 9) else 1


def orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn stored pixels (H, W, ...) as EXIF says they are displayed (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


@contextmanager
def _pillow_errors() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise DataError("is no image that can be read (JPEG, PNG, BMP, WebP; masks also GIF)") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"is damaged or truncated ({error})") from None


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DataError("is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} that are decoded")
    return image


def _photo_pixels(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3), as displayed, by Pillow."""
    with _pillow_errors():
        image = _open(data)
        image.load()
        image.info.pop("transparency", None)  # of a palette: Pillow would warn that it is lost
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            pixels = np.repeat(grey[..., None], 3, axis=2)
        else:
            pixels = np.asarray(image.convert("RGB"))
        return np.ascontiguousarray(orient(pixels, _exif_orientation(image)))


def _mask_values(data: bytes) -> NDArray[Any]:
    """(H, W) uint8 or bool, as displayed, by Pillow."""
    with _pillow_errors():
        image = _open(data)
        image.load()
        image.info.pop("transparency", None)
        if image.mode.startswith("I"):  # 16 bits of grey: their ranks, because only which is brighter counts
            grey = np.asarray(image)
            levels = np.unique(grey)
            values = np.minimum(np.searchsorted(levels, grey) + (levels[0] > 0), 255).astype(np.uint8)
        else:  # what a palette's indices mean is for its colours to say
            shown = image if image.mode in ("1", "L") else image.convert("L")
            if "A" in image.getbands() and _is_even(shown) and not _is_even(image.getchannel("A")):
                shown = image.getchannel("A")
            values = np.asarray(shown)
        return np.ascontiguousarray(orient(values, _exif_orientation(image)))


def _is_even(channel: Image.Image) -> bool:
    low, high = channel.getextrema()
    return low == high
