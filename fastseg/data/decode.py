"""One file's bytes to pixels on the sampling grid: photos to (H, W, 3), masks to (H, W).

libjpeg-turbo decodes a JPEG at the DCT scale nearest above the target size: at 1/8 it skips the inverse DCT, the colour
conversion and the upsampling of 98 % of the samples, and equals the mean of 8x8 pixels within rounding. Our own decoder
decodes GIF masks. Pillow decodes all other files, and JPEGs that simplejpeg refuses (CMYK, odd sampling factors). The
format is that of a file's first bytes, whatever its name.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastseg.data.formats.exif import exif_orientation, exif_segment, orient
from fastseg.data.formats.jpeg import check_memory, find_scan
from fastseg.data.gif import MAX_PIXELS, decode_gif_mask
from fastseg.data.resample import binary_mask, resize_area, sample_mask, sampling_grid
from fastseg.errors import DataError

__all__ = [
    "as_dali_input",
    "check_readable",
    "decode_full_mask",
    "decode_full_photo",
    "decode_image",
    "decode_mask",
    "image_size",
    "open_image",
    "pillow_errors",
]

JPEG_MAGIC, GIF_MAGIC = b"\xff\xd8", b"GIF8"
JPEG_END = b"\xff\xd9"  # the marker
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF")  # some of Pillow's other formats start other programs

if Image.MAX_IMAGE_PIXELS is not None:  # `open_image` has a limit of its own, above Pillow's
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)

Size = tuple[int, int]  # height, width


def image_size(data: bytes) -> Size:
    """Height and width of a photo as displayed (after EXIF orientation), from its header alone.

    Raises:
        DataError: the file is no image.
    """
    if stored := _jpeg_size(data):
        height, width = stored
        orientation = _orientation(data)
    else:
        with pillow_errors():
            image = open_image(data)
            width, height = image.size
            orientation = exif_orientation(image)
    return (width, height) if orientation >= 5 else (height, width)


def decode_image(data: bytes, out: NDArray[np.uint8]) -> Size:
    """Decode a photo onto the grid.

    Args:
        data: a JPEG, PNG, BMP or WebP file. Grey (8 or 16 bits), palette and CMYK images become RGB; transparency is
            ignored.
        out: (H, W, 3) uint8, written: the area average of the photo over each cell (`resample.sampling_grid`).

    Returns:
        The photo's own size as displayed, (height, width).

    Raises:
        DataError: the file is no image, or is damaged or truncated.
    """
    stored = _jpeg_size(data)
    if stored is None:
        pixels = _photo_pixels(data)
        size = pixels.shape[0], pixels.shape[1]
        _to_grid(pixels, size, out)
        return size
    height, width = stored
    orientation = _orientation(data)
    size = (width, height) if orientation >= 5 else (height, width)
    scale = sampling_grid(size[1], size[0], out.shape[1], out.shape[0]).denominator
    if orientation != 1 and (height % scale or width % scale):
        # The blocks of the scaled decode begin at the corner of the stored image, which is not that of the turned one.
        scale = 1
    scaled = (-(-height // scale), -(-width // scale))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise DataError(f"is a JPEG of {width}x{height} pixels, more than the {MAX_PIXELS} that are decoded")
    direct = orientation == 1 and scaled == out.shape[:2] and out.flags.c_contiguous
    arguments = {"min_height": scaled[0], "min_width": scaled[1], "buffer": out if direct else None}
    try:
        pixels = simplejpeg.decode_jpeg(data, **arguments)
    except ValueError as error:
        if "extraneous bytes" not in str(error):  # some cameras write stray bytes between segments
            raise DataError(f"is a damaged or truncated JPEG ({error})") from None
        pixels = simplejpeg.decode_jpeg(data, strict=False, **arguments)
    if not direct:
        _to_grid(np.ascontiguousarray(orient(pixels, orientation)), size, out)
    return size


def decode_mask(data: bytes, out: NDArray[np.uint8], mask_resize: str) -> Size:
    """Decode a mask onto the grid.

    Args:
        data: a GIF, PNG or BMP file of two values, the brighter of which is foreground. In a mask of one colour that is
            partly transparent, the opaque part is foreground.
        out: (H, W) uint8, written: the coverage 0..255 of each cell ("area"), or 0 or 255 by its centre ("nearest").
        mask_resize: "area" or "nearest".

    Returns:
        The mask's own size, (height, width).

    Raises:
        DataError: the file is no image, is damaged or truncated, or has more than two values.
    """
    mask = _mask_pixels(data)
    sample_mask(mask, out, mask_resize)
    return mask.shape[0], mask.shape[1]


def decode_full_photo(data: bytes) -> NDArray[np.uint8]:
    """A photo at its own size, as displayed: (H, W, 3) uint8. Files and errors as for `decode_image`."""
    photo = np.empty((*image_size(data), 3), np.uint8)
    decode_image(data, photo)
    return photo


def decode_full_mask(data: bytes) -> NDArray[np.bool_]:
    """A mask at its own size, as displayed: (H, W) bool, foreground true. Files and errors as for `decode_mask`."""
    return _mask_pixels(data).view(np.bool_)


def as_dali_input(data: bytes, height: int, width: int) -> tuple[bytes, Size, Size]:
    """A photo as a file that all of DALI's decoders decode to the same pixels.

    A JPEG stays as it is, unless simplejpeg refuses it. All other photos are decoded here, onto the grid of
    height x width cells, and become an uncompressed PPM.

    Returns:
        The bytes, the size to which they decode, and the photo's own size; both as displayed, (height, width).

    Raises:
        DataError: the file is no image, or is truncated.
    """
    if _jpeg_size(data):
        size = check_readable(data)
        return data, size, size
    cells = np.empty((height, width, 3), np.uint8)
    size = decode_image(data, cells)
    return b"P6 %d %d 255\n" % (width, height) + cells.tobytes(), (height, width), size


def check_readable(data: bytes) -> Size:
    """Check a photo's header and its end without decoding it.

    Returns:
        Height and width as displayed.

    Raises:
        DataError: the file is no image, or is truncated.
    """
    size = image_size(data)
    if data.startswith(JPEG_MAGIC):
        if (scan := find_scan(data)) < 0 or data.rfind(JPEG_END, scan) < 0:  # phones append videos after the end
            raise DataError(f"is a truncated JPEG (its {len(data)} bytes have no end-of-image marker)")
    else:
        with pillow_errors():
            image = open_image(data)
            image.load() if image.format == "BMP" else image.verify()  # verify() checks nothing in a BMP
    return size


def _jpeg_size(data: bytes) -> Size | None:
    """Stored height and width of a JPEG that simplejpeg decodes; None for all other files."""
    if not data.startswith(JPEG_MAGIC):
        return None
    check_memory(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _to_grid(pixels: NDArray[np.uint8], size: Size, out: NDArray[np.uint8]) -> None:
    """Average the pixels of an image of `size`, decoded at that size or at the grid's scale, over the cells."""
    height, width = out.shape[:2]
    resize_area(pixels, sampling_grid(size[1], size[0], width, height), height, width, out)


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 (as stored) if there is none."""
    segment = exif_segment(data)
    if segment is not None:
        return exif_orientation(segment) if segment else 1
    try:
        with pillow_errors():
            return exif_orientation(open_image(data))
    except DataError:
        return 1  # libjpeg-turbo decodes some files that Pillow does not


@contextmanager
def pillow_errors() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise DataError("is no image that can be read (JPEG, PNG, BMP, WebP; masks also GIF)") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"is damaged or truncated ({error})") from None


def open_image(data: bytes) -> Image.Image:
    if not data:
        raise DataError("is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} that are decoded")
    if image.format == "JPEG":
        check_memory(data)
    return image


def _photo_pixels(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3), as displayed, by Pillow."""
    with pillow_errors():
        image = open_image(data)
        image.load()
        image.info.pop("transparency", None)  # or Pillow warns that a palette's is lost
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            pixels = np.repeat(grey[..., None], 3, axis=2)
        else:
            pixels = np.asarray(image.convert("RGB"))
        return np.ascontiguousarray(orient(pixels, exif_orientation(image)))


def _mask_pixels(data: bytes) -> NDArray[np.uint8]:
    """(H, W) of 0 and 1, as displayed."""
    return decode_gif_mask(data) if data.startswith(GIF_MAGIC) else binary_mask(_mask_values(data))


def _mask_values(data: bytes) -> NDArray[Any]:
    """(H, W) uint8 or bool, as displayed, by Pillow."""
    with pillow_errors():
        image = open_image(data)
        image.load()
        image.info.pop("transparency", None)
        if image.mode.startswith("I"):  # 16-bit grey: the ranks of its values, because only their order counts
            values = _rank(np.asarray(image))
        elif image.mode in ("1", "L"):
            values = np.asarray(image)
        elif image.mode == "P":  # by the palette's colours: its indices have no order
            used = np.flatnonzero(image.histogram())
            palette = np.zeros((256, 3), np.uint8)
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette[: len(colours)] = colours
            ranks = np.zeros(256, np.uint8)
            ranks[used] = _rank_lumas(palette[used])
            values = ranks[np.asarray(image)]
        else:
            values = _rank_lumas(np.asarray(image.convert("RGB")))
            if "A" in image.getbands() and values.min() == values.max():
                alpha = np.asarray(image.getchannel("A"))
                values = alpha if alpha.min() < alpha.max() else values
        return np.ascontiguousarray(orient(values, exif_orientation(image)))


def _rank_lumas(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Ranks of the lumas of colours (..., 3), which are not rounded: (1, 0, 0) is brighter than black."""
    red, green, blue = (colours[..., band].astype(np.int32) for band in range(3))
    return _rank(19595 * red + 38470 * green + 7471 * blue)  # Rec. 601 in 1 / 65536


def _rank(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Ranks of values, from 1 if none is 0; above 255 they are 255."""
    low, high = values.min(), values.max()
    highest = values == high
    if (highest | (values == low)).all():  # two values need no sorting
        ranks = (highest & (high > low)).astype(np.int64)
    else:
        ranks = np.searchsorted(np.unique(values), values)
    return np.minimum(ranks + (low > 0), 255).astype(np.uint8)
