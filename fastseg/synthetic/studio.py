"""Renders a car in a photo studio.

numpy shades the vertices; a z-buffer with 2x2 samples per pixel rasterises them. Coordinates are those of `car.py`.
Colours are linear light, 1 is white, until `expose` applies gamma.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from fastseg.runtime.kernels import njit
from fastseg.synthetic.car import Car

__all__ = ["PARTS", "Studio", "make_studio", "render_pair"]

PARTS = ("ground", "wall", "body", "windows", "wheels", "lights")

GRAIN = 2.2  # standard deviation, grey levels
DISTANCE, EYE_HEIGHT, PITCH = 6.5, 1.55, 0.115  # camera: metres from the car, metres above the floor, radians down
TABLE_RADIUS, WALL_RADIUS = 3.15, 5.6  # turntable and round wall, metres


class Studio(NamedTuple):
    """The empty room as the camera sees it, zoomed to one car."""

    light: ndarray  # (H, W) float32
    floor: ndarray  # (F,) flat indices into `light` of the floor around the car, which its shadow may reach
    floor_points: ndarray  # (2, F) float32: their x and y, metres
    focal: float  # pixels
    ground: ndarray  # (H, W) bool: floor and turntable; the rest is wall


def smoothstep(low: float, high: float, value: Any) -> Any:
    """0 up to `low`, 1 from `high` on, a cubic between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def make_studio(rng: np.random.Generator, car: Car, width: int = 1918, height: int = 1280) -> Studio:
    """A room with a round wall, lamps, a door and a turntable; the car's length decides the zoom."""
    focal = rng.uniform(0.95, 1.17) * min(width, 1.5 * height) * min(1.0, 5.0 / car.size[0])
    lamp, door, cloths = rng.random(3).tolist()
    right = (np.arange(width, dtype=np.float32) + 0.5 - 0.5 * width) / focal
    up = (0.5 * height - 0.5 - np.arange(height, dtype=np.float32)[:, None]) / focal
    dx, dy, dz = math.cos(PITCH) + up * math.sin(PITCH), -right, up * math.cos(PITCH) - math.sin(PITCH)
    # A ray meets the wall, a cylinder around the turntable, at distance `far`; the floor is nearer where z < 0.
    a, b = dx * dx + dy * dy, DISTANCE * dx
    far = (b + np.sqrt(np.maximum(b * b - a * (DISTANCE**2 - WALL_RADIUS**2), 0))) / a
    azimuth, z = np.arctan2(far * dy, far * dx - DISTANCE), EYE_HEIGHT + far * dz
    shine = 0.30 - 0.12 * azimuth**2
    light = shine + 0.50 * smoothstep(-0.2, 2.8, z) + 0.02 * np.sin(azimuth * 23)
    light += 0.25 * smoothstep(0.9, 0, (azimuth - 1.2 * (lamp - 0.5)) ** 2 * 6 + (z - 2.6) ** 2)
    panel = np.abs(azimuth * 2.6 % 1 - 0.5)
    light *= 1 - 0.22 * smoothstep(0.012, 0.004, panel)
    dark = 0.10 - np.abs(azimuth - 0.75 * (door - 0.5))
    if cloths > 0.4:  # black cloths that keep stray light from the paint
        dark = np.maximum(dark, 0.125 - np.abs(np.abs(azimuth + 0.05) - 0.62))
    light *= 1 - 0.9 * smoothstep(-0.005, 0.005, dark) * smoothstep(2.15, 2.12, z) * smoothstep(0, 0.05, z)
    light *= 1 - 0.6 * smoothstep(3.0, 3.05, z)
    light += 1.2 * smoothstep(3.05, 3.08, z) * smoothstep(3.33, 3.30, z) * smoothstep(0.10, 0.11, panel)

    near = EYE_HEIGHT / np.maximum(-dz, 1e-3)
    x, y = np.broadcast_arrays(near * dx - DISTANCE, near * dy)
    distance = np.hypot(x, y)
    floor = np.where(distance < TABLE_RADIUS, 0.20, 0.17 + 0.10 * smoothstep(1, 5, distance))
    floor *= 1 + 0.05 * np.sin(3 * x + 2 * np.sin(2 * y)) * np.sin(4 * y + np.sin(3 * x))
    floor *= 1 - 0.6 * smoothstep(0.025, 0.01, np.abs(distance - TABLE_RADIUS))
    floor += 0.16 * smoothstep(2.5, 0, (x - 2.5) ** 2 * 0.5 + (y + 2 * (lamp - 0.5)) ** 2)  # reflection of a lamp
    floor *= 1 + 0.09 * rng.standard_normal(floor.shape, np.float32)
    floor += smoothstep(WALL_RADIUS - 0.7, WALL_RADIUS, distance) * (shine - floor)  # the floor curves up
    light = np.where(z > 0, light, floor).astype(np.float32)
    shaded = np.flatnonzero((z <= 0) & (distance < 0.5 * car.size[0] + 1.2))
    return Studio(light, shaded, np.stack([x.ravel()[shaded], y.ravel()[shaded]]).astype(np.float32), focal, z <= 0)


def cast_shadow(car: Car, studio: Studio, turn: float) -> ndarray:
    """(F, 3) float32 factors of the floor's light: dark under the car, darkest at the tyres, tinted by the paint."""
    x, y = studio.floor_points
    x, y = x * math.cos(turn) + y * math.sin(turn), np.abs(y * math.cos(turn) - x * math.sin(turn))
    beside, ahead = y - 0.5 * car.size[1] + 0.3, np.abs(x) - 0.5 * car.size[0] + 0.45
    gap = np.hypot(np.maximum(ahead, 0), np.maximum(beside, 0)) + np.minimum(np.maximum(ahead, beside), 0)
    ahead = np.maximum(np.minimum(np.abs(x - car.axles[0]), np.abs(x - car.axles[1])) - 0.1, 0)
    tyre = np.hypot(ahead, np.maximum(np.abs(beside - 0.12) - 0.08, 0))
    left = (1 - 0.80 * smoothstep(0.75, -0.25, gap)) * (1 - 0.7 * smoothstep(0.22, 0.02, tyre))
    return left[:, None] + 0.2 * smoothstep(1.5, 0.3, gap)[:, None] * np.array(car.paint[:3], np.float32)


def environment_light(x: ndarray, y: ndarray, z: ndarray) -> ndarray:
    """Light of the room from a direction (unit vector), for reflections in paint and glass."""
    room = 0.30 + 0.50 * smoothstep(0.0, 0.12, z) - 0.35 * smoothstep(0.3, 0.75, z)
    pillars = np.abs(np.abs(y / np.hypot(x, y + 1e-6) - 0.3) - 0.35)
    room *= 1 - 0.6 * smoothstep(0.10, 0.06, pillars) * smoothstep(0.5, 0.4, z)
    high = np.maximum(z, 0.1)  # two long soft boxes on the ceiling
    boxes = smoothstep(0.55, 0.45, np.abs(np.abs(y / high - 0.2) - 1.1)) * smoothstep(2.4, 2.1, np.abs(x / high))
    return np.where(z > 0, room + 1.5 * smoothstep(0.15, 0.25, z) * boxes, 0.16 + 0.12 * smoothstep(-0.25, 0, z))


def project(car: Car, studio: Studio, turn: float) -> ndarray:
    """(V, 3) float32 of the vertices: x and y on the picture, pixels from its corner, and 1 / depth, 1 / metres."""
    height, width = studio.light.shape
    x, y, z = car.points
    ahead, rise = math.cos(turn) * x - math.sin(turn) * y + DISTANCE, z - EYE_HEIGHT
    inverse_depth = 1 / (ahead * math.cos(PITCH) - rise * math.sin(PITCH))
    across = 0.5 * width - studio.focal * (math.sin(turn) * x + math.cos(turn) * y) * inverse_depth
    down = 0.5 * height - studio.focal * (ahead * math.sin(PITCH) + rise * math.cos(PITCH)) * inverse_depth
    return np.stack([across, down, inverse_depth], 1)


def shade_vertices(car: Car, turn: float, *, below: bool = False) -> ndarray:
    """(V, 3) float32 colours of the vertices as the camera sees them; 0 for those that face away.

    Args:
        below: as the camera's mirror image under the floor sees them.
    """
    cos, sin = math.cos(turn), math.sin(turn)
    eye_height = -EYE_HEIGHT if below else EYE_HEIGHT
    x, y, z = (eye - axis for eye, axis in zip((-DISTANCE * cos, DISTANCE * sin, eye_height), car.points, strict=True))
    facing = (x * car.normals[0] + y * car.normals[1] + z * car.normals[2]) / np.sqrt(x * x + y * y + z * z)
    seen = np.flatnonzero(facing > -0.2)  # a visible quad may have a vertex that faces away
    x, y, z, facing = x[seen], y[seen], z[seen], np.maximum(facing[seen], 0)
    scale = 1 / np.sqrt(x * x + y * y + z * z)
    nx, ny, nz = car.normals[:, seen]
    x, y, z = 2 * facing * nx - x * scale, 2 * facing * ny - y * scale, 2 * facing * nz - z * scale
    light = environment_light(x * cos - y * sin, x * sin + y * cos, z)
    # Schlick's approximation, weaker on matt surfaces. Near the floor the car occludes the room.
    red, green, blue, reflectance, metal = car.materials[:, seen]
    open_sky, grazing = smoothstep(-0.15, 0.75, car.points[2, seen]), (1 - facing) ** 2
    fresnel = reflectance + (1 - reflectance) * np.minimum(12 * reflectance, 1) * grazing * grazing * (1 - facing)
    gloss = fresnel * light * open_sky
    # The ceiling is bright, the floor dim, one side slightly brighter. Metallic paint reflects in its own colour.
    diffuse = (0.60 + 0.375 * nz + 0.18 * (nx * sin + ny * cos)) * open_sky * (1 - metal) + 1.1 * metal * light
    colors = np.zeros((car.points.shape[1], 3), np.float32)
    colors[seen] = np.stack([color * diffuse + gloss for color in (red, green, blue)], 1)
    return colors


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def rasterise(quads: ndarray, screen: ndarray, colors: ndarray, zbuffer: ndarray, layer: ndarray) -> None:
    """Draw quads into a z-buffer; colours are interpolated between the vertices.

    Args:
        quads: (Q, 4) indices of vertices.
        screen: (V, 3) float32: x and y in samples, 1 / depth.
        colors: (V, 3) float32.
        zbuffer: (h, w) float32 zeros, written: 1 / depth, 0 where there is no quad.
        layer: (h, w, 3) float32, written where there is a quad: colour.
    """
    height, width = zbuffer.shape
    for q in range(len(quads)):
        i = quads[q, 0]
        x0, y0 = screen[i, 0], screen[i, 1]
        for half in range(1, 3):
            j, k = quads[q, half], quads[q, half + 1]
            x1, y1, x2, y2 = screen[j, 0], screen[j, 1], screen[k, 0], screen[k, 1]
            area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
            if area >= 0.0:  # faces away (y points down on the screen)
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
                    inverse_depth = b0 * screen[i, 2] + b1 * screen[j, 2] + b2 * screen[k, 2]
                    if inverse_depth > zbuffer[y, x]:
                        zbuffer[y, x] = inverse_depth
                        for c in range(3):
                            layer[y, x, c] = b0 * colors[i, c] + b1 * colors[j, c] + b2 * colors[k, c]


@njit(cache=True, nogil=True, fastmath=True)
def expose(
    picture: ndarray, zbuffer: ndarray, layer: ndarray, left: int, top: int, gains: ndarray, noise: ndarray
) -> tuple[ndarray, ndarray]:
    """The camera: composites the car over the room, then vignette, exposure, gamma 2, grain.

    Args:
        picture: (H, W, 3) float32, the room without the car.
        zbuffer, layer: of `rasterise`, 2x2 samples per pixel, the first at the corner of pixel (top, left).
        left, top: pixels.
        gains: (3,) factors of red, green and blue.
        noise: (H, W, 6) uint8, uniform: three values for grain that the colours share, one for each colour's own. The
            sum of four is nearly normal.

    Returns:
        (H, W, 3) uint8 image; (H, W) uint8 mask, 1 where the car covers at least half of the pixel.
    """
    height, width, _ = picture.shape
    image, mask = np.empty((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    for row in range(height):
        for column in range(width):
            # A tent filter over 3x3 samples, centred on the pixel.
            y, x, cover, red, green, blue = 2 * (row - top), 2 * (column - left), 0.0, 0.0, 0.0, 0.0
            if 0 <= y < zbuffer.shape[0] - 2 and 0 <= x < zbuffer.shape[1] - 2:
                for i in range(y, y + 3):
                    for j in range(x, x + 3):
                        if zbuffer[i, j] > 0:
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
                value += (grain + noise[row, column, 3 + k]) * (GRAIN / 148.0)  # 148: standard deviation of the sum
                image[row, column, k] = min(max(value + 0.5, 0.0), 255.0)
    return image, mask


def render_pair(
    car: Car, studio: Studio, turn: float, rng: np.random.Generator, parts: bool = False
) -> tuple[ndarray, ndarray]:
    """Render one view of a car.

    Args:
        car: of `make_car`.
        studio: of `make_studio`, which also decides the size of the image.
        turn: angle of the turntable, radians; at 0 the camera sees the tail.
        rng: decides exposure, white balance and grain.
        parts: draw a mask of the classes `PARTS`.

    Returns:
        (H, W, 3) uint8 image and (H, W) uint8 mask: 0 and 1, the car's exact outline without its shadow; or the number
        of each pixel's part, of which the last four are the same outline.
    """
    height, width = studio.light.shape
    picture = np.repeat(studio.light[..., None], 3, axis=2)
    picture.reshape(-1, 3)[studio.floor] *= cast_shadow(car, studio, turn)
    across, down, inverse_depth = project(car, studio, turn).T
    left, top = max(0, int(across.min()) - 1), max(0, int(down.min()) - 1)
    right, bottom = min(width, int(across.max()) + 2), min(height, int(down.max()) + 2)
    shape = 2 * (bottom - top) + 1, 2 * (right - left) + 1
    zbuffer, layer = np.zeros(shape, np.float32), np.empty((*shape, 3), np.float32)
    screen = np.stack([2 * (across - left), 2 * (down - top), inverse_depth], 1)
    rasterise(car.quads, screen, shade_vertices(car, turn), zbuffer, layer)
    gains = rng.uniform(0.9, 1.1) * rng.uniform((0.98, 1.0, 0.96), (1.04, 1.0, 1.04))
    noise = np.frombuffer(rng.bytes(height * width * 6), np.uint8).reshape(height, width, 6)
    image, mask = expose(picture, zbuffer, layer, left, top, gains, noise)
    if parts:
        zbuffer[:] = 0
        rasterise(car.quads, screen, np.ascontiguousarray(car.parts.T), zbuffer, layer)
        box = (slice(top, bottom), slice(left, right))
        mask[box] *= np.uint8(2) + label_parts(zbuffer, layer)
        mask[(mask == 0) & ~studio.ground] = 1
    return image, mask


def label_parts(zbuffer: ndarray, weights: ndarray) -> ndarray:
    """The part that covers most of each pixel of the car, by the camera's filter: 0 body, 1 window, 2 wheel, 3 light.

    Args:
        zbuffer, weights: of `rasterise`, with the vertices' parts in place of their colours.

    Returns:
        (h, w) uint8; 0 where there is no car.
    """
    covered = zbuffer > 0
    weights = np.where(covered[..., None], weights, 0)
    samples = np.concatenate([covered[..., None] - weights.sum(2, keepdims=True), weights], 2)
    for axis in (0, 1):  # the tent of 3x3 samples of `expose`
        samples = np.moveaxis(samples, axis, 0)
        samples = 0.5 * samples[:-2:2] + samples[1:-1:2] + 0.5 * samples[2::2]
        samples = np.moveaxis(samples, 0, axis)
    labels: ndarray = samples.argmax(2).astype(np.uint8)
    return labels
