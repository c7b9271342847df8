"""Carvana-like pairs: cars in a photo studio, turned through 16 views, with exact masks.

Carvana's rules forbid passing its pictures on, so tests, benchmarks and the demo use these: the same size, file
parameters, names and views, and cars that no threshold finds. They say nothing about accuracy on real photos.

    fastseg synth --out data --cars 6 --views 16 --seed 0

A car is a mesh so fine (`STEP`) that it needs no textures: numpy paints and lights its vertices, a z-buffer with two
samples per pixel each way draws it. Metres; x forward, y left, z up from the floor under the car's middle; a "share" is
one of the car's length, from nose to tail. Colours are linear light, 1 is white, until the last kernel.
"""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import reduce
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numba
import numpy as np
import simplejpeg
from numpy import ndarray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from fastseg.errors import ConfigError, DataError

__all__ = ["PAINTS", "STYLES", "encode_image", "encode_mask", "generate", "make_car", "make_studio", "render_pair"]

STEP = 0.010  # metres between vertices: about four pixels of a full-size picture
JPEG_QUALITY = 55  # its luma table starts 14 10 9 14 22 36 46 55, as Carvana's does
GRAIN = 2.2  # grey levels, standard deviation
DISTANCE, EYE_HEIGHT, PITCH = 6.5, 1.55, 0.115  # the camera: metres from the car, metres up, radians down
TABLE_RADIUS, WALL_RADIUS = 3.15, 5.6  # metres: the turntable, the round wall
DECK_SHARES = (0.0, 0.03, 0.22, 0.5, 0.8, 0.97, 1.0)
# fmt: off
# Side views. Metres: (length, width, wheel radius); heights of bonnet, belt line and boot at DECK_SHARES;
# (share, height) of the roof from the foot of the windscreen to that of the rear window. Shares: front and rear axle;
# top of the windscreen and of the rear window; gaps of the doors.
STYLES: dict[str, tuple[Any, ...]] = {
    "sedan": ((4.75, 1.84, 0.335), (0.58, 0.73, 0.92, 0.96, 1.02, 1.05, 0.85),
              ((0.24, 0.90), (0.42, 1.37), (0.54, 1.45), (0.68, 1.42), (0.87, 1.0)),
              (0.185, 0.785), (0.42, 0.70), (0.275, 0.49, 0.70)),
    "hatchback": ((4.10, 1.76, 0.31), (0.60, 0.75, 0.98, 1.0, 1.05, 1.05, 0.85),
                  ((0.20, 0.94), (0.39, 1.44), (0.55, 1.51), (0.86, 1.44), (0.99, 0.98)),
                  (0.18, 0.80), (0.39, 0.875), (0.26, 0.52, 0.73)),
    "suv": ((4.70, 1.92, 0.375), (0.72, 0.91, 1.10, 1.13, 1.16, 1.18, 0.95),
            ((0.21, 1.06), (0.36, 1.65), (0.5, 1.73), (0.88, 1.68), (0.985, 1.1)),
            (0.18, 0.79), (0.36, 0.905), (0.265, 0.48, 0.69)),
    "van": ((5.10, 1.97, 0.345), (0.62, 0.82, 1.06, 1.10, 1.11, 1.12, 0.9),
            ((0.13, 0.98), (0.33, 1.70), (0.46, 1.80), (0.92, 1.77), (0.99, 1.1)),
            (0.175, 0.78), (0.33, 0.945), (0.25, 0.44, 0.68)),
    "pickup": ((5.50, 1.97, 0.39), (0.80, 1.00, 1.15, 1.17, 1.19, 1.20, 0.9),
               ((0.21, 1.1), (0.34, 1.72), (0.44, 1.82), (0.575, 1.80), (0.635, 1.1)),
               (0.175, 0.765), (0.34, 0.59), (0.255, 0.43, 0.60)),
    "coupe": ((4.50, 1.87, 0.34), (0.56, 0.69, 0.85, 0.89, 0.97, 1.0, 0.8),
              ((0.27, 0.83), (0.46, 1.25), (0.57, 1.31), (0.68, 1.27), (0.92, 0.95)),
              (0.18, 0.79), (0.46, 0.70), (0.29, 0.60, 0.60)),
}
# Materials: red, green, blue, share of light mirrored head-on, share of the mirrored light that takes the colour.
PAINTS = {  # as on the road: mostly white, black and grey
    "white": (0.60, 0.60, 0.58, 0.045, 0.0), "pearl": (0.52, 0.54, 0.56, 0.045, 0.2),
    "silver": (0.42, 0.43, 0.44, 0.045, 0.5), "grey": (0.24, 0.245, 0.25, 0.045, 0.4),
    "charcoal": (0.08, 0.08, 0.085, 0.045, 0.4), "black": (0.012, 0.012, 0.014, 0.045, 0.1),
    "blue": (0.02, 0.05, 0.16, 0.045, 0.3), "red": (0.30, 0.012, 0.015, 0.045, 0.2),
    "beige": (0.44, 0.38, 0.29, 0.045, 0.4), "green": (0.03, 0.07, 0.05, 0.045, 0.3),
}
GAP, BLACK, TYRE = (0.004, 0.004, 0.004, 0.0, 0.0), (0.018, 0.018, 0.019, 0.02, 0.0), (0.016, 0.016, 0.017, 0.012, 0.0)
GLASS, SEAT, PLATE = (0.033, 0.037, 0.037, 0.075, 0.0), (0.006, 0.006, 0.006, 0.07, 0.0), (0.5, 0.5, 0.48, 0.04, 0.0)
CHROME, LAMP, TAIL = (0.34, 0.34, 0.35, 0.25, 0.5), (0.5, 0.51, 0.53, 0.35, 0.3), (0.22, 0.005, 0.007, 0.12, 0.2)
# fmt: on


class Car(NamedTuple):
    """A mesh of V vertices and Q facets."""

    points: ndarray  # (3, V) float32, metres
    normals: ndarray  # (3, V) float32, unit length, outward
    materials: ndarray  # (5, V) float32
    quads: ndarray  # (Q, 4) int32 vertices, anticlockwise seen from outside
    paint: tuple[float, ...]
    size: tuple[float, float]  # length, width, metres
    axles: tuple[float, ...]  # x, metres


class Studio(NamedTuple):
    """The empty room, seen by a camera zoomed to one car."""

    light: ndarray  # (H, W) float32
    floor: ndarray  # (F,) flat indices into `light`: where a shadow may fall
    spots: ndarray  # (2, F) float32: x, y of those on the floor, metres
    focal: float  # pixels


def smooth_curve(control: Any, share: ndarray) -> ndarray:
    """Height at `share`, through rounded control points ((share, height), ...)."""
    grid = np.linspace(-0.1, 1.1, 6001)
    height = np.interp(grid, *np.array(control).T)
    for width in (91, 91, 71):  # three box filters: nearly a Gaussian
        height = np.convolve(np.pad(height, width // 2, mode="edge"), np.ones(width) / width, "valid")
    return np.interp(share, grid, height)


def even_steps(parameter: ndarray, x: ndarray, y: ndarray) -> ndarray:
    """Values of the parameter of a curve (x, y), metres, that lie `STEP` apart on it."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    return np.interp(np.linspace(0, arc[-1], int(arc[-1] / STEP) + 2), arc, parameter)


def outline(share: ndarray) -> ndarray:
    """Half width of a car seen from above, as a share of its largest."""
    return (1 - np.abs(2 * share - 1) ** 6) ** (1 / 6)


def lengthwise(length: float, width: float) -> ndarray:
    """(rows, 1) shares in even steps along the outline of a car."""
    end = 0.5 * np.linspace(0, 1, 5000) ** 6  # the outline turns fast at the ends
    share = np.concatenate([end, 1 - end[::-1]])
    return even_steps(share, length * share, 0.5 * width * outline(share))[:, None]


def crosswise(sill: float, roundness: tuple[float, float], wide: float, tall: float) -> tuple[ndarray, ndarray]:
    """(columns,) y and z in [-1, 1], in even steps over a rounded rectangle; sill: angle of its ends, radians."""
    turn = np.linspace(sill, np.pi - sill, 20001)
    y, z = (np.sign(a) * np.abs(a) ** e for a, e in zip((np.cos(turn), np.sin(turn)), roundness, strict=True))
    at = even_steps(turn, wide * y, tall * z)
    return np.interp(at, turn, y), np.interp(at, turn, z)


def band(value: ndarray, centre: float, half_width: float) -> ndarray:
    """Metres inside the strip |value - centre| < half_width."""
    return half_width - np.abs(value - centre)


def within(*regions: ndarray) -> ndarray:
    """Metres inside all of the regions."""
    return reduce(np.minimum, regions)


def make_part(x: Any, y: Any, z: Any, material: Any, rules: Any = (), hole: Any = False) -> tuple[ndarray, ...]:
    """A surface over a grid, as (points, normals, materials, quads).

    Args:
        x, y, z: metres, broadcast to (rows, columns).
        material: of the whole.
        rules: (metres inside the region, negative outside; material) pairs, later ones over earlier ones.
        hole: where there is no surface.
    """
    points = np.stack(np.broadcast_arrays(x, y, z), 2).astype(float)
    rows, columns, _ = points.shape
    normals = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normals[0], normals[-1] = normals[1], normals[-2]  # an end row may be a point or a line, which has no normal
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-12)
    first = np.arange(rows * columns).reshape(rows, columns)[:-1, :-1]
    first = first[~np.broadcast_to(hole, (rows, columns))[:-1, :-1]]
    quads = np.stack([first, first + columns, first + columns + 1, first + 1], 1)
    if np.sum(normals * (points - points.mean((0, 1)))) < 0:
        normals, quads = -normals, quads[:, ::-1]
    materials = np.tile(np.array(material), (rows, columns, 1))
    for inside, other in rules:  # a border fades over one step: without that it would show the facets
        weight = np.broadcast_to(np.clip(0.5 + inside / STEP, 0, 1), (rows, columns))
        there = weight > 0
        materials[there] += weight[there, None] * (np.array(other) - materials[there])
    return points.reshape(-1, 3), normals.reshape(-1, 3), materials.reshape(-1, 5), quads


def make_ellipsoid(material: Any, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Any:
    """A mirror, an aerial."""
    polar, turn = np.linspace(0, np.pi, 40)[:, None], np.linspace(0, 2 * np.pi, 60)
    unit = np.cos(polar), np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn)
    x, y, z = (c + r * u for c, r, u in zip(centre, radii, unit, strict=True))
    return make_part(x, y, z, material)


def make_body(style: str, paint: Any, length: float, width: float, tall: float, strip: bool) -> list[Any]:
    """Everything below the windows but the wheels: sections across, from nose to tail."""
    (_, _, radius), heights, roof, axles, _, doors = STYLES[style]
    share = lengthwise(length, width)
    lateral, up = crosswise(-0.42 * np.pi, (2 / 5.5, 2 / 4.2), 0.9, 0.4)
    deck = smooth_curve(tuple(zip(DECK_SHARES, heights, strict=True)), share) * tall
    belly = 0.21 + 0.1 * radius + 0.06 * np.exp(-np.minimum(share, 1 - share) / 0.04)
    crease = 1 + 0.025 * np.exp(-(((up - 0.35) / 0.18) ** 2)) - 0.07 * np.clip(-up, 0, 1) ** 3
    x, z = (0.5 - share) * length, 0.5 * (deck + belly) + 0.5 * (deck - belly) * up
    y = 0.49 * width * outline(share) * (1 - 0.05 * (1 - share) ** 2) * lateral * crease

    front, rear, flank = x - 0.5 * length + 0.28, -0.5 * length + 0.21 - x, np.abs(y) - 0.42 * width
    nose, tail = 0.62 + 0.9 * (radius - 0.31), 0.80 + 1.5 * (radius - 0.31)
    grille = within(front, band(y, 0, 0.43), band(z, nose, 0.10))
    gaps = [(0.5 - door) * length for door in doors]
    to_arch = within(*(np.hypot(x - (0.5 - axle) * length, z - radius) for axle in axles)) - 1.17 * radius
    rules = [
        (0.33 - z, BLACK),
        (grille, GAP),
        (within(grille, (-0.2 - np.sin(160 * z)) / 160), CHROME),
        (within(front, band(y, 0, 0.70), band(z, 0.40, 0.05)), BLACK),
        (within(front, band(y, 0, 0.26), band(z, 0.47, 0.055)), PLATE),
        (within(front, np.abs(y) - 0.47, band(z, nose + 0.04, 0.075)), LAMP),
        (within(rear, np.abs(y) - 0.52, band(z, tail + 0.03, 0.09)), TAIL),
        (within(rear, band(y, 0, 0.26), band(z, tail, 0.06)), PLATE),
        (within(rear, band(z, 0.54, 0.012)), GAP),
        (within(flank, gaps[0] - x, x - gaps[2], band(z, 0.37, 0.006)), GAP),
        (within(-flank, z - nose, band(x, (0.488 - roof[0][0]) * length, 0.004)), GAP),
        (within(flank + 0.1, 0.02 - to_arch), BLACK),
    ]
    rules += [(within(flank, band(z, 0.54, 0.022)), BLACK)] if strip else []
    rules += [(within(flank, z - 0.36, band(x, gap, 0.004)), GAP) for gap in gaps]
    handle = np.multiply(paint, (0.5, 0.5, 0.5, 4, 1))
    rules += [(within(flank, band(x, gap + 0.13, 0.075), band(z, 2.5 * radius, 0.014)), handle) for gap in gaps[1:]]
    body = make_part(x, y, z, paint, rules, hole=within(flank + 0.1, -to_arch) > 0)
    # The dark that one sees through a wheel arch: a box between the wheels, and the body's far side from within.
    box = make_part(0.97 * x[::3], 0.8 * y[::3, ::3], (0.1 * belly + 0.9 * z - 0.03)[::3, ::3], BLACK)
    points, normals, materials, quads = make_part(x[::3], y[::3, ::3], z[::3, ::3], BLACK)
    return [body, box, (points, normals, materials, quads[:, ::-1])]


def make_cabin(style: str, paint: Any, length: float, width: float, tall: float) -> list[Any]:
    """Windows and roof: sections from the foot of the windscreen to that of the rear window, starting in the body."""
    _, heights, roof_points, _, glass, doors = STYLES[style]
    start, stop = roof_points[0][0], roof_points[-1][0]
    along = lengthwise(length * (stop - start), width)
    lateral, up = crosswise(0.0, (2 / 5, 2 / 4), 0.85, 0.7)
    share = start + (stop - start) * along
    belt = smooth_curve(tuple(zip(DECK_SHARES, heights, strict=True)), share) * tall
    roof = smooth_curve(roof_points, share) * tall
    z = belt - 0.14 + np.maximum(roof - belt + 0.14, 0.02) * up
    y = 0.465 * width * outline(along) * (1 - 0.06 * (2 * along - 1) ** 2) * lateral
    y = y * (1 - 0.32 * np.maximum(z - belt, 0))  # leans inwards
    flank, above, x = (np.abs(lateral) - 0.86) * 0.45 * width, z - belt - 0.03, (0.5 - share) * length
    foot, top, rear_top, rear_foot = ((0.5 - edge) * length for edge in (start, *glass, stop))
    window = within(flank, above, roof - z - 0.10, foot - 0.28 - x, x - rear_foot - 0.24)
    screen = np.maximum(within(foot - 0.02 - x, x - top - 0.07), within(rear_top - 0.07 - x, x - rear_foot - 0.04))
    rules = [(within(-flank, above, screen), GLASS), (window, GLASS)]
    for door, seat in ((doors[1], 0.12), (doors[2] + 0.012, 0.22)):
        pillar = (0.5 - door) * length
        back = 1 - (((x - pillar - seat) / 0.10) ** 4 + ((z - belt) / 0.24) ** 4) ** 0.25
        rules += [(within(window, 0.1 * back), SEAT), (within(window, band(x, pillar, 0.03)), BLACK)]
    return [make_part(x, y, z, paint, rules)]


def make_wheels(rng: np.random.Generator, radius: float, width: float, axles: tuple[float, ...]) -> list[Any]:
    """A profile (share of the radius, metres outwards from the tyre's middle) turned about the axles."""
    profile = [(0.0, 0.06), (0.2, 0.065), (0.5, 0.045), (0.62, 0.05), (0.68, 0.085), (0.7, 0.1), (0.75, 0.108)]
    profile += [(0.88, 0.112), (0.96, 0.1), (1, 0.075), (1, -0.09), (0.9, -0.11), (0.0, -0.11)]
    ring, out = np.array(profile).T
    corner = np.arange(len(ring))
    at = even_steps(corner, radius * ring, out)[:, None]
    ring, out = np.interp(at, corner, ring), np.interp(at, corner, out)
    turn, spokes = np.linspace(0, 2 * np.pi, 280), rng.integers(5, 11)
    parts = []
    for axle in axles:
        for side in (-1, 1):
            between = (0.4 - 0.5 * ring - np.cos(turn * spokes + rng.uniform(0, 6))) * ring * radius / spokes
            rules = [(within(between, band(ring, 0.42, 0.20) * radius), GAP), ((ring - 0.715) * radius, TYRE)]
            rules.append((within(0.9 - ring, -out) * radius, GAP))
            x, z = axle + radius * ring * np.cos(turn), radius + radius * ring * np.sin(turn)
            parts.append(make_part(x, side * (0.5 * width - 0.18 + out), z, CHROME, rules))
    return parts


def make_car(rng: np.random.Generator, style: str, paint: str) -> Car:
    """A car of one of `STYLES` in one of `PAINTS`; its proportions and trim come from `rng`."""
    (long, wide, radius), heights, roof, shares, glass, _ = STYLES[style]
    length, width, tall = (rng.uniform((0.96, 0.96, 0.96), (1.04, 1.04, 1.05)) * (long, wide, 1)).tolist()
    coat, axles = PAINTS[paint], tuple((0.5 - share) * length for share in shares)
    parts = make_body(style, coat, length, width, tall, rng.random() < 0.5)
    parts += make_cabin(style, coat, length, width, tall) + make_wheels(rng, radius, width, axles)
    mirror = roof[0][0] + 0.09
    x, z = (0.5 - mirror) * length, tall * np.interp(mirror, DECK_SHARES, heights) + 0.07
    for side in (-1, 1):
        parts.append(make_ellipsoid(coat, (x, side * (0.5 * width + 0.06), z), (0.06, 0.11, 0.075)))
        parts.append(make_ellipsoid(BLACK, (x, side * (0.5 * width - 0.05), z - 0.05), (0.03, 0.1, 0.02)))
    if rng.random() < 0.6:
        aerial = ((0.53 - glass[1]) * length, 0.0, tall * max(height for _, height in roof))
        parts.append(make_ellipsoid(BLACK, aerial, (0.012, 0.006, 0.16)))
    offset = np.cumsum([0] + [len(part[0]) for part in parts[:-1]])
    quads = np.concatenate([part[3] + base for part, base in zip(parts, offset, strict=True)]).astype(np.int32)
    points, normals, materials = (np.concatenate([part[i].T for part in parts], 1, dtype=np.float32) for i in range(3))
    return Car(points, normals, materials, quads, coat, (length, width), axles)


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


def encode_image(image: ndarray) -> bytes:
    """(H, W, 3) uint8 to a JPEG as Carvana's: baseline, 4:2:0, JFIF, no EXIF, standard Huffman tables."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def encode_mask(mask: ndarray) -> bytes:
    """(H, W) uint8 of 0 and 1 to a GIF as Carvana's: GIF89a, one frame, not interlaced, black and white."""
    picture, buffer = Image.fromarray(mask), BytesIO()
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(buffer, "GIF", interlace=0, optimize=False)  # optimize would renumber a mask of one colour
    data = buffer.getvalue()
    # Pillow writes GIF87a and pads the palette to four colours. The blocks that follow are the same in GIF89a.
    flags, pixels = data[10], data[13 + 3 * 2 ** ((data[10] & 7) + 1) :]
    return b"GIF89a" + data[6:10] + bytes([flags & 0xF8]) + data[11:13] + bytes(3) + b"\xff" * 3 + pixels


def write_file(path: Path, data: bytes) -> None:
    """All of the file or nothing of it: an interrupted run leaves no half picture."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise DataError(f"{path}: cannot be written ({error.strerror}). Make room or choose another out.") from error


def prepare_folder(folder: Path, names: set[str]) -> None:
    """Makes the folder; files in it that this run would not write are someone's data, and stay."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name.removesuffix(".part") for path in folder.iterdir()} - names
    except OSError as error:
        message = f"{folder}: must be a folder that can be written; got {error.strerror}. Choose another out."
        raise DataError(message) from error
    if found:
        raise DataError(
            f"{folder}: must be empty or hold an earlier run with the same cars, views and seed; found {len(found)} "
            f"other files, first: {min(found)}. Choose another out or move them away."
        )


class PairRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} pairs/s")


def generate(
    out: str | Path,
    *,
    cars: int = 6,
    views: int = 16,
    seed: int = 0,
    width: int = 1918,
    height: int = 1280,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes out/{train,val}_{images,masks}, split by car: a quarter of the cars, at least one, validates.

    Args:
        out: folder, made if missing. Files of an earlier run with the same arguments are written again.
        cars, views: the number of cars, at least 2, and of pictures of each, 1 to 99.
        seed: at least 0; the same seed gives the same bytes, whatever the number of workers.
        width, height: pixels, at least 32.
        workers: threads, of some 250 MB each; None takes every core this process may use.
        progress: a bar on stderr, if that is a terminal.

    Returns:
        {"train_pairs": int, "val_pairs": int} and the Path of each folder under its name.

    Raises:
        ConfigError: a number is out of range.
        DataError: the folders cannot be written or hold other files.
    """
    rules = (
        ("cars", cars, 2, 10_000, "one car trains, another validates"),
        ("views", views, 1, 99, "file names have two digits for it"),
        ("seed", seed, 0, 2**63 - 1, "numpy takes no negative seed"),
        ("width", width, 32, 16_384, "in pixels"),
        ("height", height, 32, 16_384, "in pixels"),
        ("workers", 1 if workers is None else workers, 1, 1024, "the number of threads"),
    )
    for field, value, low, high, why in rules:
        if not low <= value <= high:
            use = min(max(value, low), high)
            raise ConfigError(f"{field}: must be {low} to {high} ({why}); got {value}. Use {use}.")
    rng = np.random.default_rng(seed)
    stems = [rng.bytes(6).hex() for _ in range(cars)]
    rounds = range(math.ceil(cars / len(STYLES)))
    styles = [str(style) for _ in rounds for style in rng.permutation(list(STYLES))]
    paints = [str(paint) for _ in rounds for paint in rng.permutation(list(PAINTS))]
    num_train = cars - max(1, math.floor(cars / 4 + 0.5))

    folders = {name: Path(out) / name for name in ("train_images", "train_masks", "val_images", "val_masks")}
    for name, folder in folders.items():
        members = stems[:num_train] if name.startswith("train") else stems[num_train:]
        ending = ".jpg" if name.endswith("images") else "_mask.gif"
        prepare_folder(folder, {f"{stem}_{view:02d}{ending}" for stem in members for view in range(1, views + 1)})

    stop = Event()

    def write_views(i: int, some: range) -> None:
        car_rng = np.random.default_rng((seed, i))
        car = make_car(car_rng, styles[i], paints[i])
        studio = make_studio(car_rng, car, width, height)
        split = "train" if i < num_train else "val"
        for view in some:
            if stop.is_set():
                return
            view_rng = np.random.default_rng((seed, i, view))
            turn = math.pi + 2 * math.pi * (view - 1) / views + view_rng.uniform(-0.03, 0.03)
            image, mask = render_pair(car, studio, turn, view_rng)
            stem = f"{stems[i]}_{view:02d}"
            write_file(folders[f"{split}_masks"] / f"{stem}_mask.gif", encode_mask(mask))  # so no image lacks its mask
            write_file(folders[f"{split}_images"] / f"{stem}.jpg", encode_image(image))
            bar.advance(task)

    columns = (BarColumn(), MofNCompleteColumn(), PairRate(), TimeRemainingColumn())
    shown = progress and sys.stderr.isatty()
    workers = workers or numba.config.NUMBA_NUM_THREADS
    parts = max(1, workers // cars)  # of a car's views; each thread builds the car it draws
    with (
        Progress(*columns, console=Console(stderr=True, quiet=not shown), disable=not shown) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = bar.add_task("", total=cars * views)
        some_views = [range(first, views + 1, parts) for first in range(1, parts + 1)]
        jobs = [pool.submit(write_views, i, some) for i in range(cars) for some in some_views]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()  # every thread finishes the pair it is at
            pool.shutdown(cancel_futures=True)
            raise
    return {"train_pairs": num_train * views, "val_pairs": (cars - num_train) * views, **folders}
