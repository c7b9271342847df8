"""Masks of classes: every file format, the vote of the cells against a plain reference, and unlisted values."""

import io
import re
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.classes import IGNORED
from fastseg.data.batch import BadSamples
from fastseg.data.cache import DiskCache
from fastseg.data.host import HostDecoder
from fastseg.data.labels.decode import (
    count_classes,
    count_values,
    decode_classes,
    decode_full_classes,
    read_stored,
)
from fastseg.data.labels.encoding import ClassEncoding, class_encoding
from fastseg.data.labels.inflate import inflate
from fastseg.data.labels.png import read_png
from fastseg.data.labels.vote import index_colours
from fastseg.data.resample import MASK_MODES, sampling_grid
from tests.conftest import write_pair

COLOURS = [(0, 0, 0), (9, 8, 7), (1, 2, 3), (250, 0, 0), (0, 250, 0), (0, 0, 250)]
NAMES = ["ground", "wall", "body", "windows", "wheels", "lights"]
Array = np.ndarray


def encoding_of(classes: object, ignore_value: int = 255) -> ClassEncoding:
    config = fastseg.Config(classes=classes, ignore_value=ignore_value)
    encoding = class_encoding(config.classes, config.ignore_value)
    assert encoding is not None
    return encoding


VALUES = encoding_of(NAMES)
RGB = encoding_of(dict(zip(NAMES, COLOURS, strict=True)))


def blobs(height: int, width: int, seed: int = 0, count: int = 6) -> Array:
    """(H, W) uint8 classes below `count`, in patches whose edges cut the cells of every grid."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(12):
        centre_y, centre_x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.4) * width
        mask[(y - centre_y) ** 2 + ((x - centre_x) / 1.7) ** 2 < radius**2] = rng.integers(count)
    return mask


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_image(mask: Array) -> Image.Image:
    image = Image.fromarray(mask, "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    spare = [(0, 0, 0)] * (int(mask.max()) + 1 - len(COLOURS))  # the palette's size decides the bits per pixel
    image.putpalette([channel for colour in [*COLOURS, *spare] for channel in colour])
    return image


def write_png(rows: list[bytes], width: int, bits: int, kind: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of these filtered rows, in two IDAT chunks."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(rows))
    parts = [(b"IHDR", header), *extra, (b"IDAT", pixels[:9]), (b"IDAT", pixels[9:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def flip_bit(data: bytes, at: int) -> bytes:
    flipped = bytearray(data)
    flipped[at] ^= 16
    return bytes(flipped)


def reference(mask: Array, height: int, width: int, mode: str) -> Array:
    """The class of each cell in float64, cell by cell; overlaps of pixels and cells are exact fractions."""
    grid = sampling_grid(mask.shape[1], mask.shape[0], width, height)
    padded = np.pad(mask, ((0, grid.extent_y - mask.shape[0]), (0, grid.extent_x - mask.shape[1])), "edge")
    out = np.empty((height, width), np.uint8)

    def overlaps(cell: int, extent: int, count: int) -> Array:
        """Length of each pixel that lies in a cell, in 1 / count pixels."""
        low, high = Fraction(cell * extent, count), Fraction((cell + 1) * extent, count)
        return np.array([float(count * max(0, min(high, x + 1) - max(low, x))) for x in range(extent)])

    rows = [overlaps(r, grid.extent_y, height) for r in range(height)]
    columns = [overlaps(c, grid.extent_x, width) for c in range(width)]
    for r in range(height):
        for c in range(width):
            if mode == "nearest":
                y, x = (2 * r + 1) * grid.extent_y // (2 * height), (2 * c + 1) * grid.extent_x // (2 * width)
                out[r, c] = mask[min(y, mask.shape[0] - 1), min(x, mask.shape[1] - 1)]
            else:
                weights = np.outer(rows[r], columns[c])
                out[r, c] = np.argmax(np.bincount(padded.ravel(), weights.ravel(), minlength=256))
    return out


def decoded(data: bytes, size: tuple[int, int], mode: str = "area", encoding: ClassEncoding = VALUES) -> Array:
    out = np.full(size, 77, np.uint8)
    decode_classes(data, out, mode, encoding)
    return out


# The vote


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((128, 190), (16, 24)),  # eighths, whose grid has two columns more than the mask
        ((64, 96), (16, 24)),
        ((61, 97), (20, 31)),  # cells of fractions of pixels
        ((61, 97), (61, 97)),
        ((30, 40), (77, 53)),  # cells smaller than pixels
        ((1, 1), (2, 3)),
        ((200, 7), (3, 5)),
    ],
)
def test_cells_equal_a_plain_reference(size, target, mode):
    for seed in range(3):
        mask = blobs(*size, seed)
        mask[mask == 5] = 255
        assert np.array_equal(decoded(encode(palette_image(mask)), target, mode), reference(mask, *target, mode))
        noise = np.random.default_rng(seed).integers(0, 5, size).astype(np.uint8)
        assert np.array_equal(decoded(encode(palette_image(noise)), target, mode), reference(noise, *target, mode))


def vote_of(rows: list[list[int]], encoding: ClassEncoding = VALUES) -> int:
    """The class of a cell that consists of squares of these values."""
    mask = np.kron(np.array(rows, np.uint8), np.ones((8, 8), np.uint8))  # eighths are exact, so no edge is repeated
    return int(decoded(encode(Image.fromarray(mask)), (1, 1), encoding=encoding)[0, 0])


def test_of_equal_areas_the_lowest_class_wins():
    assert vote_of([[3, 1], [2, 4]]) == 1
    assert vote_of([[255, 255, 4, 4]]) == 4


def test_ignored_pixels_vote_and_win_only_with_most_of_the_cell():
    assert vote_of([[255, 255, 4]]) == IGNORED
    assert vote_of([[255, 4, 4]]) == 4
    assert vote_of([[9, 9, 4]], encoding_of(NAMES, 9)) == IGNORED
    assert (decoded(encode(Image.new("L", (40, 30), 255)), (3, 4)) == IGNORED).all()


@pytest.mark.parametrize("count", [2, 12, 150, 254])
def test_any_number_of_classes(count):
    mask = np.random.default_rng(count).integers(0, count, (50, 70)).astype(np.uint8)
    mask[0, 0] = count - 1
    data, encoding = encode(Image.fromarray(mask)), encoding_of([f"c{i}" for i in range(count)])
    assert np.array_equal(decoded(data, (50, 70), encoding=encoding), mask)
    assert np.array_equal(decoded(data, (11, 13), encoding=encoding), reference(mask, 11, 13, "area"))


# Files


def files_of(mask: Array) -> dict[str, bytes]:
    palette, grey = palette_image(mask), Image.fromarray(mask)
    return {
        "palette PNG": encode(palette),
        "palette PNG with transparency": encode(palette, transparency=0),
        "palette PNG, unpacked by Pillow": encode(palette, exif=Image.Exif()),
        "palette GIF": encode(palette, "GIF", optimize=False),
        "interlaced GIF": encode(palette, "GIF", optimize=False, interlace=1),
        "palette BMP": encode(palette, "BMP"),
        "grey PNG": encode(grey),
        "grey BMP": encode(grey, "BMP"),
        "16-bit PNG": encode(Image.fromarray(mask.astype(np.uint16))),
        "grey and alpha": encode(Image.merge("LA", [grey, Image.new("L", grey.size, 7)])),
        "grey as RGB": encode(Image.merge("RGB", [grey] * 3)),
    }


@pytest.mark.parametrize("name", files_of(blobs(8, 8)))
def test_every_file_of_values(name):
    mask = blobs(61, 97)
    data = files_of(mask)[name]
    assert np.array_equal(decode_full_classes(data, VALUES), mask)
    assert np.array_equal(decoded(data, (61, 97)), mask)
    assert decode_classes(data, np.empty((4, 4), np.uint8), "area", VALUES) == (61, 97)
    size, counts, ignored = count_classes(data, VALUES)
    assert (size, ignored) == ((61, 97), 0)
    assert np.array_equal(counts, np.bincount(mask.ravel(), minlength=6))


@pytest.mark.parametrize("name", ["palette PNG", "palette GIF", "palette BMP", "RGB PNG", "RGBA PNG", "RGB BMP"])
def test_every_file_of_colours(name):
    mask = blobs(61, 97, seed=1)
    rgb = Image.fromarray(np.array(COLOURS, np.uint8)[mask])
    others = {"RGB PNG": encode(rgb), "RGBA PNG": encode(rgb.convert("RGBA")), "RGB BMP": encode(rgb, "BMP")}
    data = {**files_of(mask), **others}[name]
    assert np.array_equal(decode_full_classes(data, RGB), mask)
    assert np.array_equal(decoded(data, (9, 14), encoding=RGB), reference(mask, 9, 14, "area"))


def test_two_palette_indices_may_have_one_colour():
    mask = np.array([[1, 2, 0, 0]], np.uint8)
    image = palette_image(mask)
    image.putpalette([0, 0, 0, 9, 8, 7, 9, 8, 7])
    assert decode_full_classes(encode(image), RGB).tolist() == [[1, 1, 0, 0]]
    assert count_values(read_stored(encode(image)), by_colour=True) == {(9, 8, 7): 2, (0, 0, 0): 2}


def test_mapped_values():
    encoding = encoding_of({"road": 7, "car": 26, "sky": 0}, ignore_value=1)
    data = encode(Image.fromarray(np.array([[7, 26, 0, 1]], np.uint8)))
    assert decode_full_classes(data, encoding).tolist() == [[0, 1, 2, IGNORED]]


def test_bits_are_zero_and_one():
    data = encode(Image.fromarray(np.array([[True, False]])))
    assert decode_full_classes(data, VALUES).tolist() == [[1, 0]]


def test_ignored_colour_is_a_grey():
    data = encode(Image.fromarray(np.array([[[255, 255, 255], [9, 8, 7]]], np.uint8)))
    assert decode_full_classes(data, RGB).tolist() == [[IGNORED, 1]]


def test_noise_of_colours_equals_a_dictionary():
    rng = np.random.default_rng(0)
    pixels = np.array([*COLOURS, (1, 2, 4), (255, 255, 255)], np.uint8)[rng.integers(0, 8, (20, 30))]
    table = {colour: index for index, colour in enumerate(COLOURS)} | {(255, 255, 255): IGNORED}
    expected = [[table.get(tuple(map(int, colour)), 254) for colour in row] for row in pixels]
    assert index_colours(pixels, *RGB.codes).tolist() == expected


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = blobs(20, 30)
    turned = np.rot90(mask, {3: 2, 6: -1}[orientation])
    assert np.array_equal(decode_full_classes(encode(palette_image(mask), exif=exif), VALUES), turned)


# Our PNG reader, against Pillow


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_bit_depths(bits, width):
    mask = blobs(9, width, count=min(6, 2**bits))
    data = encode(palette_image(mask), bits=bits)
    stored = read_png(data)
    assert stored is not None
    assert np.array_equal(stored[0], mask)
    assert stored[1][:2].tolist() == [list(colour) for colour in COLOURS[:2]]


def test_row_filters():
    rng = np.random.default_rng(0)
    rows = [bytes([y % 5]) + rng.bytes(33) for y in range(40)]
    data = write_png(rows, 33, 8, 0, (b"tEXt", b"Comment\0mask"))
    pixels, palette = read_png(data)
    assert palette is None
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_flat_rows_of_every_filter():
    """Long runs, which the reader takes eight bytes at a time, in rows that depend on the row above."""
    rng = np.random.default_rng(1)
    rows = []
    for y in range(60):
        row = np.zeros(101, np.uint8)
        row[rng.integers(0, 101, 3)] = rng.integers(1, 255, 3)
        rows.append(bytes([(4, 2, 4, 1, 4, 3)[y % 6]]) + row.tobytes())
    data = write_png(rows, 101, 8, 0)
    pixels, _ = read_png(data)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


def compressed(data: bytes, **options: int) -> bytes:
    compressor = zlib.compressobj(**options)
    return compressor.compress(data) + compressor.flush()


def streams() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        "empty": b"",
        "a byte": b"x",
        "run": bytes(100_000),
        "noise": rng.bytes(70_000),  # stored blocks
        "few symbols": rng.choice(np.frombuffer(b"abcd", np.uint8), 50_000, p=[0.9, 0.06, 0.03, 0.01]).tobytes(),
        "repetitions": b"".join(rng.bytes(n) * 300 for n in (1, 2, 3, 7, 8, 9, 63, 259)),
        "far copies": rng.bytes(32_000) * 4,
        "mask": blobs(300, 400).tobytes(),
        "text": Path(__file__).read_bytes(),
    }


@pytest.mark.parametrize("name", streams())
def test_inflation_equals_zlib(name):
    data = streams()[name]
    for level in (0, 1, 6, 9):
        for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED):
            stream = compressed(data, level=level, strategy=strategy)
            assert inflate(stream, len(data)).tobytes() == data
            assert inflate(stream, len(data) + 1) is None
            assert not data or inflate(stream, len(data) - 1) is None


def test_damaged_streams_are_left_to_zlib():
    """Truncated, or with flipped bits: None or another content, but never a write out of bounds."""
    data = blobs(60, 80).tobytes()
    stream = compressed(data)
    rng = np.random.default_rng(0)
    for end in range(0, len(stream) - 4, 7):
        assert inflate(stream[:end], len(data)) is None
    for _ in range(2000):
        damaged = bytearray(stream)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(2, len(stream))] ^= 1 << rng.integers(8)
        guarded = inflate(bytes(damaged), len(data))
        assert guarded is None or len(guarded) == len(data)
    for _ in range(500):
        assert inflate(b"\x78\x9c" + rng.bytes(200), 10_000) is None
    assert inflate(b"\x79\x9c" + stream[2:], len(data)) is None
    assert inflate(b"", 0) is None


def test_other_pngs_are_left_to_pillow():
    mask = blobs(20, 30)
    others = [
        encode(Image.fromarray(mask.astype(np.uint16))),
        encode(Image.fromarray(mask > 2)),
        encode(Image.fromarray(np.array(COLOURS, np.uint8)[mask])),
        write_png([bytes([5]) + bytes(30)] * 20, 30, 8, 0),  # an unknown filter
        encode(Image.fromarray(mask))[:-30],
        flip_bit(encode(Image.fromarray(mask)), -20),  # its chunk's checksum shows it
        b"\x89PNG\r\n\x1a\n",
        encode(Image.fromarray(mask), "GIF"),
    ]
    assert [read_png(data) for data in others] == [None] * len(others)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_damaged_files_are_refused(kind):
    data = encode(palette_image(blobs(61, 97)), kind)
    for damaged in (data[: len(data) // 2], data[:20], b"", b"GIF85a" + data[6:]):
        with pytest.raises(fastseg.DataError) as error:
            decoded(damaged, (4, 4))
        assert error.value.kind == "unreadable"


def test_flipped_bytes_never_crash():
    data = encode(palette_image(blobs(30, 40)))
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            decoded(bytes(damaged), (5, 6))
        except fastseg.DataError:
            continue


# Unlisted values


def unlisted(*words: object) -> pytest.RaisesExc:
    pattern = ".*".join(re.escape(str(word)) for word in words)
    return pytest.raises(fastseg.DataError, match=pattern, check=lambda error: error.kind == "values")


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("target", [(1, 1), (8, 12), (61, 97), (20, 31)])
def test_a_single_unlisted_pixel_is_found(target, mode):
    mask = blobs(61, 97)
    mask[60, 96] = 7
    with unlisted("value 7 (1 pixel)", "classes", "ignore_value"):
        decoded(encode(palette_image(mask)), target, mode)
    with unlisted("value 7 (1 pixel)"):
        decode_full_classes(encode(palette_image(mask)), VALUES)
    with unlisted("value 7 (1 pixel)"):
        count_classes(encode(palette_image(mask)), VALUES)


def test_unlisted_values_are_counted():
    mask = np.repeat(np.arange(20, dtype=np.uint8), range(1, 21))[None]
    with unlisted("values 19 (20 pixels), 18 (19 pixels)", "and 9 more"):
        decoded(encode(Image.fromarray(mask)), (2, 2))
    with unlisted("value 255 (3 pixels)"):
        decoded(encode(Image.fromarray(np.full((1, 3), 255, np.uint8))), (2, 2), encoding=encoding_of(NAMES, -1))


def test_unlisted_colours_are_counted():
    rgb = np.array([[COLOURS[0], (1, 1, 1), (1, 1, 1), COLOURS[2]]], np.uint8)
    with unlisted("colour (1, 1, 1) (2 pixels)"):
        decoded(encode(Image.fromarray(rgb)), (2, 2), encoding=RGB)
    with unlisted("colour (5, 5, 5) (4 pixels)"):
        decoded(encode(Image.new("L", (2, 2), 5)), (2, 2), encoding=RGB)


def test_colours_in_place_of_values_are_refused():
    rgb = np.array([[COLOURS[0], (1, 9, 1)]], np.uint8)
    with unlisted("RGB", "(1, 9, 1)", "colours instead"):
        decoded(encode(Image.fromarray(rgb)), (2, 2))


def test_values_above_255_are_named():
    with unlisted("value 1000 (4 pixels)"):
        decoded(encode(Image.fromarray(np.full((2, 2), 1000, np.uint16))), (2, 2))


# Decoders and caches


@pytest.fixture
def parts(tmp_path: Path) -> fastseg.Pairs:
    """Six pairs whose masks have six classes and ignored pixels."""
    for seed in range(6):
        write_pair(tmp_path, f"car{seed}_01", seed=seed, mask="png")
        mask = blobs(64, 96, seed)
        mask[:5] = 255
        palette_image(mask).save(tmp_path / "masks" / f"car{seed}_01_mask.png")
    return fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")


def expected_masks(pairs: fastseg.Pairs, mode: str = "area") -> Array:
    masks = [np.asarray(Image.open(io.BytesIO(Path(pairs.mask_path(i)).read_bytes()))) for i in range(len(pairs))]
    return np.stack([reference(mask, 16, 24, mode) for mask in masks])


def loader_of(pairs: fastseg.Pairs, **options: object) -> fastseg.Loader:
    classes = fastseg.Config(classes=NAMES).classes
    return fastseg.Loader(pairs, **{"height": 16, "width": 24, "batch_size": 3, "classes": classes, **options})


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("decoder", ["host", pytest.param("dali", marks=pytest.mark.dali)])
@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_decoders_and_caches_give_class_indices(decoder, cache, mode, parts, tmp_path):
    options = {"decoder": decoder, "cache": cache, "cache_dir": str(tmp_path / "cache"), "mask_resize": mode}
    loader = loader_of(parts, shuffle=False, **options)
    for _ in range(2):
        masks = np.concatenate([batch.masks.numpy() for batch in loader])
        assert masks.dtype == np.uint8
        assert np.array_equal(masks, expected_masks(parts, mode))


def test_ranks_share_the_epoch(parts):
    expected = expected_masks(parts)
    for rank in range(2):
        for batch in loader_of(parts, rank=rank, world_size=2, batch_size=4, cache="off"):
            assert np.array_equal(batch.masks.numpy(), expected[batch.indices])


def test_resume_gives_the_same_masks(parts):
    first = loader_of(parts, batch_size=2, seed=5)
    batches = iter(first)
    next(batches)
    resumed = loader_of(parts, batch_size=2, cache="off", num_workers=1)
    resumed.load_state_dict(first.state_dict())
    for left, right in zip(batches, resumed, strict=True):
        assert np.array_equal(left.masks.numpy(), right.masks.numpy())


def test_the_disk_cache_depends_on_the_classes(parts, tmp_path):
    def path(**fields: object) -> Path:
        config = fastseg.Config(**fields)
        decoder = HostDecoder(parts, 16, 24, classes=config.classes, ignore_value=config.ignore_value)
        return DiskCache(decoder, tmp_path).path

    values = dict(zip(NAMES, range(6), strict=True))
    base = path(classes=NAMES)
    assert path(classes=[f"{name}s" for name in NAMES]) == base  # names do not change the pixels
    others = {path(), path(classes=NAMES, ignore_value=-1), path(classes=NAMES, ignore_value=254)}
    others |= {path(classes={**values, "lights": 9}), path(classes=dict(zip(NAMES, COLOURS, strict=True)))}
    others |= {path(classes=dict(reversed(values.items())))}
    assert len(others | {base}) == 7


def test_pairs_of_unlisted_values_are_skipped(parts):
    Image.new("L", (96, 64), 99).save(parts.mask_path(2))
    with pytest.raises(fastseg.DataError, match=r"car2_01_mask\.png: has value 99 \(6144 pixels\).*bad_samples"):
        list(loader_of(parts))
    loader = loader_of(parts, bad_samples="skip", shuffle=False)
    assert [list(batch.indices) for batch in loader] == [[0, 1, 3], [3, 4, 5]]
    assert list(loader.bad.found) == [2]
    assert isinstance(loader.bad, BadSamples)
