"""The hard studio: dark cars on dark floors, reflections and shadows on the floor, clutter before and behind the car.

    fastseg synth --hard

The room and the car are those of `studio.py`; the mask is the visible part of the car, exact.
"""

import math

import numpy as np
from numpy import ndarray

from fastseg.synthetic.car import PAINTS, Car
from fastseg.synthetic.clutter import place_clutter
from fastseg.synthetic.studio import (
    Studio,
    cast_shadow,
    expose,
    label_parts,
    project,
    rasterise,
    shade_vertices,
)

__all__ = ["dim_studio", "hard_paints", "render_hard_pair"]

DARK = ("charcoal", "black", "blue", "green", "grey")


def hard_paints() -> list[str]:
    """The paints of ten or more cars: two of three are dark."""
    return [*PAINTS, *DARK, *DARK]


def dim_studio(rng: np.random.Generator, studio: Studio, car: Car) -> Studio:
    """The room in light that hides the car: its floor is about as bright as the paint, its wall often dark."""
    paint = float(np.mean(car.paint[:3]))
    floor = min(max(1.6 * paint * rng.uniform(0.6, 1.8) + 0.01, 0.025), 0.45) / 0.2
    wall = rng.uniform(0.2, 0.7) if paint < 0.15 else rng.uniform(0.5, 1.3)
    edge = rng.uniform(0.3, 1.0)  # how far up the wall the floor's darkness reaches
    light = studio.light * np.where(studio.ground, floor, edge * floor + (1 - edge) * wall if floor < wall else wall)
    return studio._replace(light=light.astype(np.float32))


def average(samples: ndarray) -> ndarray:
    """The camera's filter: a tent of 3x3 samples, (2h + 1, 2w + 1, ...) to (h, w, ...)."""
    for axis in (0, 1):
        samples = np.moveaxis(samples, axis, 0)
        samples = np.moveaxis(0.25 * (samples[:-2:2] + 2 * samples[1:-1:2] + samples[2::2]), 0, axis)
    return samples


def blur(values: ndarray, radius: int) -> ndarray:
    """(H, W, C) float32 after two box filters of 2 * radius + 1 pixels along both axes; edges repeat."""
    for _ in range(4):  # an axis at a time
        padded = np.pad(values, ((radius, radius + 1), (0, 0), (0, 0)), mode="edge")
        total, means = padded[: 2 * radius + 1].sum(0), np.empty_like(values)
        for row, mean in enumerate(means):
            mean[:] = total
            total += padded[row + 2 * radius + 1] - padded[row]
        values = np.ascontiguousarray(means.swapaxes(0, 1)) / np.float32(2 * radius + 1)
    return values


def draw(quads: ndarray, screen: ndarray, colors: ndarray, shape: tuple[int, int]) -> ndarray:
    """(H, W, 4) float32: colours, 0 where there is nothing, and cover; one sample per pixel."""
    zbuffer, layer = np.zeros(shape, np.float32), np.zeros((*shape, 3), np.float32)
    rasterise(quads, screen, colors, zbuffer, layer)
    return np.concatenate([layer, (zbuffer > 0)[..., None]], 2, dtype=np.float32)


def add_reflection(rng: np.random.Generator, picture: ndarray, scene: Car, studio: Studio, turn: float) -> None:
    """Mirror everything in the floor, in place."""
    strength, soft = rng.uniform(0.15, 0.7), int(rng.integers(1, max(3, picture.shape[0] // 100)))
    mirrored = scene._replace(points=scene.points * np.array([[1], [1], [-1]], np.float32))
    colors = shade_vertices(scene, turn, below=True)
    image = blur(draw(scene.quads[:, ::-1].copy(), project(mirrored, studio, turn), colors, studio.light.shape), soft)
    share = strength * studio.ground[..., None]
    picture += share * (image[..., :3] - 0.6 * image[..., 3:] * picture)


def add_shadow(rng: np.random.Generator, picture: ndarray, scene: Car, studio: Studio, turn: float) -> None:
    """The shadow of everything in the light of one lamp, hard or soft, on the floor, in place."""
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.4)
    strength, soft = rng.uniform(0.2, 0.75), int(rng.integers(1, max(3, picture.shape[0] // 50)))
    x, y, z = scene.points
    flat = np.stack([x + slope * math.cos(angle) * z, y + slope * math.sin(angle) * z, np.zeros_like(z)])
    both = np.concatenate([scene.quads, scene.quads[:, ::-1]])  # either side casts it
    screen = project(scene._replace(points=flat), studio, turn)
    cover = draw(both, screen, np.zeros((len(x), 3), np.float32), studio.light.shape)[..., 3:]
    picture *= 1 - strength * blur(cover, soft) * studio.ground[..., None]


def render_hard_pair(
    car: Car, studio: Studio, turn: float, rng: np.random.Generator, parts: bool = False
) -> tuple[ndarray, ndarray]:
    """Render one view of a car among clutter.

    Args:
        car: of `make_car`.
        studio: of `dim_studio`.
        turn: angle of the turntable, radians.
        rng: decides clutter, lamps, reflectance, exposure, white balance and grain.
        parts: draw a mask of the classes `PARTS`; a thing counts as the ground or wall behind it.

    Returns:
        (H, W, 3) uint8 image and (H, W) uint8 mask, as `render_pair`: what of the car nothing hides.
    """
    height, width = studio.light.shape
    scene = place_clutter(rng, car, turn)
    picture = np.repeat(studio.light[..., None], 3, axis=2)
    picture.reshape(-1, 3)[studio.floor] *= cast_shadow(car, studio, turn)
    for _ in range(rng.integers(0, 3)):
        add_shadow(rng, picture, scene, studio, turn)
    if rng.random() < 0.8:
        add_reflection(rng, picture, scene, studio, turn)
    screen, colors = 2 * project(scene, studio, turn), shade_vertices(scene, turn)
    zbuffer = np.zeros((2 * height + 1, 2 * width + 1), np.float32)
    layer = np.empty((*zbuffer.shape, 3), np.float32)
    rasterise(car.quads, screen, colors, zbuffer, layer)
    own = zbuffer.copy()
    rasterise(scene.quads[len(car.quads) :], screen, colors, zbuffer, layer)
    own[zbuffer != own] = 0  # a thing is nearer
    gains = rng.uniform(0.7, 1.25) * rng.uniform((0.93, 1.0, 0.9), (1.08, 1.0, 1.1))
    noise = np.frombuffer(rng.bytes(height * width * 6), np.uint8).reshape(height, width, 6)
    image, _ = expose(picture, zbuffer, layer, 0, 0, gains, noise)
    mask = (average((own > 0).astype(np.float32)) >= 0.5).astype(np.uint8)
    if parts:
        zbuffer[:] = 0
        rasterise(car.quads, screen, np.ascontiguousarray(scene.parts.T), zbuffer, layer)
        mask *= np.uint8(2) + label_parts(own, layer)
        mask[(mask == 0) & ~studio.ground] = 1
    return image, mask
