"""gif.py against Pillow, on damaged files, and with every memory access checked."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from PIL import Image, ImageDraw

from fastseg.data import gif
from fastseg.data.gif import decode_gif_mask
from fastseg.data.resample import sample_mask
from fastseg.errors import DataError

IDENTITY = np.arange(256, dtype=np.uint8)
GREYS = bytes(value for index in range(256) for value in (index, index, index))


def encode_lzw(
    pixels: np.ndarray, code_size: int, clear_every: int = 0, use_table: bool = True, end: bool = True
) -> bytes:
    """LZW codes of flat indices; a clear code after every `clear_every` codes, or only the first (deferred clear)."""
    clear = 1 << code_size
    bits = num_bits = since_clear = 0
    packed = bytearray()

    def emit(code: int) -> None:
        nonlocal bits, num_bits
        bits |= code << num_bits
        num_bits += width
        while num_bits >= 8:
            packed.append(bits & 255)
            bits, num_bits = bits >> 8, num_bits - 8

    width, next_code, table = code_size + 1, clear + 2, {}
    emit(clear)
    values, start = bytes(pixels), 0
    while start < len(values):
        code, stop = values[start], start + 1
        while use_table and stop < len(values):
            longer = table.get(values[start : stop + 1])
            if longer is None or longer >= 1 << width:  # too wide: only with a code size of 1, where codes do not grow
                break
            code, stop = longer, stop + 1
        emit(code)
        # A decoder that reads this code completes the entry of the code before.
        if since_clear > 0 and next_code < 4096:
            if next_code == (1 << width) - 1 and width < 12:
                width += 1
            next_code += 1
        since_clear += 1
        if next_code < 4096:
            table.setdefault(values[start : stop + 1], next_code)  # usable by the very next code
        if since_clear == clear_every:
            emit(clear)
            width, next_code, table, since_clear = code_size + 1, clear + 2, {}, 0
        start = stop
    if end:
        emit(clear + 1)
    if num_bits:
        packed.append(bits & 255)
    return bytes(packed)


def build_gif(
    indices: np.ndarray,
    *,
    code_size: int = 8,
    version: bytes = b"GIF89a",
    palette: bytes | None = GREYS,
    local_palette: bytes | None = None,
    interlaced: bool = False,
    canvas: tuple[int, int] | None = None,
    left: int = 0,
    top: int = 0,
    before: bytes = b"",
    block: int = 255,
    tail: bytes = b"\0;",
    clear_every: int = 0,
    use_table: bool = True,
    end: bool = True,
) -> bytes:
    """A GIF of one frame; `before` precedes the image, and a sub-block has `block` bytes of pixels."""
    height, width = indices.shape

    def flag(colours: bytes | None) -> int:
        return 0 if colours is None else 128 | (len(colours) // 3).bit_length() - 2

    rows = [row for first, step in ((0, 8), (4, 8), (2, 4), (1, 2)) for row in range(first, height, step)]
    stored = indices[rows] if interlaced else indices
    lzw = encode_lzw(stored.ravel(), code_size, clear_every, use_table, end)
    blocks = b"".join(bytes([len(lzw[i : i + block])]) + lzw[i : i + block] for i in range(0, len(lzw), block))
    screen = struct.pack("<HHBBB", *(canvas or (width, height)), flag(palette), 0, 0)
    image = b"," + struct.pack("<HHHHB", left, top, width, height, flag(local_palette) | (64 if interlaced else 0))
    return b"".join(
        [version, screen, palette or b"", before, image, local_palette or b"", bytes([code_size]), blocks, tail]
    )


def random_indices(rng: np.random.Generator, width: int, height: int, num_colours: int) -> np.ndarray:
    """Noise, or runs of a few hundred pixels: strings of one pixel and of many."""
    num_runs = int(rng.choice([1, 5, 40, width * height]))
    ends = np.sort(rng.integers(0, width * height, num_runs))
    runs = np.searchsorted(ends, np.arange(width * height), side="right")
    return rng.integers(0, num_colours, num_runs + 1).astype(np.uint8)[runs].reshape(height, width)


def random_gif(rng: np.random.Generator, max_side: int = 60) -> bytes:
    """A GIF with random options of build_gif, most of which Pillow never writes."""
    width, height = rng.integers(1, max_side + 1, 2).tolist()
    code_size = int(rng.integers(1, 9))
    palette = rng.integers(0, 256, 3 << rng.integers(1, 9)).astype(np.uint8).tobytes()
    extensions = [b"", b"\0\0", b"!\xf9\4\0\0\0\7\0", b"!\xf9\4\1\0\0\5\0", b"!\xfe\3abc\1d\0"]
    indices = random_indices(rng, width, height, 1 << code_size)
    return build_gif(
        indices,
        code_size=code_size,
        version=[b"GIF87a", b"GIF89a"][rng.integers(2)],
        palette=[palette, None][rng.integers(2)],
        local_palette=[palette[:6], palette, None][rng.integers(3)],
        interlaced=bool(rng.integers(2)),
        canvas=[None, (width + 3, height + 2), (1, 1)][rng.integers(3)],
        left=int(rng.choice([0, 0, 2])),
        top=int(rng.choice([0, 0, 1])),
        before=b"".join(extensions[i] for i in rng.integers(0, len(extensions), 2)),
        block=int(rng.choice([1, 2, 7, 255])),
        tail=[b"\0;", b"", b"\0" + build_gif(indices[:1, :1], code_size=code_size)[13 + len(GREYS) :]][rng.integers(3)],
        clear_every=int(rng.choice([0, 0, 1, 3, 100])),
        use_table=bool(rng.integers(4)),
        end=bool(rng.integers(2)),
    )


def pillow_indices(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def parse(data: bytes) -> gif._Header:
    return gif.parse_header(np.asarray(bytearray(data)))


def decode_indices(data: bytes) -> np.ndarray | None:
    """(H, W) palette indices, by the compiled functions that decode masks; None if the file is refused."""
    header, used = parse(data), np.zeros(256, np.uint8)
    if not data.startswith((b"GIF87a", b"GIF89a")) or header.status != gif.OK:
        return None
    status, count, indices = gif.decode_frame(np.asarray(bytearray(data)), header, IDENTITY, used)
    assert 0 <= count <= header.frame_width * header.frame_height
    if status != gif.OK:
        return None
    assert np.array_equal(np.flatnonzero(used), np.unique(indices))
    return indices


def test_agrees_with_pillow_on_its_own_files():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = rng.integers(1, 90, 2).tolist()
        num_colours = int(rng.integers(2, 257))
        frames = []
        for _ in range(int(rng.integers(1, 3))):
            frame = Image.fromarray(random_indices(rng, width, height, num_colours))
            frame.putpalette(rng.integers(0, 256, 3 * num_colours).astype(np.uint8).tobytes())
            frames.append(frame)
        file = io.BytesIO()
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], interlace=int(rng.integers(2)), optimize=False
        )
        indices = decode_indices(file.getvalue())
        assert np.array_equal(indices, np.array(frames[0]))
        assert np.array_equal(indices, pillow_indices(file.getvalue()))


def test_agrees_with_pillow_on_files_it_does_not_write():
    rng = np.random.default_rng(1)
    for _ in range(600):
        data = random_gif(rng)
        assert np.array_equal(decode_indices(data), pillow_indices(data)), data.hex()


def test_the_encoder_of_these_tests_compresses_and_fills_its_table():
    zeros = np.zeros((300, 300), np.uint8)
    assert len(build_gif(zeros, code_size=2, palette=None)) < 800
    noise = np.random.default_rng(2).integers(0, 255, 60_000).astype(np.uint8)
    codes = encode_lzw(noise, 8, end=False)
    assert len(codes) > 4096 * 1.5  # the table is full


@pytest.mark.parametrize("clear_every", [0, 4094, 4095, 4096, 5000])
@pytest.mark.parametrize("code_size", [2, 5, 8])
def test_full_table_waits_for_a_clear_code(code_size: int, clear_every: int):
    noise = np.random.default_rng(3).integers(0, 1 << code_size, (150, 200)).astype(np.uint8)
    data = build_gif(noise, code_size=code_size, clear_every=clear_every)
    assert np.array_equal(decode_indices(data), noise)
    assert np.array_equal(pillow_indices(data), noise)


def test_codes_that_use_their_own_entry():
    """Almost every code of a uniform frame is of this kind: strings of 1, 2, 3, ... pixels."""
    for size in [(1, 1), (1, 2), (1, 3), (7, 9), (300, 500)]:
        zeros = np.zeros(size, np.uint8)
        assert np.array_equal(decode_indices(build_gif(zeros, code_size=2)), zeros)
    pattern = np.tile(np.array([0, 1, 0, 0, 1, 0], np.uint8), 5000).reshape(100, 300)
    assert np.array_equal(decode_indices(build_gif(pattern, code_size=2)), pattern)


def carvana_like_mask() -> np.ndarray:
    """A silhouette of 1918 x 1280 with ragged edges, about a fifth of it foreground."""
    drawing = Image.new("L", (1918, 1280))
    draw = ImageDraw.Draw(drawing)
    draw.ellipse((350, 420, 1500, 900), fill=1)
    for x in (520, 1250):
        draw.ellipse((x, 760, x + 170, 960), fill=1)
    mask, rng = np.array(drawing), np.random.default_rng(5)
    for y in range(420, 960, 3):
        x = np.flatnonzero(mask[y])
        mask[y, x[0] : x[0] + rng.integers(1, 9)] = 0
    return mask


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("colours", [(0, 0, 0, 255, 255, 255), (255, 255, 0, 0, 0, 9), (1, 1, 1, 0, 0, 0)])
def test_carvana_sized_masks_are_the_brighter_colour(colours: tuple[int, ...], interlace: int):
    image = Image.fromarray(carvana_like_mask())
    image.putpalette(colours)
    file = io.BytesIO()
    image.save(file, "GIF", interlace=interlace, optimize=False)
    assert parse(file.getvalue()).interlaced == interlace
    grey = np.array(Image.open(file).convert("RGBA").convert("RGB").convert("L"))  # by colours, not indices
    assert np.array_equal(decode_gif_mask(file.getvalue()), grey == grey.max())


def test_masks_of_any_palette():
    rng = np.random.default_rng(6)
    num_refused = 0
    for _ in range(400):
        data = random_gif(rng, max_side=12)
        colours = np.array(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)
        luma = colours @ [19595, 38470, 7471]  # Rec. 601, in 1 / 65536
        lumas = np.unique(luma)
        if len(lumas) > 2:
            num_refused += 1
            with pytest.raises(DataError, match=rf"two values.* {len(lumas)}$") as caught:
                decode_gif_mask(data)
            assert caught.value.kind == "values"
        else:
            assert np.array_equal(decode_gif_mask(data), (luma == lumas[-1]) & (luma > 0))
    assert 100 < num_refused < 300


GOOD = build_gif(np.arange(12, dtype=np.uint8).reshape(3, 4), code_size=4, palette=GREYS[:48])
IMAGE_AT = 13 + 48  # offset of the frame's "," in GOOD
LZW_AT = IMAGE_AT + 11  # and of its first sub-block


def with_codes(codes: list[int]) -> bytes:
    """GOOD with other LZW codes, of 5 bits each: 16 is clear, 17 the end, 18 the first entry."""
    bits = sum(code << 5 * i for i, code in enumerate(codes))
    stored = bits.to_bytes((5 * len(codes) + 7) // 8, "little")
    return GOOD[:LZW_AT] + bytes([len(stored)]) + stored + b"\0;"


@pytest.mark.parametrize(
    ("data", "keyword"),
    [
        (b"", "no GIF"),
        (b"\xff\xd8\xff\xe0JFIF", "no GIF"),
        (b"GIF88a" + GOOD[6:], "no GIF"),
        (GOOD[:6], "truncated"),
        (GOOD[:10], "truncated"),
        (GOOD[:IMAGE_AT], "truncated"),
        (GOOD[: LZW_AT - 1], "truncated"),
        (GOOD[:LZW_AT], "truncated"),
        (GOOD[: LZW_AT + 3], "truncated.* 0 pixels"),
        (with_codes([16, 1, 2, 3, 17]), "truncated.* 3 pixels"),
        (with_codes([16, 1, 18, 18, 17]), "truncated.* 5 pixels"),
        (GOOD[: IMAGE_AT + 5] + b"\0\x40\0\x40" + GOOD[IMAGE_AT + 9 :], "truncated"),  # 2**28 pixels
        (GOOD[:IMAGE_AT] + b";", "without an image"),
        (GOOD[:IMAGE_AT] + b",\0\0\0\0\4\0\0\0\0" + GOOD[LZW_AT - 1 :], "damaged"),  # 4 x 0 pixels
        (GOOD[: LZW_AT - 1] + b"\x09" + GOOD[LZW_AT:], "damaged"),  # LZW code size
        (with_codes([18]), "damaged"),
        (with_codes([16, 1, 18, 20]), "damaged"),
        (with_codes([16, 1, 18, 16, 18]), "damaged"),
        (GOOD[:6] + b"\xff\xff\xff\xff" + GOOD[10:], r"2\*\*28"),  # a canvas of 65535 x 65535
    ],
)
def test_error_messages(data: bytes, keyword: str):
    with pytest.raises(DataError, match=f"^is .*{keyword}") as caught:
        decode_gif_mask(data)
    assert caught.value.kind == "unreadable"


def damaged_gifs(count: int) -> Iterator[tuple[bytes, int]]:
    """Small GIFs with bytes changed, cut off, inserted or deleted, and the offset of the first damage."""
    rng = np.random.default_rng(7)
    sources = [random_gif(rng, max_side=24) for _ in range(200)] + [GOOD]
    for _ in range(count):
        data = bytearray(sources[rng.integers(len(sources))])
        # Half of the damage is to the pixels, half to the headers before them, which hold the sizes.
        pixels_at = parse(data).lzw_start
        low, high = (pixels_at, len(data)) if rng.integers(2) else (0, pixels_at + 1)
        first = len(data)
        for _ in range(int(rng.integers(1, 4))):
            at = min(int(rng.integers(low, high)), len(data) - 1)
            first = min(first, at)
            match rng.integers(5):
                case 0:
                    data[at] = rng.integers(256)
                case 1:
                    data[at] ^= 1 << int(rng.integers(8))
                case 2:
                    data[at:at] = rng.integers(0, 256, rng.integers(1, 5)).astype(np.uint8).tobytes()
                case 3:
                    del data[at : at + int(rng.integers(1, 5))]
                case 4:
                    data[max(at, 1) :] = b""
            if not data:
                break
        yield bytes(data), first


def decode_damaged(data: bytes) -> str:
    """Decode and return "refused", "decoded", or "large" for a forged canvas that would only take long."""
    header = parse(data)
    if header.width * header.height > 2**18:
        return "large"
    if decode_indices(data) is None:
        with pytest.raises(DataError):
            decode_gif_mask(data)
        return "refused"
    try:
        mask = decode_gif_mask(data)
    except DataError as error:
        assert error.kind == "values"  # noqa: PT017 (an error is allowed, not expected)
    else:
        for mode in ("area", "nearest"):
            sample_mask(mask, np.empty((1 + len(data) % 9, 1 + len(data) % 11), np.uint8), mode)
    return "decoded"


def assert_outcomes(outcomes: list[str]) -> None:
    assert len(outcomes) == 10_000
    assert outcomes.count("refused") > 5000
    assert outcomes.count("decoded") > 1500


def test_damaged_files_are_refused_or_decoded():
    assert_outcomes([decode_damaged(data) for data, _ in damaged_gifs(10_000)])


def test_damaged_pixels_are_decoded_as_by_pillow():
    num_compared = 0
    for data, first in damaged_gifs(10_000):
        header = parse(data)
        if header.status != gif.OK or first < header.lzw_start or header.width * header.height > 2**18:
            continue
        indices = decode_indices(data)
        if indices is not None:
            assert np.array_equal(indices, pillow_indices(data)), data.hex()
            num_compared += 1
    assert num_compared > 300


@njit
def copy_by_index(target, target_start, source, source_start, count):
    """Replaces memcpy below. It refuses negative indices, which would wrap around, and overlaps, as memcpy requires."""
    if target_start < 0 or source_start < 0:
        raise IndexError("negative")
    if target.ctypes.data == source.ctypes.data and abs(target_start - source_start) < count:
        raise ValueError("overlap")
    for i in range(count):
        target[target_start + i] = source[source_start + i]


def run_with_bounds_checks() -> None:
    """The test below runs this in a process of its own, before anything is compiled."""
    # numba checks indices, not memcpy's pointers, so the copy is by index here. Compilation looks up the globals.
    gif._memcpy = copy_by_index
    buffer = np.zeros(8, np.uint8)
    # Proof that both kinds of errors are detected.
    with pytest.raises(IndexError):
        gif._uint16(buffer[:1], 0)
    with pytest.raises(IndexError):
        copy_by_index(buffer, 4, buffer[:2], 0, 4)
    with pytest.raises(ValueError, match="overlap"):
        copy_by_index(buffer, 2, buffer, 0, 3)
    noise = np.random.default_rng(8).integers(0, 256, (90, 100)).astype(np.uint8)
    assert np.array_equal(decode_indices(build_gif(noise)), noise)  # a full table, which small files do not have
    assert_outcomes([decode_damaged(data) for data, _ in damaged_gifs(10_000)])


def test_damaged_files_with_every_access_checked(tmp_path: Path):
    root = Path(gif.__file__).parents[2]
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_OPT": "1",  # compiles faster
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", "import test_gif; test_gif.run_with_bounds_checks()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
