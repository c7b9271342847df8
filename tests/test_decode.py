"""decode.py against Pillow and NumPy: displayed pixels, averaged in float64 over the cells of the sampling grid."""

import io
import subprocess
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from fastseg.data.decode import (
    as_dali_input,
    check_readable,
    decode_full_mask,
    decode_full_photo,
    decode_image,
    decode_mask,
    image_size,
)
from fastseg.data.gif import MAX_PIXELS
from fastseg.errors import DataError

ORIENTATION = 0x0112  # EXIF tag


def encode(picture: np.ndarray | Image.Image, kind: str = "JPEG", orientation: int = 0, **options: Any) -> bytes:
    """A file of pixels or of a Pillow image; orientation 0 writes no EXIF."""
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    if kind == "JPEG":
        options = {"quality": 92, **options}
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def draw_photo(height: int, width: int, seed: int = 0, grain: float = 2.0) -> np.ndarray:
    """(H, W, 3): coloured light falling off, a dark disc off the centre, and grain that is grey, as in a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    tint = rng.uniform(-30, 30, 3)
    waves = 45 * np.sin(5 * x + seed)[..., None] * np.cos(4 * y[..., None] + np.arange(3))
    photo = 135 + tint + waves + grain * rng.normal(size=(height, width, 1))
    photo[draw_disc(height, width)] *= 0.35
    return photo.clip(0, 255).astype(np.uint8)


def draw_disc(height: int, width: int) -> np.ndarray:
    """(H, W) bool: off the centre to the left and the top, so that every turn and flip is detected."""
    y, x = np.mgrid[:height, :width]
    return (x - 0.4 * width) ** 2 + (y - 0.35 * height) ** 2 < (0.25 * min(height, width)) ** 2


def grid_extent(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Rows and columns that the target covers: whole blocks of the JPEG scale nearest above the target."""
    fits = [d for d in (8, 4, 2, 1) if -(-height // d) >= target_height and -(-width // d) >= target_width]
    block = fits[0] if fits else 1
    return -(-height // block) * block, -(-width // block) * block


def average(values: np.ndarray, extent: int, count: int) -> np.ndarray:
    """Float64 means over `count` equal cells along the first axis; pixels up to the extent repeat the last."""
    pixels = np.concatenate([values, np.repeat(values[-1:], extent - len(values), axis=0)]).astype(np.float64)
    sums = np.concatenate([np.zeros_like(pixels[:1]), pixels.cumsum(axis=0)])
    edges = np.linspace(0, extent, count + 1)
    whole = np.minimum(edges.astype(int), extent - 1)
    part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    return np.diff(sums[whole] + part * pixels[whole], axis=0) * count / extent


def expected_cells(shown: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averages of displayed pixels (H, W, ...) over the grid of a height x width target."""
    extent_y, extent_x = grid_extent(*shown.shape[:2], height, width)
    rows = average(shown, extent_y, height)
    return average(rows.swapaxes(0, 1), extent_x, width).swapaxes(0, 1)


def expected_centres(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixel under the centre of each cell, 0 or 255."""
    extent_y, extent_x = grid_extent(*mask.shape, height, width)
    y = np.minimum((np.arange(height) + 0.5) * extent_y / height, mask.shape[0] - 1).astype(int)
    x = np.minimum((np.arange(width) + 0.5) * extent_x / width, mask.shape[1] - 1).astype(int)
    return 255 * mask[y][:, x].astype(np.uint8)


def shown_by_pillow(data: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def decoded_image(data: bytes, height: int, width: int) -> np.ndarray:
    out = np.full((height, width, 3), 77, np.uint8)
    size = decode_image(data, out)
    assert size == image_size(data) == shown_by_pillow(data).shape[:2]
    return out


def decoded_mask(data: bytes, height: int = 20, width: int = 30, mask_resize: str = "area") -> np.ndarray:
    out = np.full((height, width), 77, np.uint8)
    decode_mask(data, out, mask_resize)
    return out


def mean_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - expected).mean())


SIZES = [  # height, width, target height, target width
    (1280, 1918, 160, 240),
    (1918, 1280, 240, 160),
    (1280, 1918, 320, 480),
    (1280, 1918, 192, 224),
    (427, 641, 100, 130),
    (641, 427, 33, 200),
    (100, 100, 100, 100),
    (300, 200, 299, 199),
    (50, 70, 160, 240),
    (600, 20, 16, 16),
    (333, 444, 1, 1),
]


@pytest.mark.parametrize(("height", "width", "target_height", "target_width"), SIZES)
def test_image_is_the_area_average(height: int, width: int, target_height: int, target_width: int) -> None:
    data = encode(draw_photo(height, width, seed=height))
    got = decoded_image(data, target_height, target_width)
    assert mean_error(got, expected_cells(shown_by_pillow(data), target_height, target_width)) < 1.0


def test_image_is_the_area_average_at_random_sizes() -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        height, width = (int(n) for n in rng.integers(40, 500, 2))
        target = [int(n) for n in rng.integers(1, 200, 2)]
        photo = Image.fromarray(draw_photo(height, width, seed))
        kind = rng.choice(["RGB", "L"])
        options = {"progressive": bool(rng.integers(2)), "subsampling": int(rng.integers(3))}
        data = encode(photo.convert(kind), orientation=int(rng.integers(9)), **options)
        error = mean_error(decoded_image(data, *target), expected_cells(shown_by_pillow(data), *target))
        assert error < 1.5, (height, width, target, kind, options)


def test_texture_is_averaged_not_sampled() -> None:
    data = encode(draw_photo(1280, 1918, grain=40))
    expected = expected_cells(shown_by_pillow(data), 160, 240)
    assert mean_error(decoded_image(data, 160, 240), expected) < 0.8
    sampled = shown_by_pillow(data)[4::8, 4::8]
    assert mean_error(sampled, expected) > 10  # proof that the bound above detects sampling


@pytest.mark.parametrize(
    ("target", "decoded"),
    [
        ((160, 240), (160, 240)),
        ((100, 130), (160, 240)),
        ((160, 241), (320, 480)),
        ((320, 480), (320, 480)),
        ((321, 480), (640, 959)),
        ((641, 100), (1280, 1918)),
        ((2000, 3000), (1280, 1918)),
    ],
)
def test_jpeg_is_decoded_at_the_scale_nearest_above_the_target(
    monkeypatch: pytest.MonkeyPatch, target: tuple[int, int], decoded: tuple[int, int]
) -> None:
    shapes = []
    original = simplejpeg.decode_jpeg
    data = encode(np.zeros((1280, 1918, 3), np.uint8))

    def decode_jpeg(*args: Any, **kwargs: Any) -> np.ndarray:
        pixels = original(*args, **kwargs)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    decode_image(data, np.empty((*target, 3), np.uint8))
    assert shapes == [decoded]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_and_the_mask_stays_aligned(orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition from displayed to stored pixels
    for height, width in [(240, 320), (239, 317)]:  # whole blocks of 8, and not
        shown, disc = draw_photo(height, width), draw_disc(height, width)
        stored = Image.fromarray(shown)
        if orientation > 1:
            stored = stored.transpose(Image.Transpose(undo[orientation]))
        files = {
            "JPEG": encode(stored, orientation=orientation),
            "CMYK": encode(stored.convert("CMYK"), orientation=orientation),
            "PNG": encode(stored, "PNG", orientation=orientation),
            "WEBP": encode(stored, "WEBP", orientation=orientation, lossless=True),
        }
        for name, data in files.items():
            assert image_size(data) == (height, width), name
            for target in [(30, 40), (25, 33), (100, 90)]:
                got = decoded_image(data, *target)
                assert mean_error(got, expected_cells(shown, *target)) < 2.0, (name, target)
                coverage = decoded_mask(encode(disc, "GIF"), *target)
                dark = got.mean(axis=2) < 0.65 * got.mean(axis=2)[coverage == 0].mean()
                assert (dark == (coverage > 127)).mean() > 0.97, (name, target)


def test_exif_is_found_after_other_segments() -> None:
    data = encode(draw_photo(40, 60), orientation=6)
    exif = data.index(b"\xff\xe1")
    block = b"\xff\xed" + (60_002).to_bytes(2, "big") + bytes(60_000)  # as ImageMagick writes a Photoshop block first
    behind = data[:exif] + block + data[exif:]
    stray = data[:exif] + bytes(3) + data[exif:]  # stray bytes between segments, as some cameras write
    for other in (data, behind, stray):
        assert image_size(other) == (60, 40)
        assert decode_image(other, np.empty((6, 4, 3), np.uint8)) == (60, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [9, 300])
def test_impossible_orientation_means_as_stored(kind: str, orientation: int) -> None:
    data = encode(draw_photo(40, 60), kind, orientation=orientation)
    assert image_size(data) == decode_image(data, np.empty((4, 6, 3), np.uint8)) == (40, 60)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 55, "subsampling": 2},
        {"quality": 100},
        {"optimize": True},
        {"restart_marker_blocks": 4},
        {"dpi": (300, 300), "comment": b"by a camera"},
        {"icc_profile": bytes(70_000)},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_jpeg_decodes(options: dict[str, Any]) -> None:
    data = encode(draw_photo(200, 301), **options)
    for target in [(25, 38), (40, 30)]:
        assert mean_error(decoded_image(data, *target), expected_cells(shown_by_pillow(data), *target)) < 1.5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode: str) -> None:
    data = encode(Image.fromarray(draw_photo(200, 301)).convert(mode))
    for target in [(25, 38), (40, 30)]:
        assert mean_error(decoded_image(data, *target), expected_cells(shown_by_pillow(data), *target)) < 1.5


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_other_formats_decode(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(draw_photo(200, 301)).convert(mode), kind, **options)
    for target in [(25, 38), (40, 30)]:
        assert mean_error(decoded_image(data, *target), expected_cells(shown_by_pillow(data), *target)) < 0.51


def test_transparency_is_ignored_without_a_warning() -> None:
    photo = draw_photo(64, 64)
    for alpha in (0, 128, 255):
        data = encode(np.dstack([photo, np.full((64, 64), alpha, np.uint8)]), "PNG")
        out = np.empty((64, 64, 3), np.uint8)
        decode_image(data, out)
        assert np.array_equal(out, photo)
    palette = Image.fromarray(photo).convert("P", palette=Image.Palette.ADAPTIVE)
    data = encode(palette, "PNG", transparency=bytes(range(0, 256, 2)))
    decode_image(data, out)
    assert np.array_equal(out, np.array(palette.convert("RGB")))


def test_sixteen_bits_of_grey_become_eight() -> None:
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    out = np.empty((64, 64, 3), np.uint8)
    decode_image(encode(grey, "PNG"), out)
    assert np.array_equal(out, np.repeat((grey // 256).astype(np.uint8)[..., None], 3, axis=2))


def mask_files(mask: np.ndarray) -> dict[str, bytes]:
    """One mask in the formats in which people store masks."""
    bright = mask.astype(np.uint8)
    palette = Image.fromarray(bright)
    palette.putpalette([0, 0, 0, 128, 0, 0])
    inverted = Image.fromarray(1 - bright)
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    dark = Image.fromarray(bright)
    dark.putpalette([0, 0, 0, 0, 0, 4])
    see_through = palette.copy()
    see_through.info["transparency"] = bytes([128, 255])
    alpha = 255 * bright
    return {
        "png 1 bit": encode(mask, "PNG"),
        "png 0/1": encode(bright, "PNG"),
        "png 0/255": encode(255 * bright, "PNG"),
        "png 3/200": encode(3 + 197 * bright, "PNG"),
        "png palette": encode(palette, "PNG", bits=1),
        "png inverted palette": encode(inverted, "PNG"),
        "png palette, transparent": encode(see_through, "PNG"),
        "png palette, barely brighter than black": encode(dark, "PNG"),
        "png rgb, barely brighter than black": encode(np.stack([bright, 0 * bright, 0 * bright], 2), "PNG"),
        "png rgb": encode(np.stack([200 * bright, 10 * bright, 0 * bright], 2), "PNG"),
        "png rgba": encode(np.dstack([255 * bright] * 3 + [np.full_like(bright, 255)]), "PNG"),
        "png white on transparent white": encode(np.dstack([np.full_like(bright, 255)] * 3 + [alpha]), "PNG"),
        "png black on transparent black": encode(np.dstack([0 * bright] * 3 + [alpha]), "PNG"),
        "png white on transparent black": encode(np.dstack([alpha] * 4), "PNG"),
        "png grey and alpha": encode(Image.fromarray(alpha).convert("LA"), "PNG"),
        "png 16 bit 0/1": encode(mask.astype(np.uint16), "PNG"),
        "png 16 bit 0/65535": encode(mask.astype(np.uint16) * 65535, "PNG"),
        "png 16 bit 300/400": encode(mask.astype(np.uint16) * 100 + 300, "PNG"),
        "bmp 1 bit": encode(mask, "BMP"),
        "bmp 0/255": encode(255 * bright, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "bmp inverted palette": encode(inverted, "BMP"),
        "bmp rgb": encode(np.stack([255 * bright] * 3, 2), "BMP"),
        "gif": encode(mask, "GIF"),
        "gif inverted palette": encode(inverted, "GIF"),
    }


@pytest.mark.parametrize("mask_resize", ["area", "nearest"])
def test_every_format_gives_the_same_mask(mask_resize: str) -> None:
    for height, width in [(160, 240), (87, 131)]:
        mask = draw_disc(height, width)
        for target in [(20, 30), (40, 33), (200, 300)]:
            if mask_resize == "area":
                expected, tolerance = 255 * expected_cells(mask, *target), 0.5001
            else:
                expected, tolerance = expected_centres(mask, *target), 0
            for name, data in mask_files(mask).items():
                out = np.empty(target, np.uint8)
                assert decode_mask(data, out, mask_resize) == (height, width)
                assert np.abs(out - expected).max() <= tolerance, (name, target)


def test_mask_of_one_value_is_all_foreground_or_none() -> None:
    for value in (0, 1, 255):
        plain = np.full((40, 60), value, np.uint8)
        opaque = np.dstack([plain] * 3 + [np.full_like(plain, 255)])
        for data in (encode(plain, "PNG"), encode(plain.astype(np.uint16), "PNG"), encode(opaque, "PNG")):
            assert np.unique(decoded_mask(data)).tolist() == [255 * (value > 0)]


def test_mask_of_three_values_is_refused() -> None:
    grey = np.zeros((40, 60), np.uint8)
    grey[:10], grey[10:20] = 100, 200
    dark = np.dstack([grey // 100, 0 * grey, 0 * grey])  # lumas 0, 0.3 and 0.6
    palette = Image.fromarray(grey // 100)
    palette.putpalette([0, 0, 0, 0, 0, 2, 0, 0, 4])
    files = [encode(grey, "PNG"), encode(grey.astype(np.uint16) * 200, "PNG"), encode(grey, "GIF")]
    for data in (*files, encode(dark, "PNG"), encode(palette, "PNG")):
        with pytest.raises(DataError, match=r"two values.* 3$") as caught:
            decoded_mask(data)
        assert caught.value.kind == "values"


def test_mask_follows_its_own_orientation() -> None:
    mask = draw_disc(40, 60)
    data = encode(np.rot90(mask), "PNG", orientation=6)
    assert np.array_equal(decoded_mask(data, 40, 60), 255 * mask)


def test_gif_size_counts_a_frame_beyond_the_canvas_as_pillow_does() -> None:
    data = bytearray(encode(draw_disc(40, 60), "GIF"))
    data[6:10] = bytes(4)  # some programs write a canvas of 0 x 0
    assert Image.open(io.BytesIO(data)).size == (60, 40)
    assert decode_mask(bytes(data), np.empty((4, 6), np.uint8), "area") == (40, 60)


def test_stray_bytes_at_the_end_do_no_harm() -> None:
    data = encode(draw_photo(80, 120))
    expected = decoded_image(data, 10, 15)
    for strayed in (data + bytes(3000), data[:-2] + bytes(5) + data[-2:]):  # after the end, and before its marker
        assert np.array_equal(decoded_image(strayed, 10, 15), expected)
        assert check_readable(strayed) == (80, 120)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(draw_photo(120, 160), orientation=6),
    "progressive": lambda: encode(draw_photo(120, 160), progressive=True),
    "cmyk": lambda: encode(Image.fromarray(draw_photo(120, 160)).convert("CMYK")),
    "png": lambda: encode(draw_photo(60, 80), "PNG", orientation=3),
    "palette": lambda: encode(Image.fromarray(draw_photo(60, 80)).convert("P"), "PNG"),
    "png mask": lambda: encode(draw_disc(60, 80), "PNG"),
    "png 16 bit": lambda: encode(draw_disc(60, 80).astype(np.uint16), "PNG"),
    "bmp": lambda: encode(draw_photo(60, 80), "BMP"),
    "webp": lambda: encode(draw_photo(60, 80), "WEBP"),
    "gif": lambda: encode(draw_disc(60, 80), "GIF"),
}


def read_in_every_way(data: bytes) -> list[Callable[[], object]]:
    return [
        lambda: image_size(data),
        lambda: decode_image(data, np.empty((10, 15, 3), np.uint8)),
        lambda: decode_mask(data, np.empty((10, 15), np.uint8), "area"),
        lambda: as_dali_input(data, 10, 15),
        lambda: check_readable(data),
    ]


@pytest.mark.parametrize("name", FILES)
def test_damage_raises_nothing_but_data_error(name: str) -> None:
    whole = FILES[name]()
    rng = np.random.default_rng(len(whole))
    refused = 0
    for _ in range(80):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        match rng.integers(4):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + int(rng.integers(1, 30))]
            case 2:
                data[at] ^= int(rng.integers(1, 256))
            case 3:
                data[int(rng.integers(min(64, len(data))))] = int(rng.integers(256))
        for read in read_in_every_way(bytes(data)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's about EXIF
                try:
                    read()
                except DataError as error:
                    refused += 1
                    assert "\n" not in str(error)  # noqa: PT017 (an error is allowed, not expected)
    assert refused > 50


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_refused(name: str) -> None:
    whole = FILES[name]()
    is_mask = name in ("png mask", "png 16 bit", "gif")
    read = decode_mask if is_mask else lambda data, out, _: decode_image(data, np.dstack([out] * 3))
    for length in (len(whole) // 2, len(whole) * 4 // 5):
        half, out = whole[:length], np.empty((10, 15), np.uint8)
        with pytest.raises(DataError, match=r"truncated|damaged"):
            read(half, out, "area")
        if not is_mask:
            with pytest.raises(DataError, match=r"truncated|damaged"):
                as_dali_input(half, 10, 15)


def test_error_messages() -> None:
    jpeg = FILES["jpeg"]()
    no_image = "no image.*JPEG, PNG, BMP, WebP"
    cases = [(b"", "empty"), (b"<!doctype html>", no_image), (b"\xff\xd8", no_image), (jpeg[:1000], "truncated JPEG")]
    for data, keyword in cases:
        with pytest.raises(DataError, match=f"^is .*{keyword}") as caught:
            decode_image(data, np.empty((10, 15, 3), np.uint8))
        assert caught.value.kind == "unreadable"
    with pytest.raises(DataError, match=f"truncated JPEG.* {len(jpeg) - 100} bytes"):
        check_readable(jpeg[:-100])


def test_a_jpeg_with_a_video_after_its_end_is_readable() -> None:
    jpeg = FILES["jpeg"]()
    assert check_readable(jpeg + bytes(100_000)) == check_readable(jpeg)


def test_forged_sizes_are_refused() -> None:
    png = bytearray(encode(draw_photo(60, 80), "PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    bmp = bytearray(encode(draw_photo(60, 80), "BMP"))
    bmp[18:26] = (60_000).to_bytes(4, "little") * 2
    for data in (png, bmp):
        for read in read_in_every_way(bytes(data)):
            with pytest.raises(DataError, match=r"exceeds limit|more than"):
                read()


def test_no_other_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", popen)
    postscript = encode(draw_photo(60, 80), "EPS")  # Pillow passes it to Ghostscript, whatever its name
    for read in read_in_every_way(postscript):
        with pytest.raises(DataError, match="no image"):
            read()


def test_dali_gets_jpegs_as_they_are_and_everything_else_as_pixels() -> None:
    jpeg = encode(draw_photo(60, 80), orientation=8)
    assert as_dali_input(jpeg, 8, 6) == (jpeg, (80, 60), (80, 60))
    turned = encode(draw_photo(60, 80), "PNG", orientation=8)
    data, encoded_size, size = as_dali_input(turned, 8, 6)
    assert (encoded_size, size) == ((8, 6), (80, 60))
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), decoded_image(turned, 8, 6))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_full_size_is_what_pillow_shows(orientation):
    """A JPEG whose sides are not multiples of a DCT block, and its masks, at full size and turned by EXIF."""
    data = encode(draw_photo(61, 83), orientation=orientation, subsampling=0)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_full_photo(data), shown)
    disc = draw_disc(61, 83)
    for kind in ("GIF", "PNG"):
        mask = decode_full_mask(encode(disc, kind))
        assert mask.dtype == np.bool_
        assert np.array_equal(mask, disc)


def forge_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size. The frame header is the first segment FF C0 or FF C2."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 9 :]


@pytest.mark.parametrize("read", [image_size, check_readable, lambda d: as_dali_input(d, 8, 8)])
@pytest.mark.parametrize("picture", [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)])
def test_a_progressive_jpeg_is_limited_by_what_its_decoding_holds(read, picture: np.ndarray) -> None:
    """libjpeg holds all coefficients of a progressive file, at whatever scale it decodes."""
    data = encode(picture, progressive=True)
    assert read(data) is not None
    stray = data[:2] + b"stray" + data[2:]  # libjpeg skips bytes between segments
    for forged in (forge_size(data, 60000, 60000), forge_size(stray, 60000, 60000)):
        with pytest.raises(DataError, match=r"60000x60000.*768 MiB"):
            read(forged)
        with pytest.raises(DataError, match=r"60000x60000.*768 MiB"):
            decode_image(forged, np.empty((8, 8, 3), np.uint8))


def test_a_large_baseline_jpeg_is_decoded_at_its_scale() -> None:
    """Its coefficients are held row by row."""
    assert image_size(forge_size(encode(np.zeros((16, 16, 3), np.uint8)), 60000, 60000)) == (60000, 60000)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photo() -> None:
    thumbnail, photo = encode(draw_photo(60, 80)), encode(draw_photo(480, 640))
    exif = b"Exif\0\0" + thumbnail
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    whole = photo[:2] + segment + photo[2:]
    assert check_readable(whole) == (480, 640)
    for size in (len(whole) // 2, len(segment) + 600, len(whole) - 3):
        with pytest.raises(DataError, match="truncated"):
            check_readable(whole[:size])


def test_large_photos_keep_their_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow's limit of pixels is, which a photo of 200 megapixels would exceed."""
    photo = draw_photo(80, 120)
    turned, stored = encode(photo, orientation=6), encode(photo)
    expected = decoded_image(turned, 60, 40)
    assert not np.array_equal(expected, decoded_image(stored, 60, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    out = np.empty((60, 40, 3), np.uint8)
    assert decode_image(turned, out) == (120, 80)
    assert np.array_equal(out, expected)


def test_pillow_decodes_up_to_the_limit_of_the_page() -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS == 2**28
