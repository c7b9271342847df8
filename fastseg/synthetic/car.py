"""Builds a car as a mesh: six body styles, ten paints.

The mesh needs no textures, because each vertex has a material and vertices are close (`STEP`). Lengths are metres; x
points forward, y left, z up, from the floor under the middle of the car. A share is a share of the car's length, 0 at
the nose and 1 at the tail. Colours are linear light.
"""

from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

__all__ = ["PAINTS", "STYLES", "Car", "make_car"]

STEP = 0.010  # metres between vertices: about four pixels at 1918x1280
DECK_SHARES = (0.0, 0.03, 0.22, 0.5, 0.8, 0.97, 1.0)
# fmt: off
# Each style, seen from the side:
#   (length, width, wheel radius), metres; heights of bonnet, belt line and boot at DECK_SHARES, metres;
#   (share, height in metres) of the roof from the bottom of the windscreen to the bottom of the rear window;
#   shares of front and rear axle; of the top of the windscreen and of the rear window; of the door gaps.
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
# A material: red, green, blue, reflectance at normal incidence, metalness (share of the reflection in its own colour).
PAINTS = {  # most are white, grey or black, as on roads
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
WINDOW, WHEEL, LIGHT = np.eye(3)  # parts, each beside a material; zeros: body
PART_OF = {GLASS: WINDOW, SEAT: WINDOW, LAMP: LIGHT, TAIL: LIGHT}


class Car(NamedTuple):
    """A mesh of V vertices and Q quads."""

    points: ndarray  # (3, V) float32, metres
    normals: ndarray  # (3, V) float32, unit length, outward
    materials: ndarray  # (5, V) float32
    parts: ndarray  # (3, V) float32 in [0, 1]: how much of the vertex is window, wheel, light; the rest is body
    quads: ndarray  # (Q, 4) int32 indices of vertices, anticlockwise seen from outside
    paint: tuple[float, ...]
    size: tuple[float, float]  # length, width, metres
    axles: tuple[float, ...]  # x, metres


def smooth_curve(control: Any, share: ndarray) -> ndarray:
    """Heights at `share` on the smoothed polyline through the control points ((share, height), ...)."""
    grid = np.linspace(-0.1, 1.1, 6001)
    height = np.interp(grid, *np.array(control).T)
    for width in (91, 91, 71):  # three box filters approximate a Gaussian
        height = np.convolve(np.pad(height, width // 2, mode="edge"), np.ones(width) / width, "valid")
    return np.interp(share, grid, height)


def space_evenly(parameter: ndarray, x: ndarray, y: ndarray) -> ndarray:
    """Parameters of points `STEP` apart along the curve (x, y), in metres."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    return np.interp(np.linspace(0, arc[-1], int(arc[-1] / STEP) + 2), arc, parameter)


def relative_width(share: ndarray) -> ndarray:
    """Width of a car seen from above, relative to its maximum."""
    return (1 - np.abs(2 * share - 1) ** 6) ** (1 / 6)


def place_sections(length: float, width: float) -> ndarray:
    """(rows, 1) shares of the cross-sections, evenly spaced along the outline seen from above."""
    end = 0.5 * np.linspace(0, 1, 5000) ** 6  # dense where the outline turns sharply
    share = np.concatenate([end, 1 - end[::-1]])
    return space_evenly(share, length * share, 0.5 * width * relative_width(share))[:, None]


def superellipse(start: float, exponents: tuple[float, float], wide: float, tall: float) -> tuple[ndarray, ndarray]:
    """A cross-section: (columns,) y and z in [-1, 1], evenly spaced on a superellipse.

    Args:
        start: angle of the first point, radians; the last is at pi - start.
        exponents: of cosine and sine.
        wide: half axis, metres, for the spacing.
        tall: half axis, metres, for the spacing.
    """
    turn = np.linspace(start, np.pi - start, 20001)
    y, z = (np.sign(a) * np.abs(a) ** e for a, e in zip((np.cos(turn), np.sin(turn)), exponents, strict=True))
    at = space_evenly(turn, wide * y, tall * z)
    return np.interp(at, turn, y), np.interp(at, turn, z)


def band(value: ndarray, centre: float, half_width: float) -> ndarray:
    """Signed distance to the edge of the strip |value - centre| < half_width, positive inside, metres."""
    return half_width - np.abs(value - centre)


def intersect(*regions: ndarray) -> ndarray:
    """Signed distance to the edge of the intersection of regions, positive inside, metres."""
    return reduce(np.minimum, regions)


def make_part(
    x: Any, y: Any, z: Any, material: Any, rules: Any = (), hole: Any = False, part: ndarray | None = None
) -> tuple[ndarray, ...]:
    """A surface over a grid, as (points, normals, materials, quads); materials are followed by parts, see `Car`.

    Args:
        x, y, z: metres, broadcast to (rows, columns).
        material: where no rule applies.
        rules: (signed distance, material) of regions; later ones cover earlier ones.
        hole: True where there is no surface.
        part: of the whole surface; None: of each material.
    """

    def with_part(material: Any) -> ndarray:
        own = PART_OF.get(tuple(material), np.zeros(3)) if part is None else part
        return np.concatenate([material, own])

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
    materials = np.tile(with_part(material), (rows, columns, 1))
    for inside, other in rules:  # blended over one step, or the border would show the quads
        weight = np.broadcast_to(np.clip(0.5 + inside / STEP, 0, 1), (rows, columns))
        there = weight > 0
        materials[there] += weight[there, None] * (with_part(other) - materials[there])
    return points.reshape(-1, 3), normals.reshape(-1, 3), materials.reshape(-1, 8), quads


def make_ellipsoid(material: Any, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Any:
    """An ellipsoid, for mirrors and aerials."""
    polar, turn = np.linspace(0, np.pi, 40)[:, None], np.linspace(0, 2 * np.pi, 60)
    unit = np.cos(polar), np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn)
    x, y, z = (c + r * u for c, r, u in zip(centre, radii, unit, strict=True))
    return make_part(x, y, z, material)


def make_body(style: str, paint: Any, length: float, width: float, tall: float, strip: bool) -> list[Any]:
    """Everything below the windows except the wheels: cross-sections from nose to tail."""
    (_, _, radius), heights, roof, axles, _, doors = STYLES[style]
    share = place_sections(length, width)
    lateral, up = superellipse(-0.42 * np.pi, (2 / 5.5, 2 / 4.2), 0.9, 0.4)
    deck = smooth_curve(tuple(zip(DECK_SHARES, heights, strict=True)), share) * tall
    belly = 0.21 + 0.1 * radius + 0.06 * np.exp(-np.minimum(share, 1 - share) / 0.04)
    crease = 1 + 0.025 * np.exp(-(((up - 0.35) / 0.18) ** 2)) - 0.07 * np.clip(-up, 0, 1) ** 3
    x, z = (0.5 - share) * length, 0.5 * (deck + belly) + 0.5 * (deck - belly) * up
    y = 0.49 * width * relative_width(share) * (1 - 0.05 * (1 - share) ** 2) * lateral * crease

    front, rear, flank = x - 0.5 * length + 0.28, -0.5 * length + 0.21 - x, np.abs(y) - 0.42 * width
    nose, tail = 0.62 + 0.9 * (radius - 0.31), 0.80 + 1.5 * (radius - 0.31)
    grille = intersect(front, band(y, 0, 0.43), band(z, nose, 0.10))
    gaps = [(0.5 - door) * length for door in doors]
    to_arch = intersect(*(np.hypot(x - (0.5 - axle) * length, z - radius) for axle in axles)) - 1.17 * radius
    rules = [
        (0.33 - z, BLACK),
        (grille, GAP),
        (intersect(grille, (-0.2 - np.sin(160 * z)) / 160), CHROME),
        (intersect(front, band(y, 0, 0.70), band(z, 0.40, 0.05)), BLACK),
        (intersect(front, band(y, 0, 0.26), band(z, 0.47, 0.055)), PLATE),
        (intersect(front, np.abs(y) - 0.47, band(z, nose + 0.04, 0.075)), LAMP),
        (intersect(rear, np.abs(y) - 0.52, band(z, tail + 0.03, 0.09)), TAIL),
        (intersect(rear, band(y, 0, 0.26), band(z, tail, 0.06)), PLATE),
        (intersect(rear, band(z, 0.54, 0.012)), GAP),
        (intersect(flank, gaps[0] - x, x - gaps[2], band(z, 0.37, 0.006)), GAP),
        (intersect(-flank, z - nose, band(x, (0.488 - roof[0][0]) * length, 0.004)), GAP),
        (intersect(flank + 0.1, 0.02 - to_arch), BLACK),
    ]
    rules += [(intersect(flank, band(z, 0.54, 0.022)), BLACK)] if strip else []
    rules += [(intersect(flank, z - 0.36, band(x, gap, 0.004)), GAP) for gap in gaps]
    handle = np.multiply(paint, (0.5, 0.5, 0.5, 4, 1))
    rules += [(intersect(flank, band(x, gap + 0.13, 0.075), band(z, 2.5 * radius, 0.014)), handle) for gap in gaps[1:]]
    body = make_part(x, y, z, paint, rules, hole=intersect(flank + 0.1, -to_arch) > 0)
    # Seen through a wheel arch: a black box between the wheels, and the inside of the opposite side of the body.
    box = make_part(0.97 * x[::3], 0.8 * y[::3, ::3], (0.1 * belly + 0.9 * z - 0.03)[::3, ::3], BLACK)
    points, normals, materials, quads = make_part(x[::3], y[::3, ::3], z[::3, ::3], BLACK)
    return [body, box, (points, normals, materials, quads[:, ::-1])]


def make_cabin(style: str, paint: Any, length: float, width: float, tall: float) -> list[Any]:
    """Windows and roof: cross-sections from the windscreen to the rear window, which begin inside the body."""
    _, heights, roof_points, _, glass, doors = STYLES[style]
    start, stop = roof_points[0][0], roof_points[-1][0]
    along = place_sections(length * (stop - start), width)
    lateral, up = superellipse(0.0, (2 / 5, 2 / 4), 0.85, 0.7)
    share = start + (stop - start) * along
    belt = smooth_curve(tuple(zip(DECK_SHARES, heights, strict=True)), share) * tall
    roof = smooth_curve(roof_points, share) * tall
    z = belt - 0.14 + np.maximum(roof - belt + 0.14, 0.02) * up
    y = 0.465 * width * relative_width(along) * (1 - 0.06 * (2 * along - 1) ** 2) * lateral
    y = y * (1 - 0.32 * np.maximum(z - belt, 0))  # leans inwards
    flank, above, x = (np.abs(lateral) - 0.86) * 0.45 * width, z - belt - 0.03, (0.5 - share) * length
    foot, top, rear_top, rear_foot = ((0.5 - edge) * length for edge in (start, *glass, stop))
    window = intersect(flank, above, roof - z - 0.10, foot - 0.28 - x, x - rear_foot - 0.24)
    windscreen = intersect(foot - 0.02 - x, x - top - 0.07)
    rear_window = intersect(rear_top - 0.07 - x, x - rear_foot - 0.04)
    rules = [(intersect(-flank, above, np.maximum(windscreen, rear_window)), GLASS), (window, GLASS)]
    for door, seat in ((doors[1], 0.12), (doors[2] + 0.012, 0.22)):
        pillar = (0.5 - door) * length
        back = 1 - (((x - pillar - seat) / 0.10) ** 4 + ((z - belt) / 0.24) ** 4) ** 0.25
        rules += [(intersect(window, 0.1 * back), SEAT), (intersect(window, band(x, pillar, 0.03)), BLACK)]
    return [make_part(x, y, z, paint, rules)]


def make_wheels(rng: np.random.Generator, radius: float, width: float, axles: tuple[float, ...]) -> list[Any]:
    """Four wheels: a profile of (share of the radius, metres outwards from the tyre's middle), revolved."""
    profile = [(0.0, 0.06), (0.2, 0.065), (0.5, 0.045), (0.62, 0.05), (0.68, 0.085), (0.7, 0.1), (0.75, 0.108)]
    profile += [(0.88, 0.112), (0.96, 0.1), (1, 0.075), (1, -0.09), (0.9, -0.11), (0.0, -0.11)]
    ring, out = np.array(profile).T
    corner = np.arange(len(ring))
    at = space_evenly(corner, radius * ring, out)[:, None]
    ring, out = np.interp(at, corner, ring), np.interp(at, corner, out)
    turn, spokes = np.linspace(0, 2 * np.pi, 280), rng.integers(5, 11)
    parts = []
    for axle in axles:
        for side in (-1, 1):
            between = (0.4 - 0.5 * ring - np.cos(turn * spokes + rng.uniform(0, 6))) * ring * radius / spokes
            rules = [(intersect(between, band(ring, 0.42, 0.20) * radius), GAP), ((ring - 0.715) * radius, TYRE)]
            rules.append((intersect(0.9 - ring, -out) * radius, GAP))
            x, z = axle + radius * ring * np.cos(turn), radius + radius * ring * np.sin(turn)
            parts.append(make_part(x, side * (0.5 * width - 0.18 + out), z, CHROME, rules, part=WHEEL))
    return parts


def make_car(rng: np.random.Generator, style: str, paint: str) -> Car:
    """A car of one of `STYLES` in one of `PAINTS`; `rng` decides its proportions and trim."""
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
    return Car(points, normals, materials[:5], materials[5:], quads, coat, (length, width), axles)
