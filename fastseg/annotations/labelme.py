"""Reads labelme's JSON files, one per image.

Source: https://github.com/wkentaro/labelme, labelme/utils/shape.py
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from fastseg.annotations.shapes import AnnotatedImage, Shape, check_annotated_size, read_size
from fastseg.errors import DataError

__all__ = ["read_labelme"]

AREAS = ("polygon", "rectangle", "circle")

log = logging.getLogger(__name__)


def read_labelme(folder: Path, images: Path | None) -> tuple[list[str], list[AnnotatedImage]]:
    """Labels in alphabetical order, and the images of all JSON files below a folder.

    Polygons, rectangles and circles are drawn in the order of the file; points and lines have no area and are left out.

    Args:
        images: folder of the images; None: as the files say, relative to themselves.

    Raises:
        DataError: there is no JSON file, one is not labelme's, or an image is missing.
    """
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DataError(f"{folder}: must hold labelme's .json files; found none. Give their folder.")
    annotated = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            name = str(content["imagePath"]).replace("\\", "/")
            shapes = [shape for item in content["shapes"] if (shape := _read_shape(item, file))]
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}). Make it readable.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: is not labelme's JSON ({type(error).__name__}: {error}). Move it away.") from None
        path = images / Path(name).name if images else file.parent / name
        size = read_size(path, str(file), "Put it there, or give the folder of the images with --images")
        check_annotated_size(content, ("imageHeight", "imageWidth"), size, path, str(file))
        below = file.relative_to(folder).parent
        annotated.append(AnnotatedImage(path, str(below / path.name), size, shapes, str(file)))
    labels = sorted({shape.label for image in annotated for shape in image.shapes})
    return labels, annotated


def _read_shape(item: dict[str, Any], file: Path) -> Shape | None:
    kind, label = item.get("shape_type") or "polygon", str(item["label"])
    points = [(float(x), float(y)) for x, y in item["points"]]
    if kind not in AREAS:
        log.warning("%s: left out a shape of %s (%s)", file, label, kind)
        return None
    if kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"a polygon of {label} has {len(points)} points, at least 3 are needed")
        return Shape(label, [[axis for point in points for axis in point]])
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return Shape(label, [[x0, y0, x1, y0, x1, y1, x0, y1]])
    radius = math.hypot(x1 - x0, y1 - y0)  # the second point lies on the circle
    turns = [2 * math.pi * step / 180 for step in range(180)]
    around = [(x0 + radius * math.cos(turn), y0 + radius * math.sin(turn)) for turn in turns]
    return Shape(label, [[axis for point in around for axis in point]])
