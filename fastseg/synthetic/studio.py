"""A photo studio and its camera: lights a car's mesh and draws it, for the pictures of `carvana_like`.

numpy lights the vertices, a z-buffer with two samples per pixel each way draws them. Metres as in `carvana_car`.
Colours are linear light, 1 is white, until the last kernel.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy import ndarray

from fastseg.synthetic.car import Car

__all__ = ["Studio", "make_studio", "render_pair"]

GRAIN = 2.2  # grey levels, standard deviation
DISTANCE, EYE_HEIGHT, PITCH = 6.5, 1.55, 0.115  # the camera: metres from the car, metres up, radians down
TABLE_RADIUS, WALL_RADIUS = 3.15, 5.6  # metres: the turntable, the round wall


class Studio(NamedTuple):
    """The empty room, seen by a camera zoomed to one car."""

    light: ndarray  # (H, W) float32
    floor: ndarray  # (F,) flat indices into `light`: where a shadow may fall
    spots: ndarray  # (2, F) float32: x, y of those on the floor, metres
    focal: float  # pixels


def step(low: float, high: float, value: Any) -> Any:
    """0 at `low`, 1 at `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def make_studio(rng: np.random.Generator, car: Car, width: int = 1918, height: int = 1280) -> Studio:
    """A room with a round wall, lamps, a door and a turntable in the floor, zoomed to the car's length."""
    focal = rng.uniform(0.95, 1.17) * min(width, 1.5 * height) * min(1.0, 5.0 / car.size[0])
    lamp, door, cloths = rng.random(3).tolist()
    right = (np.arange(width, dtype=np.float32) + 0.5 - 0.5 * width) / focal
    up = (0.5 * height - 0.5 - np.arange(height, dtype=np.float32)[:, None]) / focal
    dx, dy, dz = math.cos(PITCH) + up * math.sin(PITCH), -right, up * math.cos(PITCH) - math.sin(PITCH)
    # A ray meets the wall, a cylinder about the turntable, at `far`, and the floor before that where z is negative.
    a, b = dx * dx + dy * dy, DISTANCE * dx
    far = (b + np.sqrt(np.maximum(b * b - a * (DISTANCE**2 - WALL_RADIUS**2), 0))) / a
    azimuth, z = np.arctan2(far * dy, far * dx - DISTANCE), EYE_HEIGHT + far * dz
    shine = 0.30 - 0.12 * azimuth**2
    light = shine + 0.50 * step(-0.2, 2.8, z) + 0.02 * np.sin(azimuth * 23)
    light += 0.25 * step(0.9, 0, (azimuth - 1.2 * (lamp - 0.5)) ** 2 * 6 + (z - 2.6) ** 2)
    panel = np.abs(azimuth * 2.6 % 1 - 0.5)
    light *= 1 - 0.22 * step(0.012, 0.004, panel)
    dark = 0.10 - np.abs(azimuth - 0.75 * (door - 0.5))
    if cloths > 0.4:  # black cloths keep stray light off the paint
        dark = np.maximum(dark, 0.125 - np.abs(np.abs(azimuth + 0.05) - 0.62))
    light *= 1 - 0.9 * step(-0.005, 0.005, dark) * step(2.15, 2.12, z) * step(0, 0.05, z)
    light *= 1 - 0.6 * step(3.0, 3.05, z)
    light += 1.2 * step(3.05, 3.08, z) * step(3.33, 3.30, z) * step(0.10, 0.11, panel)

    near = EYE_HEIGHT / np.maximum(-dz, 1e-3)
    x, y = np.broadcast_arrays(near * dx - DISTANCE, near * dy)
    distance = np.hypot(x, y)
    floor = np.where(distance < TABLE_RADIUS, 0.20, 0.17 + 0.10 * step(1, 5, distance))
    floor *= 1 + 0.05 * np.sin(3 * x + 2 * np.sin(2 * y)) * np.sin(4 * y + np.sin(3 * x))
    floor *= 1 - 0.6 * step(0.025, 0.01, np.abs(distance - TABLE_RADIUS))
    floor += 0.16 * step(2.5, 0, (x - 2.5) ** 2 * 0.5 + (y + 2 * (lamp - 0.5)) ** 2)  # the lamp's reflection
    floor *= 1 + 0.09 * rng.standard_normal(floor.shape, np.float32)
    floor += step(WALL_RADIUS - 0.7, WALL_RADIUS, distance) * (shine - floor)  # the floor curves up
    light = np.where(z > 0, light, floor).astype(np.float32)
    shaded = np.flatnonzero((z <= 0) & (distance < 0.5 * car.size[0] + 1.2))
    return Studio(light, shaded, np.stack([x.ravel()[shaded], y.ravel()[shaded]]).astype(np.float32), focal)


def cast_shadow(car: Car, studio: Studio, turn: float) -> ndarray:
    """(F, 3) float32 factors of the floor's light: little under the car, least at a tyre, a tint of paint around."""
    x, y = studio.spots
    x, y = x * math.cos(turn) + y * math.sin(turn), np.abs(y * math.cos(turn) - x * math.sin(turn))
    beside, ahead = y - 0.5 * car.size[1] + 0.3, np.abs(x) - 0.5 * car.size[0] + 0.45
    gap = np.hypot(np.maximum(ahead, 0), np.maximum(beside, 0)) + np.minimum(np.maximum(ahead, beside), 0)
    ahead = np.maximum(np.minimum(np.abs(x - car.axles[0]), np.abs(x - car.axles[1])) - 0.1, 0)
    tyre = np.hypot(ahead, np.maximum(np.abs(beside - 0.12) - 0.08, 0))
    left = (1 - 0.80 * step(0.75, -0.25, gap)) * (1 - 0.7 * step(0.22, 0.02, tyre))
    return left[:, None] + 0.2 * step(1.5, 0.3, gap)[:, None] * np.array(car.paint[:3], np.float32)


def mirrored_light(x: ndarray, y: ndarray, z: ndarray) -> ndarray:
    """What paint and glass mirror: the light of the room from a direction (unit vector)."""
    room = 0.30 + 0.50 * step(0.0, 0.12, z) - 0.35 * step(0.3, 0.75, z)
    room *= 1 - 0.6 * step(0.10, 0.06, np.abs(np.abs(y / np.hypot(x, y + 1e-6) - 0.3) - 0.35)) * step(0.5, 0.4, z)
    high = np.maximum(z, 0.1)  # two long soft boxes on the ceiling
    boxes = step(0.55, 0.45, np.abs(np.abs(y / high - 0.2) - 1.1)) * step(2.4, 2.1, np.abs(x / high))
    return np.where(z > 0, room + 1.5 * step(0.15, 0.25, z) * boxes, 0.16 + 0.12 * step(-0.25, 0, z))


def light_car(car: Car, turn: float) -> ndarray:
    """(V, 3) float32 colours of the vertices as the camera sees them; 0 for those far on the other side."""
    cos, sin = math.cos(turn), math.sin(turn)
    x, y, z = (eye - axis for eye, axis in zip((-DISTANCE * cos, DISTANCE * sin, EYE_HEIGHT), car.points, strict=True))
    facing = (x * car.normals[0] + y * car.normals[1] + z * car.normals[2]) / np.sqrt(x * x + y * y + z * z)
    seen = np.flatnonzero(facing > -0.2)  # a facet in sight may have a corner that is turned away
    x, y, z, facing = x[seen], y[seen], z[seen], np.maximum(facing[seen], 0)
    scale = 1 / np.sqrt(x * x + y * y + z * z)
    nx, ny, nz = car.normals[:, seen]
    x, y, z = 2 * facing * nx - x * scale, 2 * facing * ny - y * scale, 2 * facing * nz - z * scale
    light = mirrored_light(x * cos - y * sin, x * sin + y * cos, z)
    # Schlick's law, weaker on matt surfaces; near the floor the car itself hides the room.
    red, green, blue, mirror, metal = car.materials[:, seen]
    open_sky, grazing = step(-0.15, 0.75, car.points[2, seen]), (1 - facing) ** 2
    gloss = (mirror + (1 - mirror) * np.minimum(12 * mirror, 1) * grazing * grazing * (1 - facing)) * light * open_sky
    # A bright ceiling, a dim floor, one side a little brighter; metallic paint mirrors in its own colour.
    diffuse = (0.60 + 0.375 * nz + 0.18 * (nx * sin + ny * cos)) * open_sky * (1 - metal) + 1.1 * metal * light
    colors = np.zeros((car.points.shape[1], 3), np.float32)
    colors[seen] = np.stack([color * diffuse + gloss for color in (red, green, blue)], 1)
    return colors


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def draw_facets(quads: ndarray, screen: ndarray, colors: ndarray, depth: ndarray, layer: ndarray) -> None:
    """z-buffer with colours mixed of the corners'.

    Args:
        quads: (Q, 4) vertices.
        screen: (V, 3) float32: x, y in samples, 1 / distance.
        colors: (V, 3) float32.
        depth, layer: (h, w) zeros and (h, w, 3), filled in place: 1 / distance, and colour where that is not 0.
    """
    height, width = depth.shape
    for q in range(len(quads)):
        i = quads[q, 0]
        x0, y0 = screen[i, 0], screen[i, 1]
        for half in range(1, 3):
            j, k = quads[q, half], quads[q, half + 1]
            x1, y1, x2, y2 = screen[j, 0], screen[j, 1], screen[k, 0], screen[k, 1]
            area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
            if area >= 0.0:  # turned away (y points down on the screen)
                continue
            top, bottom = max(0, math.ceil(min(y0, y1, y2))), min(height - 1, math.floor(max(y0, y1, y2)))
            left, right = max(0, math.ceil(min(x0, x1, x2))), min(width - 1, math.floor(max(x0, x1, x2)))
            for y in range(top, bottom + 1):
                for x in range(left, right + 1):
                    b0, b1 = (x1 - x) * (y2 - y) - (x2 - x) * (y1 - y), (x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)
                    b2 = (x0 - x) * (y1 - y) - (x1 - x) * (y0 - y)
                    if b0 > 0.0 or b1 > 0.0 or b2 > 0.0:
                        continue
                    scale = 1.0 / (b0 + b1 + b2)
                    b0, b1, b2 = b0 * scale, b1 * scale, b2 * scale
                    near = b0 * screen[i, 2] + b1 * screen[j, 2] + b2 * screen[k, 2]
                    if near > depth[y, x]:
                        depth[y, x] = near
                        for c in range(3):
                            layer[y, x, c] = b0 * colors[i, c] + b1 * colors[j, c] + b2 * colors[k, c]


@numba.njit(cache=True, nogil=True, fastmath=True)
def expose(
    picture: ndarray, depth: ndarray, layer: ndarray, left: int, top: int, gains: ndarray, noise: ndarray
) -> tuple[ndarray, ndarray]:
    """The camera: car over backdrop, vignette, exposure, gamma 2, grain.

    Args:
        picture: (H, W, 3) float32 without the car.
        depth, layer: of `draw_facets`, two samples per pixel each way, the first at the corner of pixel (top, left).
        gains: (3,) of the colours.
        noise: (H, W, 6) uint8, uniform: three for the grain of all colours, one for each colour's own.

    Returns:
        (H, W, 3) uint8 image; (H, W) uint8 mask, 1 where the car covers half of the pixel or more.
    """
    height, width, _ = picture.shape
    image, mask = np.empty((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    for row in range(height):
        for column in range(width):
            # A tent over 3x3 samples, the middle one in the middle of the pixel: half covered means that one is.
            y, x, cover, red, green, blue = 2 * (row - top), 2 * (column - left), 0.0, 0.0, 0.0, 0.0
            if 0 <= y < depth.shape[0] - 2 and 0 <= x < depth.shape[1] - 2:
                for i in range(y, y + 3):
                    for j in range(x, x + 3):
                        if depth[i, j] > 0:
                            weight = (0.5 if i == y + 1 else 0.25) * (0.5 if j == x + 1 else 0.25)
                            cover, red = cover + weight, red + weight * layer[i, j, 0]
                            green, blue = green + weight * layer[i, j, 1], blue + weight * layer[i, j, 2]
            mask[row, column] = cover >= 0.5
            u, v, grain = column / width - 0.5, row / height - 0.5, -510.0
            vignette = 1.0 - 0.9 * (u * u + v * v)
            for k in range(3):
                grain += noise[row, column, k]
            for k in range(3):
                light = picture[row, column, k] * (1.0 - cover) + (red if k == 0 else green if k == 1 else blue)
                value = 255.0 * math.sqrt(max(light * gains[k] * vignette, 0.0))
                value += (grain + noise[row, column, 3 + k]) * (GRAIN / 148.0)  # four uniform numbers are nearly normal
                image[row, column, k] = min(max(value + 0.5, 0.0), 255.0)
    return image, mask


def render_pair(car: Car, studio: Studio, turn: float, rng: np.random.Generator) -> tuple[ndarray, ndarray]:
    """One view of a car.

    Args:
        car, studio: of `make_car` and `make_studio`; the studio says how large the picture is.
        turn: angle of the turntable, radians; at 0 the camera sees the tail.
        rng: exposure, white balance and grain.

    Returns:
        (H, W, 3) uint8 image and (H, W) uint8 mask of 0 and 1: the car's exact outline, without its shadow.
    """
    height, width = studio.light.shape
    picture = np.repeat(studio.light[..., None], 3, axis=2)
    picture.reshape(-1, 3)[studio.floor] *= cast_shadow(car, studio, turn)
    x, y, z = car.points
    ahead, rise = math.cos(turn) * x - math.sin(turn) * y + DISTANCE, z - EYE_HEIGHT
    near = 1 / (ahead * math.cos(PITCH) - rise * math.sin(PITCH))
    across = 0.5 * width - studio.focal * (math.sin(turn) * x + math.cos(turn) * y) * near
    down = 0.5 * height - studio.focal * (ahead * math.sin(PITCH) + rise * math.cos(PITCH)) * near
    left, top = max(0, int(across.min()) - 1), max(0, int(down.min()) - 1)
    right, bottom = min(width, int(across.max()) + 2), min(height, int(down.max()) + 2)
    shape = 2 * (bottom - top) + 1, 2 * (right - left) + 1
    depth, layer = np.zeros(shape, np.float32), np.empty((*shape, 3), np.float32)
    screen = np.stack([2 * (across - left), 2 * (down - top), near], 1)
    draw_facets(car.quads, screen, light_car(car, turn), depth, layer)
    gains = rng.uniform(0.9, 1.1) * rng.uniform((0.98, 1.0, 0.96), (1.04, 1.0, 1.04))
    noise = np.frombuffer(rng.bytes(height * width * 6), np.uint8).reshape(height, width, 6)
    return expose(picture, depth, layer, left, top, gains, noise)
