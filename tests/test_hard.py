"""The hard set: reproducible, exact masks, darker than the plain one, and the plain one does not change."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.synthetic import hard
from fastseg.synthetic.car import PAINTS, make_car
from fastseg.synthetic.clutter import place_clutter
from fastseg.synthetic.generate import generate
from fastseg.synthetic.hard import dim_studio, hard_paints, render_hard_pair
from fastseg.synthetic.studio import Studio, make_studio, render_pair


def make_scene(seed: int, paint: str = "black") -> tuple[hard.Car, Studio, Studio]:
    """A car, its studio and its dimmed studio, 240x160."""
    rng = np.random.default_rng(seed)
    car = make_car(rng, "suv", paint)
    studio = make_studio(rng, car, 240, 160)
    return car, studio, dim_studio(rng, studio, car)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        generate(tmp_path / name, cars=2, views=2, width=96, height=64, hard=True, workers=workers)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.*"))]
    assert len(files) == 8
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_mask_is_the_car_less_what_hides_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    car, studio, dim = make_scene(seed)
    turn = 0.7 * seed
    _, mask = render_hard_pair(car, dim, turn, np.random.default_rng(seed))
    _, whole = render_pair(car, studio, turn, np.random.default_rng(seed))
    monkeypatch.setattr(hard, "place_clutter", lambda rng, car, turn: car)
    _, alone = render_hard_pair(car, dim, turn, np.random.default_rng(seed))
    np.testing.assert_array_equal(alone, whole)
    assert not (mask & ~whole).any()
    assert mask.sum() > 0.4 * whole.sum()


def test_things_hide_some_cars() -> None:
    hidden = 0
    for seed in range(8):
        car, studio, dim = make_scene(seed)
        _, mask = render_hard_pair(car, dim, 0.5, np.random.default_rng(seed))
        _, whole = render_pair(car, studio, 0.5, np.random.default_rng(0))
        hidden += int((whole & ~mask).sum() > 20)
    assert hidden >= 1


@pytest.mark.parametrize("turn", [0.0, 1.0, 4.0])
def test_parts_have_the_same_outline_and_image(turn: float) -> None:
    car, _, dim = make_scene(1)
    image, mask = render_hard_pair(car, dim, turn, np.random.default_rng(1))
    same, parts = render_hard_pair(car, dim, turn, np.random.default_rng(1), parts=True)
    np.testing.assert_array_equal(image, same)
    np.testing.assert_array_equal(parts >= 2, mask == 1)
    np.testing.assert_array_equal(parts[mask == 0] == 0, dim.ground[mask == 0])
    assert set(np.unique(parts)) == set(range(6))


def test_things_stand_clear_of_the_car() -> None:
    car, _, _ = make_scene(2)
    for seed in range(20):
        scene = place_clutter(np.random.default_rng(seed), car, 1.0)
        things = scene.points[:, car.points.shape[1] :]
        high = things[2] > 0.05  # cables lie under cars
        inside = (np.abs(things[0]) < 0.45 * car.size[0]) & (np.abs(things[1]) < 0.45 * car.size[1])
        assert not (inside & high).any()
        assert things[2].min() > -0.01
        np.testing.assert_array_equal(scene.points[:, : car.points.shape[1]], car.points)
        np.testing.assert_array_equal(scene.quads[: len(car.quads)], car.quads)


def test_a_dark_car_stands_on_a_dark_floor() -> None:
    car, studio, dim = make_scene(3)
    floor = dim.light[dim.ground].mean()
    assert floor < 0.5 * studio.light[studio.ground].mean()
    assert floor < 3 * np.mean(car.paint[:3]) + 0.1
    _, bright, dim = make_scene(3, "white")
    assert dim.light[dim.ground].mean() > bright.light[bright.ground].mean()


def test_paints_are_mostly_dark() -> None:
    paints = hard_paints()
    assert set(paints) == set(PAINTS)
    assert sum(np.mean(PAINTS[paint][:3]) < 0.25 for paint in paints) > 0.6 * len(paints)


def test_generate_writes_the_hard_set(tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("hard", {"hard": True}), ("parts", {"hard": True, "parts": True})):
        generate(tmp_path / name, cars=2, views=1, width=96, height=64, **options)
    images = {name: sorted((tmp_path / name).glob("*_images/*"))[0].read_bytes() for name in ("plain", "hard", "parts")}
    assert images["hard"] == images["parts"] != images["plain"]
    labels, outline = (
        np.frombuffer(Image.open(BytesIO(path.read_bytes())).tobytes(), np.uint8)
        for path in (next(tmp_path.glob("parts/train_masks/*.png")), next(tmp_path.glob("hard/train_masks/*.gif")))
    )
    np.testing.assert_array_equal(labels >= 2, outline > 0)
