"""Generated pairs: files have Carvana's parameters, masks are exact, and no threshold segments the images."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastseg.data.gif import encode_gif
from fastseg.errors import ConfigError, DataError, OutputError
from fastseg.synthetic import generate as generate_module
from fastseg.synthetic.car import PAINTS, STYLES, make_car
from fastseg.synthetic.generate import generate
from fastseg.synthetic.studio import DISTANCE, EYE_HEIGHT, PITCH, make_studio, render_pair

FOLDERS = ("train_images", "train_masks", "val_images", "val_masks")


def read_pairs(out: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, mask) of every pair."""
    pairs = []
    for image in sorted(out.glob("*_images/*.jpg")):
        mask = out / image.parent.name.replace("images", "masks") / f"{image.stem}_mask.gif"
        with Image.open(image) as picture, Image.open(mask) as outline:
            pairs.append((np.array(picture), np.array(outline)))
    return pairs


def read_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def best_threshold_dice(image: np.ndarray, mask: np.ndarray) -> float:
    """Highest Dice of any threshold on red, green, blue or grey, in either direction."""
    best = 0.0
    for channel in (*np.moveaxis(image, 2, 0), image.mean(2).astype(np.uint8)):
        car = np.bincount(channel[mask == 1], minlength=256)
        every = np.bincount(channel.ravel(), minlength=256)
        for hits, guessed in ((car.cumsum(), every.cumsum()), (car[::-1].cumsum(), every[::-1].cumsum())):
            best = max(best, float((2 * hits / (guessed + mask.sum())).max()))
    return best


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 pairs of the default size."""
    out = tmp_path_factory.mktemp("full")
    generate(out, cars=3, views=1)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 cars, one of each style, x 3 views, 240x160."""
    out = tmp_path_factory.mktemp("small") / "new" / "data"
    generate(out, cars=6, views=3, width=240, height=160)
    return out


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace rendering by black images."""
    blank = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    for name in ("make_car", "make_studio"):
        monkeypatch.setattr(generate_module, name, lambda *_: None)
    monkeypatch.setattr(generate_module, "render_pair", lambda *_: blank)


def test_jpeg_has_carvanas_parameters(full_size: Path) -> None:
    files = sorted(full_size.glob("*_images/*.jpg"))
    assert len(files) == 3
    for path in files:
        data = path.read_bytes()
        assert 75_000 < len(data) < 125_000
        segments: dict[int, list[bytes]] = {}
        position = 2
        while data[position + 1] != 0xDA:  # start of scan
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            segments.setdefault(data[position + 1], []).append(data[position + 4 : position + 2 + length])
            position += 2 + length
        assert data[:2] == b"\xff\xd8"
        assert set(segments) == {0xE0, 0xDB, 0xC0, 0xC4}  # JFIF, quantisation, baseline frame, Huffman: no EXIF
        assert segments[0xE0][0].startswith(b"JFIF\0")
        precision, height, width, components = segments[0xC0][0][0], *np.frombuffer(segments[0xC0][0][1:5], ">u2"), 3
        assert (precision, height, width, components) == (8, 1280, 1918, segments[0xC0][0][5])
        assert [segments[0xC0][0][7 + 3 * i] for i in range(3)] == [0x22, 0x11, 0x11]  # 4:2:0
        quantisation = b"".join(segments[0xDB])
        first_row = [quantisation[1 + zigzag] for zigzag in (0, 1, 5, 6, 14, 15, 27, 28)]
        assert quantisation[0] == 0
        assert first_row == [14, 10, 9, 14, 22, 36, 46, 55]
        huffman = b"".join(segments[0xC4])  # of annex K.3: codes per length of each table
        assert len(huffman) == 2 * (17 + 12) + 2 * (17 + 162)
        for header in ("00 00010501010101010100000000000000", "10 0002010303020403050504040000017d"):
            assert bytes.fromhex(header) in huffman
        for header in ("01 00030101010101010101010000000000", "11 00020102040403040705040400010277"):
            assert bytes.fromhex(header) in huffman


def test_gif_has_carvanas_parameters(full_size: Path) -> None:
    files = sorted(full_size.glob("*_masks/*.gif"))
    assert len(files) == 3
    for path in files:
        data = path.read_bytes()
        assert 4_000 < len(data) < 9_000
        assert data[:6] == b"GIF89a"
        size = (1918).to_bytes(2, "little") + (1280).to_bytes(2, "little")
        assert data[6:10] == size
        assert data[10] & 0x87 == 0x80  # a global palette of two colours
        assert data[13:19] == bytes([0, 0, 0, 255, 255, 255])
        assert data[19:28] == b"," + bytes(4) + size  # the only frame follows: no extension, so no transparency
        assert data[28] == 0  # not interlaced, no palette of its own
        position = 30
        while data[position]:
            position += 1 + data[position]
        assert data[position:] == b"\0;"
        with Image.open(path) as picture:
            assert (picture.n_frames, picture.size, picture.mode) == (1, (1918, 1280), "P")
            assert "transparency" not in picture.info
            assert set(np.unique(np.array(picture))) == {0, 1}
            assert set(np.unique(np.array(picture.convert("L")))) == {0, 255}


@pytest.mark.parametrize("make", [np.zeros, np.ones, lambda shape: np.random.default_rng(0).integers(0, 2, shape)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (160, 239)])
def test_gif_holds_the_mask(tmp_path: Path, make: Callable[[Any], np.ndarray], shape: tuple[int, int]) -> None:
    mask = make(shape).astype(np.uint8)
    (tmp_path / "mask.gif").write_bytes(encode_gif(mask))
    with Image.open(tmp_path / "mask.gif") as picture:
        np.testing.assert_array_equal(np.array(picture), mask)


def test_names_and_summary(small: Path) -> None:
    names = {folder: {path.name for path in (small / folder).iterdir()} for folder in FOLDERS}
    assert {path.name for path in small.iterdir()} == set(FOLDERS)
    for split, num_cars in (("train", 4), ("val", 2)):
        stems = {name.removesuffix(".jpg") for name in names[f"{split}_images"]}
        assert names[f"{split}_masks"] == {f"{stem}_mask.gif" for stem in stems}
        assert len({stem.split("_")[0] for stem in stems}) == num_cars
        assert all(re.fullmatch("[0-9a-f]{12}_0[123]", stem) for stem in stems)
        assert len(stems) == 3 * num_cars


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("cars", "num_val"), [(2, 1), (5, 1), (6, 2), (10, 3), (16, 4)])
def test_split_by_car(tmp_path: Path, cars: int, num_val: int) -> None:
    summary = generate(tmp_path, cars=cars, views=2)
    assert summary == {
        "train_pairs": 2 * (cars - num_val),
        "val_pairs": 2 * num_val,
        **{folder: tmp_path / folder for folder in FOLDERS},
    }
    train, val = ({path.name[:12] for path in summary[folder].iterdir()} for folder in ("train_images", "val_images"))
    assert (len(train), len(val)) == (cars - num_val, num_val)
    assert not train & val


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2, 5):  # of 5, several draw one car
        generate(tmp_path / str(workers), cars=2, views=2, seed=3, width=96, height=64, workers=workers)
    assert len(read_bytes(tmp_path / "1")) == 8
    assert read_bytes(tmp_path / "1") == read_bytes(tmp_path / "2") == read_bytes(tmp_path / "5")
    generate(tmp_path / "other", cars=2, views=1, seed=4, width=96, height=64)
    first, other = read_bytes(tmp_path / "1"), read_bytes(tmp_path / "other")
    assert not first.keys() & other.keys()
    assert not set(first.values()) & set(other.values())


def test_foreground_share_is_near_carvanas(small: Path) -> None:
    shares = [mask.mean() for _, mask in read_pairs(small)]
    assert len(shares) == 18
    assert min(shares) > 0.09
    assert max(shares) < 0.41
    assert 0.16 < np.mean(shares) < 0.27


def test_no_threshold_segments_the_car(small: Path, full_size: Path) -> None:
    pairs = read_pairs(small) + read_pairs(full_size)
    scores = [best_threshold_dice(image, mask) for image, mask in pairs]
    assert np.mean(scores) < 0.75
    image = np.zeros((8, 8, 3), np.uint8)  # the measure itself: it segments a car that is red
    image[2:5, 2:6, 0] = 9
    assert best_threshold_dice(image, (image[..., 0] > 0).astype(np.uint8)) == 1


def test_paint_changes_only_the_car_and_the_floor_around_it() -> None:
    views, masks = [], []
    for paint in ("white", "blue"):
        rng = np.random.default_rng(5)
        car = make_car(rng, "hatchback", paint)
        studio = make_studio(rng, car, 240, 160)
        image, mask = render_pair(car, studio, 2.2, rng)
        views.append(image.astype(int))
        masks.append(mask)
    np.testing.assert_array_equal(*masks)
    changed = np.abs(views[0] - views[1]).max(2)
    assert (changed[masks[0] == 1] > 20).mean() > 0.4  # glass, tyres and lamps keep their colours
    edge = np.zeros_like(masks[0])
    for dy in (-1, 0, 1):  # pixels that the car covers by less than half
        for dx in (-1, 0, 1):
            edge |= np.roll(masks[0], (dy, dx), (0, 1))
    floor = np.zeros(masks[0].shape, bool)
    floor.flat[studio.floor] = True
    assert changed[(edge == 0) & ~floor].max() == 0
    assert changed[(edge == 0) & floor].max() < 20


@pytest.mark.parametrize("style", STYLES)
def test_mask_is_where_the_mesh_projects_to(style: str) -> None:
    """An independent camera: rotate the car, move it away, pitch the view, divide by the depth."""
    rng = np.random.default_rng(1)
    car = make_car(rng, style, "grey")
    studio = make_studio(rng, car, 300, 200)
    turn, pitch = 0.7, PITCH
    image, mask = render_pair(car, studio, turn, rng)
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((200, 300, 3), np.uint8, (200, 300), np.uint8)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    camera = np.array([[np.cos(pitch), 0, -np.sin(pitch)], [0, -1, 0], [-np.sin(pitch), 0, -np.cos(pitch)]])
    eye = np.array([-DISTANCE, 0, EYE_HEIGHT])
    depth, right, down = camera @ (rotation @ car.points.astype(float) - eye[:, None])
    x, y = 150 + studio.focal * right / depth, 100 + studio.focal * down / depth
    assert (x.min() > 0) & (x.max() < 300) & (y.min() > 0) & (y.max() < 200)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    np.testing.assert_allclose([columns[0], columns[-1] + 1], [x.min(), x.max()], atol=1)
    np.testing.assert_allclose(rows[-1] + 1, y.max(), atol=1)
    body = y > y.min() + 12  # an aerial is thinner than half of a pixel here
    near_car = np.pad(mask, 1)
    near_car = sum(near_car[1 + dy : 201 + dy, 1 + dx : 301 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)) > 0
    assert near_car[y[body].astype(int), x[body].astype(int)].all()


def test_mask_is_half_coverage() -> None:
    """Has the outline of a mask of eight times the size, averaged over 8x8: neither wider nor shifted."""
    masks = []
    for width, height in ((240, 160), (1920, 1280)):
        rng = np.random.default_rng(2)
        car = make_car(rng, "sedan", "black")
        masks.append(render_pair(car, make_studio(rng, car, width, height), 1.2, np.random.default_rng(0))[1])
    small, large = masks[0].astype(float), masks[1].astype(float)
    cover = large.reshape(160, 8, 240, 8).mean((1, 3))
    assert ((small == 1) != (cover >= 0.5)).mean() < 5e-4
    outline = (np.abs(np.diff(small, axis=0)).sum() + np.abs(np.diff(small, axis=1)).sum()) / 2
    assert abs(small.sum() - cover.sum()) < 0.05 * outline  # mean distance of the outlines, pixels
    for axis, positions in ((0, np.arange(160)), (1, np.arange(240))):
        centres = [(mask.sum(1 - axis) @ positions) / mask.sum() for mask in (small, cover)]
        assert abs(centres[0] - centres[1]) < 0.05


def test_mask_has_no_pinholes() -> None:
    """No hole of up to 7x7 pixels at full size: the mesh has no cracks, and the hubs no gaps."""
    rng = np.random.default_rng(0)
    car = make_car(rng, "suv", "silver")
    studio = make_studio(rng, car)
    for turn in (1.5, 2.6):
        _, mask = render_pair(car, studio, turn, rng)
        height, width = mask.shape
        ring = [(dy, dx) for dy in range(9) for dx in range(9) if dy in (0, 8) or dx in (0, 8)]
        around = sum(mask[dy : height - 8 + dy, dx : width - 8 + dx].astype(int) for dy, dx in ring)
        assert not ((around == len(ring)) & (mask[4:-4, 4:-4] == 0)).any()


def test_views_and_paints_differ() -> None:
    rng = np.random.default_rng(0)
    car = make_car(rng, "sedan", "red")
    studio = make_studio(rng, car, 120, 80)
    images, masks = zip(*(render_pair(car, studio, turn, rng) for turn in (0.0, 0.8, 1.6)), strict=True)
    assert masks[0].sum() < 0.75 * masks[2].sum()  # the tail is narrower than the side
    assert (masks[0] != masks[1]).mean() > 0.02
    red, green, blue = (images[2][masks[2] == 1].mean(0)[i] for i in range(3))
    assert red > 1.3 * max(green, blue)
    assert len(set(PAINTS.values())) == len(PAINTS)


@pytest.mark.usefixtures("without_pictures")
def test_interrupted_run_can_be_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(replaced) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("fastseg.runtime.files.os.replace", replace)
        with pytest.raises(OutputError, match=r"_03\.jpg: .*No space left on device"):
            generate(tmp_path, cars=2, views=4, workers=1)
    assert {tmp_path / name for name in read_bytes(tmp_path)} == set(replaced)  # no temporary file
    killed = replaced[0].with_name(f".{replaced[0].name}.123.tmp")
    killed.write_bytes(b"GIF")
    generate(tmp_path, cars=2, views=4)
    assert len(read_pairs(tmp_path)) == 8
    assert not killed.exists()


@pytest.mark.usefixtures("without_pictures")
def test_other_files_are_refused_and_stay(tmp_path: Path) -> None:
    generate(tmp_path, cars=2, views=2)
    before = read_bytes(tmp_path)
    with pytest.raises(DataError, match=r"^\S*train_images: .*[0-9a-f]{12}_02\.jpg.* another out"):
        generate(tmp_path, cars=2, views=1)
    (tmp_path / "train_images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"^\S*train_images: .*found 1 other file, first: holiday\.jpg"):
        generate(tmp_path, cars=2, views=2)
    assert read_bytes(tmp_path) == before | {"train_images/holiday.jpg": b"mine"}


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("cars", 1, 2),
        ("views", 0, 1),
        ("views", 100, 99),
        ("seed", -1, 0),
        ("width", 31, 32),
        ("height", 20_000, 16_384),
        ("workers", 0, 1),
    ],
)
def test_number_out_of_range(field: str, value: int, nearest: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: .*got {value}\. Use {nearest}\.$"):
        generate(tmp_path / "data", **{field: value})
    assert not (tmp_path / "data").exists()


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(OutputError, match=r"train_images: .*Not a directory"):
        generate(tmp_path / "data")


@pytest.mark.usefixtures("without_pictures")
def test_no_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path, cars=2, views=1, progress=True)
    assert capfd.readouterr() == ("", "")
