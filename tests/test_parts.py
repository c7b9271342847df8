"""Generated masks of parts: the same pictures and outlines, exact borders, and files that training takes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.classes import read_classes
from fastseg.synthetic.car import STYLES, make_car
from fastseg.synthetic.studio import DISTANCE, EYE_HEIGHT, PARTS, PITCH, make_studio, render_pair

SIZE = {"cars": 6, "views": 2, "width": 240, "height": 160, "progress": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parts")
    fastseg.generate(out, parts=True, **SIZE)
    return out


def read_masks(out: Path) -> dict[str, np.ndarray]:
    masks = {}
    for path in sorted(out.glob("*_masks/*")):
        with Image.open(path) as mask:
            masks[path.stem] = np.array(mask)
    return masks


def render(style: str, turn: float, parts: bool, width: int = 300, height: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    car = make_car(rng, style, "silver")
    return render_pair(car, make_studio(rng, car, width, height), turn, np.random.default_rng(0), parts)


def test_pictures_and_outlines_are_those_of_masks_of_two_values(parts, tmp_path):
    fastseg.generate(tmp_path, **SIZE)
    for image in parts.glob("*_images/*.jpg"):
        assert image.read_bytes() == (tmp_path / image.relative_to(parts)).read_bytes()
    outlines, masks = read_masks(tmp_path), read_masks(parts)
    assert outlines.keys() == masks.keys()
    for name, mask in masks.items():
        assert np.array_equal(mask >= 2, outlines[name] == 1)


def test_every_view_has_every_part_of_the_car(parts):
    for mask in read_masks(parts).values():
        shares = np.bincount(mask.ravel(), minlength=6) / mask.size
        assert len(shares) == 6
        assert (shares[:2] > 0.2).all()
        assert shares[2] > 0.05
        assert (shares[[3, 5]] > 0.0005).all()
    assert max((mask == 4).mean() for mask in read_masks(parts).values()) > 0.004


def test_the_file_of_classes_fits_the_masks(parts):
    made = read_classes(parts / "classes.json")
    assert tuple(item.name for item in made) == PARTS
    path = next(parts.glob("train_masks/*.png"))
    with Image.open(path) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:18] == [channel for item in made for channel in item.colour]
    report = fastseg.check(parts, classes=parts / "classes.json", duplicates=False)
    assert report.count("error") == 0
    assert not [found.what for found in report.findings if found.what.startswith("class")]


@pytest.mark.parametrize("style", STYLES)
def test_parts_are_where_their_vertices_project_to(style):
    """An independent camera: rotate the car, move it away, pitch the view, divide by the depth."""
    turn, rng = 2.2, np.random.default_rng(1)
    car = make_car(rng, style, "silver")
    studio = make_studio(rng, car, 300, 200)
    _, mask = render_pair(car, studio, turn, rng, parts=True)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    camera = np.array([[np.cos(PITCH), 0, -np.sin(PITCH)], [0, -1, 0], [-np.sin(PITCH), 0, -np.cos(PITCH)]])
    eye = np.array([-DISTANCE, 0, EYE_HEIGHT])
    depth, right, down = camera @ (rotation @ car.points.astype(float) - eye[:, None])
    x, y = (150 + studio.focal * right / depth).astype(int), (100 + studio.focal * down / depth).astype(int)
    for part in range(3):
        chosen = car.parts[part] > 0.5
        assert chosen.any()
        drawn = np.zeros(mask.shape, bool)
        drawn[y[chosen], x[chosen]] = True
        near = sum(np.roll(drawn, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3)) > 0
        assert near[mask == 3 + part].all()


def test_borders_are_those_of_eight_times_the_size():
    """Most of each 8x8 pixels of a large mask, but for pixels whose largest parts are nearly equal."""
    _, small = render("sedan", 2.2, parts=True, width=240, height=160)
    _, large = render("sedan", 2.2, parts=True, width=1920, height=1280)
    shares = np.stack([(large == part).reshape(160, 8, 240, 8).mean((1, 3)) for part in range(6)])
    assert (small != shares.argmax(0)).mean() < 2e-3


def test_the_ground_is_below_the_wall():
    _, mask = render("coupe", 0.3, parts=True)
    room = mask[:, 0]
    assert (np.diff(room.astype(int)) <= 0).all()  # from top to bottom: wall, then ground
    assert set(room) == {0, 1}


def test_synth_command_writes_parts(cli, tmp_path):
    status, out, _ = cli("synth", "--out", tmp_path / "data", "--cars", 2, "--views", 1, "--parts")
    assert (status, out) == (0, f"1 training pair and 1 validation pair in {tmp_path / 'data'}/\n")
    assert (tmp_path / "data" / "classes.json").exists()
