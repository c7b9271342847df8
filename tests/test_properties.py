"""Properties over generated inputs: decoders, Config and checkpoint readers end in a result or in their one error."""

import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import fastseg
from fastseg.data.decode import check_readable, decode_full_mask, decode_image, decode_mask, image_size
from fastseg.data.formats.jpeg import check_memory, find_scan
from fastseg.data.gif import decode_gif_mask
from fastseg.data.labels.decode import count_values, read_stored
from fastseg.data.labels.gif import read_gif
from fastseg.data.labels.inflate import inflate
from fastseg.data.labels.png import read_png
from fastseg.network.checkpoint import load_checkpoint, load_model, save_checkpoint
from tests.conftest import write_checkpoint


def examples(number: int) -> settings:
    """The same examples in every run, on any machine."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height: int, width: int, values: int = 256) -> np.ndarray:
    """(H, W) uint8 of `values` different values, repeated."""
    return (np.arange(height * width).reshape(height, width) % values).astype(np.uint8)


BLOB = np.hypot(*(np.mgrid[:20, :30] - np.array([9.5, 14.5])[:, None, None])) < 8
PALETTED = Image.new("P", (14, 9))
PALETTED.putdata(gradient(9, 14, 7).ravel().tolist())
PALETTED.putpalette([value * 9 % 256 for value in range(21)])
PHOTO = Image.fromarray(np.stack([gradient(24, 40, n) for n in (256, 13, 99)], axis=2))
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6

GIFS = [save(Image.fromarray(BLOB), "GIF"), save(PALETTED, "GIF"), save(PALETTED, "GIF", transparency=2)]
PNGS = [save(Image.fromarray(BLOB), "PNG"), save(PALETTED, "PNG"), save(Image.fromarray(gradient(9, 14)), "PNG")]
PNGS += [save(PHOTO, "PNG"), save(Image.fromarray(gradient(9, 14).astype(np.uint16) * 200), "PNG")]
JPEGS = [save(PHOTO, "JPEG"), save(PHOTO, "JPEG", progressive=True, exif=TURNED), save(PHOTO.convert("CMYK"), "JPEG")]
JPEGS += [save(PHOTO.convert("L"), "JPEG", restart_marker_blocks=1, subsampling=0, exif=TURNED)]
MAGIC = [b"", b"GIF89a", b"GIF87a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"RIFF....WEBP"]


@st.composite
def mutated(draw: st.DrawFn, files: list[bytes], edits: int = 4) -> bytes:
    """One of the files with bytes replaced, inserted and deleted, and perhaps its end cut off."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, edits))):
        at, chunk = draw(st.integers(0, len(data))), draw(st.binary(min_size=1, max_size=4))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if kind == "replace":
            data[at : at + len(chunk)] = chunk
        elif kind == "insert":
            data[at:at] = chunk
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def arbitrary() -> st.SearchStrategy[bytes]:
    """Any bytes, most of them after the first bytes of a format."""
    return st.builds(bytes.__add__, st.sampled_from(MAGIC), st.binary(max_size=300))


def attempt(error: type[fastseg.FastsegError], function: Any, *arguments: Any) -> tuple[Any, str]:
    """What a function returns, or None and the message of its error. Any other exception fails the test."""
    try:
        return function(*arguments), ""
    except error as raised:
        return None, str(raised)


def decode(function: Any, *arguments: Any) -> Any:
    """What a decoder returns; None after a DataError."""
    found, message = attempt(fastseg.DataError, function, *arguments)
    assert (found is None) == bool(message) or function is check_memory
    return found


def load(function: Any, path: Path) -> Any:
    """What a reader of checkpoints returns; None after a CheckpointError."""
    found, message = attempt(fastseg.CheckpointError, function, path)
    assert found is not None or str(path) in message
    return found


@examples(300)
@given(mutated(GIFS) | arbitrary())
def test_any_bytes_are_a_gif_or_a_data_error(data):
    mask = decode(decode_gif_mask, data) if data.startswith(b"GIF8") else None
    assert mask is None or (mask.ndim == 2 and mask.dtype == np.uint8 and mask.max() <= 1)
    if found := decode(read_gif, data):
        pixels, palette = found
        assert pixels.ndim == 2
        assert pixels.dtype == np.uint8
        assert palette is None or palette.shape[1:] == (3,)
        assert mask is None or mask.shape == pixels.shape


@examples(300)
@given(mutated(PNGS) | mutated(GIFS) | arbitrary())
def test_any_bytes_are_a_mask_or_a_data_error(data):
    if (mask := decode(decode_full_mask, data)) is not None:
        assert mask.ndim == 2
        assert mask.dtype == np.bool_
    out = np.empty((4, 5), np.uint8)
    assert (decode(decode_mask, data, out, "area") is None) == (mask is None)
    if stored := decode(read_stored, data):
        assert stored.pixels.ndim in (2, 3)
        height, width = stored.pixels.shape[:2]
        assert sum(count_values(stored, by_colour=False).values()) == height * width


@examples(200)
@given(mutated(PNGS))
def test_a_plain_png_that_we_read_has_pillows_pixels(data):
    """Whatever has happened to the file: our reader leaves to Pillow all that it does not understand."""
    if plain := read_png(data):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(plain[0], np.asarray(image).view(np.uint8))


@examples(200)
@given(st.binary(max_size=200), st.integers(0, 500))
def test_inflating_any_bytes_gives_as_many_as_claimed_or_nothing(data, size):
    found = inflate(data, size)
    assert found is None or len(found) == size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged EXIF
@examples(400)
@given(mutated(JPEGS, edits=8) | arbitrary())
def test_any_bytes_have_a_jpeg_header_or_a_data_error(data):
    assert find_scan(data) >= -1
    decode(check_memory, data)
    size = decode(image_size, data)
    checked = decode(check_readable, data)
    assert checked in (None, size)
    if size and size[0] * size[1] < 10**6:
        out = np.empty((4, 5, 3), np.uint8)
        assert decode(decode_image, data, out) in (None, size)


def pixels(values: int) -> st.SearchStrategy[np.ndarray]:
    """(H, W) uint8 below `values`: noise, and rows that repeat, which LZW and deflate copy."""
    sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
    rows = st.integers(0, 2**32 - 1)

    def draw(size: tuple[int, int], seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, values, size, np.uint8)
        return noise if seed % 2 else noise[np.sort(rng.integers(0, size[0], size[0]))]

    return st.builds(draw, sides, rows)


@examples(150)
@given(pixels(2))
def test_a_gif_of_two_values_is_pillows(mask):
    data = save(Image.fromarray(mask.astype(bool)), "GIF")
    assert np.array_equal(decode_gif_mask(data), mask if mask.any() else np.zeros_like(mask))


@examples(150)
@given(st.sampled_from([2, 3, 16, 17, 256]).flatmap(pixels), st.booleans())
def test_labels_are_pillows(labels, optimize):
    """Grey and palette images, as GIF and as PNG of 1, 2, 4 and 8 bits per pixel."""
    image = Image.new("P", labels.shape[::-1])
    image.putdata(labels.ravel().tolist())
    image.putpalette(list(range(256)) * 3)
    for kind, bits in (("GIF", 0), *(("PNG", bits) for bits in (1, 2, 4, 8) if labels.max() < 2**bits)):
        data = save(image, kind, optimize=optimize, **({"bits": bits} if bits else {}))
        with Image.open(io.BytesIO(data)) as expected:
            assert np.array_equal(read_stored(data).pixels, np.asarray(expected)), (kind, bits)
    data = save(Image.fromarray(labels), "PNG", optimize=optimize)
    assert np.array_equal(read_stored(data).pixels, labels)


@examples(100)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 8), st.booleans(), st.sampled_from(["L", "RGB", "CMYK"]))
def test_a_jpegs_size_is_pillows(height, width, orientation, progressive, mode):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = save(Image.new(mode, (width, height)), "JPEG", progressive=progressive, exif=exif)
    assert image_size(data) == check_readable(data) == ((width, height) if orientation >= 5 else (height, width))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(fastseg.Config.model_fields)


@examples(300)
@given(st.dictionaries(st.sampled_from(NAMES) | st.sampled_from([n.upper() for n in NAMES]) | st.text(), JSON))
def test_any_json_is_a_config_or_a_config_error(tmp_path_factory, fields):
    config, message = attempt(fastseg.ConfigError, lambda: fastseg.Config(**fields))
    assert config or message
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(fields))
    again, message = attempt(fastseg.ConfigError, fastseg.Config.from_json, path)
    assert (again and again.model_dump()) == (config and config.model_dump())
    assert again or message.startswith(str(path))


@examples(100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_config_or_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    config, message = attempt(fastseg.ConfigError, fastseg.Config.from_json, path)
    assert config or message.startswith(str(path))


def field_values(name: str) -> st.SearchStrategy[Any]:
    """Values that keep a field's own rules, from its type and its bounds."""
    if name == "classes":
        return st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5)
    if name == "class_weights":
        return st.sampled_from(["none", "auto"])
    if name == "network":
        return st.sampled_from(["unet", "smp:Unet:resnet34", "own:Net"])
    if name == "device":
        return st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"])
    field = fastseg.Config.model_fields[name]
    kind = field.annotation
    if choices := get_args(kind):
        return st.sampled_from(choices)
    signs = ("ge", "gt", "le", "lt")
    bounds = {sign: getattr(rule, sign) for rule in field.metadata for sign in signs if hasattr(rule, sign)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if kind is int:
        return st.integers(low, min(high or 10**6, 2**63 - 1)).map(
            lambda number: number // 16 * 16 if name.startswith("image_") else number
        )
    if kind is float:
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_infinity=False)
    return st.booleans() if kind is bool else st.text(min_size=1, max_size=12)


@examples(150)
@given(st.fixed_dictionaries({}, optional={name: field_values(name) for name in NAMES}))
def test_valid_settings_survive_a_file(tmp_path_factory, fields):
    config, _ = attempt(fastseg.ConfigError, lambda: fastseg.Config(**fields))
    assume(config)
    path = tmp_path_factory.getbasetemp() / "valid.json"
    config.to_json(path)
    again = fastseg.Config.from_json(path)
    assert again.model_dump() == config.model_dump()
    assert config.replace().model_dump() == config.model_dump()
    again.to_json(path.with_name("again.json"))
    assert path.read_bytes() == path.with_name("again.json").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in both formats, and space for others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    path = write_checkpoint(folder / "whole.pt", base_channels=1, depth=1, image_height=16, image_width=16)
    fastseg.export(path, folder / "whole.safetensors")
    return folder


@pytest.mark.parametrize("name", ["whole.pt", "whole.safetensors"])
def test_any_bytes_are_a_checkpoint_or_a_checkpoint_error(folder, name):
    whole, path = (folder / name).read_bytes(), folder / f"any_{name}"

    @examples(150)
    @given(mutated([whole], edits=6) | st.builds(bytes.__add__, st.sampled_from([b"PK\3\4", whole[:9]]), st.binary()))
    def check(data):
        path.write_bytes(data)
        state = load(load_checkpoint, path)
        if state is not None:
            assert isinstance(state["config"], dict)
            assert isinstance(state["model"], dict)
        load(load_model, path)

    check()


PLAIN = JSON | st.just(torch.zeros(2, 3)) | st.just(torch.zeros(0)) | st.just(torch.arange(3))


@examples(150)
@given(
    st.sampled_from(["config", "model", "format", "config.depth", "config.base_channels", "config.network", "model.w"]),
    PLAIN,
)
def test_any_values_are_a_checkpoint_or_a_checkpoint_error(folder, place, value):
    """As a hostile program would write them; the file itself is whole."""
    state = load_checkpoint(folder / "whole.pt")
    part, _, key = place.partition(".")
    if not key:
        state[part] = value
    elif key == "w":
        state["model"][next(iter(state["model"]))] = value
    else:
        state["config"][key] = value
    path = folder / "values.pt"
    torch.save(state, path) if part == "format" else save_checkpoint(path, state)
    load(load_checkpoint, path)
    load(load_model, path)
