"""Things that stand about in the studio and are background: cones, bags, boxes, tripods, cables and people.

Meshes are those of `car.py`; lengths are metres. Things do not turn with the table.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray

from fastseg.synthetic.car import BLACK, CHROME, Car, intersect, make_ellipsoid, make_part

__all__ = ["place_clutter"]

ORANGE, WHITE, CARD = (0.62, 0.11, 0.02, 0.03, 0.0), (0.55, 0.55, 0.54, 0.03, 0.0), (0.30, 0.20, 0.11, 0.01, 0.0)
SKIN, YELLOW = (0.36, 0.21, 0.15, 0.02, 0.0), (0.5, 0.38, 0.03, 0.02, 0.0)
CLEARANCE = 0.03  # metres between things, and between a thing and the car
VIEW = (-2.6, -3.4), (3.6, 3.4)  # metres: where things stand: nearest and right, farthest and left


def make_cloth(rng: np.random.Generator) -> tuple[float, ...]:
    """A matt material, most often dark."""
    return (*(rng.uniform(0.3, 1.0, 3) * rng.choice((0.015, 0.06, 0.25, 0.5))).tolist(), 0.01, 0.0)


def make_tube(material: Any, start: Any, stop: Any, radii: tuple[float, float], rules: Any = ()) -> Any:
    """A closed cone frustum between two points; `rules` are (share from, share to, material) of bands."""
    start, stop = np.array(start, float), np.array(stop, float)
    axis = (stop - start) / np.linalg.norm(stop - start)
    side = np.cross(axis, (1.0, 0, 0) if abs(axis[0]) < 0.9 else (0, 1.0, 0))
    side /= np.linalg.norm(side)
    share = np.concatenate([[0.0], np.linspace(0, 1, 60), [1.0]])[:, None]
    radius = radii[0] + (radii[1] - radii[0]) * share
    radius[[0, -1]] = 0
    turn = np.linspace(0, 2 * math.pi, 28)
    around = np.cos(turn)[:, None] * side + np.sin(turn)[:, None] * np.cross(axis, side)
    points = start + share[..., None] * (stop - start) + radius[..., None] * around
    bands = [(0.1 * intersect(share - low, high - share), other) for low, high, other in rules]
    x, y, z = np.moveaxis(points, 2, 0)
    return make_part(x, y, z, material, bands)


def make_block(material: Any, centre: Any, half_sizes: Any, power: float = 6.0) -> Any:
    """A box with round edges: a superellipsoid."""
    polar, turn = np.linspace(0, math.pi, 41)[:, None], np.linspace(0, 2 * math.pi, 61)

    def curve(value: ndarray) -> ndarray:
        return np.asarray(np.sign(value) * np.abs(value) ** (2 / power))

    unit = curve(np.cos(turn)) * curve(np.sin(polar)), curve(np.sin(turn)) * curve(np.sin(polar)), curve(np.cos(polar))
    x, y, z = (c + half * u for c, half, u in zip(centre, half_sizes, unit, strict=True))
    return make_part(x, y, z, material)


def make_cone(rng: np.random.Generator) -> list[Any]:
    """A traffic cone with a white band."""
    height, radius = rng.uniform(0.45, 0.8), rng.uniform(0.12, 0.17)
    base = make_block(ORANGE, (0, 0, 0.02), (radius + 0.06, radius + 0.06, 0.02))
    return [base, make_tube(ORANGE, (0, 0, 0.03), (0, 0, height), (radius, 0.025), [(0.45, 0.7, WHITE)])]


def make_bag(rng: np.random.Generator) -> list[Any]:
    """A bag with a handle."""
    cloth, (x, y, z) = make_cloth(rng), rng.uniform((0.18, 0.1, 0.13), (0.35, 0.18, 0.24)).tolist()
    handle = [
        (share * x, 0, 2 * z + height) for share, height in ((-0.4, -0.02), (-0.25, 0.1), (0.25, 0.1), (0.4, -0.02))
    ]
    straps = [make_tube(BLACK, a, b, (0.012, 0.012)) for a, b in pairwise(handle)]
    return [make_block(cloth, (0, 0, z), (x, y, z), rng.uniform(3, 5)), *straps]


def make_box(rng: np.random.Generator) -> list[Any]:
    """A cardboard box or a dark case."""
    x, y, z = rng.uniform((0.15, 0.15, 0.1), (0.4, 0.3, 0.35)).tolist()
    return [make_block(CARD if rng.random() < 0.5 else make_cloth(rng), (0, 0, z), (x, y, z), 14)]


def make_tripod(rng: np.random.Generator) -> list[Any]:
    """Thin legs with a camera or a lamp on top."""
    height, spread = rng.uniform(1.0, 1.7), rng.uniform(0.3, 0.5)
    coat = BLACK if rng.random() < 0.6 else CHROME
    turns = 2 * math.pi / 3 * np.arange(3)
    feet = [(spread * math.cos(turn), spread * math.sin(turn), 0.0) for turn in turns]
    legs = [make_tube(coat, foot, (0, 0, 0.8 * height), (0.012, 0.016)) for foot in feet]
    top = (0.3, 0.05, 0.22) if rng.random() < 0.4 else (0.08, 0.06, 0.055)
    head = make_block(WHITE if top[0] > 0.1 else BLACK, (0, 0, height + top[2]), top)
    return [*legs, make_tube(coat, (0, 0, 0.7 * height), (0, 0, height + 0.02), (0.016, 0.016)), head]


def make_cable(rng: np.random.Generator) -> list[Any]:
    """A cable or a strip of tape on the floor."""
    half, wide = rng.uniform(0.5, 1.8), rng.uniform(0.015, 0.05)
    colour = (BLACK, WHITE, YELLOW)[rng.integers(3)]
    return [make_block(colour, (0, 0, 0.004), (half, wide, 0.004), 20)]


def make_person(rng: np.random.Generator) -> list[Any]:
    """A standing person."""
    tall, trousers, jacket, shoes = rng.uniform(1.58, 1.92), make_cloth(rng), make_cloth(rng), make_cloth(rng)
    hip, shoulder, step = 0.5 * tall, 0.82 * tall, rng.uniform(-0.18, 0.18)
    parts = [make_block(jacket, (0, 0, 0.5 * (hip + shoulder)), (0.13, 0.22, 0.5 * (shoulder - hip) + 0.05), 3)]
    parts.append(make_tube(SKIN, (0, 0, shoulder), (0, 0, 0.9 * tall), (0.06, 0.055)))
    parts.append(make_ellipsoid(SKIN, (0.01, 0, 0.925 * tall), (0.095, 0.075, 0.075 * tall)))
    parts.append(make_ellipsoid(make_cloth(rng), (-0.025, 0, 0.945 * tall), (0.09, 0.083, 0.065 * tall)))
    for side in (-1, 1):
        foot = (side * step, side * 0.11, 0.06)
        parts.append(make_tube(trousers, foot, (0, side * 0.09, hip + 0.03), (0.06, 0.1)))
        parts.append(make_block(shoes, (foot[0] + 0.05, foot[1], 0.04), (0.14, 0.05, 0.045), 3))
        elbow = (rng.uniform(-0.05, 0.2), side * rng.uniform(0.24, 0.36), 0.62 * tall)
        hand = (elbow[0] + rng.uniform(0, 0.25), side * rng.uniform(0.1, 0.34), rng.uniform(0.45, 0.62) * tall)
        parts.append(make_tube(jacket, (0, side * 0.2, shoulder - 0.03), elbow, (0.06, 0.05)))
        parts += [make_tube(jacket, elbow, hand, (0.05, 0.035)), make_ellipsoid(SKIN, hand, (0.05, 0.04, 0.06))]
    return parts


# Each kind: its maker, the radius it keeps free, metres, and how often it occurs.
KINDS = (
    (make_cone, 0.24, 0.22),
    (make_bag, 0.36, 0.2),
    (make_box, 0.45, 0.15),
    (make_tripod, 0.5, 0.15),
    (make_cable, 0.0, 0.13),  # may run under the car
    (make_person, 0.4, 0.15),
)


def place_clutter(rng: np.random.Generator, car: Car, turn: float) -> Car:
    """The car and three to nine things around it as one mesh, whose first vertices and quads are the car's.

    Args:
        turn: angle of the turntable, radians; the things stand where the camera sees them, so they turn back.
    """
    cos, sin = math.cos(turn), math.sin(turn)
    parts: list[Any] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(3, 10)):
        make, free, _ = KINDS[rng.choice(len(KINDS), p=[often for _, _, often in KINDS])]
        thing, angle = make(rng), rng.uniform(0, 2 * math.pi)
        for x, y in rng.uniform(*VIEW, (20, 2)).tolist():
            along, across = cos * x + sin * y, cos * y - sin * x  # in the car's own axes
            gap = math.hypot(max(abs(along) - 0.5 * car.size[0], 0), max(abs(across) - 0.5 * car.size[1], 0))
            others = (math.hypot(x - a, y - b) - radius for a, b, radius in taken)
            if free == 0 or (gap > free + CLEARANCE and all(other > free + CLEARANCE for other in others)):
                taken.append((x, y, free))
                c, s = math.cos(angle - turn), math.sin(angle - turn)
                turned = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
                parts += [
                    (points @ turned + (along, across, 0), normals @ turned, materials, quads)
                    for points, normals, materials, quads in thing
                ]
                break
    return merge(car, parts)


def merge(car: Car, parts: list[Any]) -> Car:
    """The car's mesh with parts behind its own."""
    offset = np.cumsum([car.points.shape[1]] + [len(part[0]) for part in parts])
    quads = [car.quads] + [part[3] + base for part, base in zip(parts, offset, strict=False)]
    points, normals, materials = (
        np.concatenate([own] + [part[i].T for part in parts], 1, dtype=np.float32)
        for i, own in enumerate((car.points, car.normals, np.concatenate([car.materials, car.parts])))
    )
    merged = np.ascontiguousarray(np.concatenate(quads).astype(np.int32))
    return car._replace(points=points, normals=normals, materials=materials[:5], parts=materials[5:], quads=merged)
