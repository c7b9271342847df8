"""Annotated images: outlines and run lengths of objects, drawn into masks of class indices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastseg.classes import IGNORED
from fastseg.data.decode import Size, image_size
from fastseg.data.host import decode_file
from fastseg.errors import ConfigError, DataError

__all__ = [
    "BACKGROUND",
    "AnnotatedImage",
    "Shape",
    "check_annotated_size",
    "draw_shapes",
    "import_pycocotools",
    "label_indices",
    "read_size",
]

BACKGROUND = "background"
BACKGROUND_LABELS = (BACKGROUND, "_background_", "__background__")
IGNORED_LABELS = ("__ignore__", "_ignore_", "ignore", "void")


class Shape(NamedTuple):
    """An object: its label and its outlines in pixels, or the run lengths of its mask."""

    label: str
    polygons: Sequence[Sequence[float]] = ()  # each x0, y0, x1, y1, ...
    rle: dict[str, Any] | None = None  # COCO's {"size": [height, width], "counts": ...}


class AnnotatedImage(NamedTuple):
    """An image file and the shapes in it; later ones cover earlier ones."""

    path: Path
    name: str  # of the image in the new data set, relative to its folder
    size: Size
    shapes: list[Shape]
    source: str  # the file of the shapes, for messages


def import_pycocotools() -> Any:
    """The module `pycocotools.mask`; a ConfigError if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError(
            "import: needs pycocotools, which is not installed. Install it with pip install 'fastseg-dali[import]'."
        ) from None
    return mask


def label_indices(labels: Sequence[str]) -> dict[str, int]:
    """The class index of each label: the background is 0, whether it is labelled or not; others follow in order."""
    named = [label for label in labels if label.lower() not in (*BACKGROUND_LABELS, *IGNORED_LABELS)]
    indices = {label: 1 + index for index, label in enumerate(dict.fromkeys(named))}
    for label in labels:
        indices.setdefault(label, 0 if label.lower() in BACKGROUND_LABELS else IGNORED)
    return indices


def draw_shapes(image: AnnotatedImage, indices: dict[str, int], *, by_coco: bool) -> NDArray[np.uint8]:
    """The class index of each pixel, (H, W) uint8; 0 where there is no shape.

    Args:
        indices: of `label_indices`.
        by_coco: draw polygons with pycocotools, whose pixels are COCO's; otherwise with Pillow.

    Raises:
        DataError: a shape cannot be drawn.
    """
    height, width = image.size
    mask = np.zeros((height, width), np.uint8)
    for shape in image.shapes:
        try:
            if by_coco or shape.rle is not None:
                mask[_draw_coco(shape, height, width)] = indices[shape.label]
                continue
            picture = Image.fromarray(mask)
            for polygon in shape.polygons:
                ImageDraw.Draw(picture).polygon(list(polygon), fill=indices[shape.label], outline=indices[shape.label])
            mask = np.array(picture)
        except DataError:
            raise
        except Exception as error:  # pycocotools raises bare exceptions of any kind
            raise DataError(
                f"{image.source}: {image.name}: the shape of {shape.label} cannot be drawn ({error}). Correct it."
            ) from None
    return mask


def _draw_coco(shape: Shape, height: int, width: int) -> NDArray[np.bool_]:
    coco = import_pycocotools()
    if shape.rle is None:
        if any(len(polygon) < 6 for polygon in shape.polygons):  # pycocotools takes four numbers for a box
            raise ValueError("a polygon has less than 3 points")
        encoded = coco.merge(coco.frPyObjects([list(map(float, polygon)) for polygon in shape.polygons], height, width))
    elif list(shape.rle["size"]) != [height, width]:
        raise ValueError(f"its mask is {shape.rle['size'][1]}x{shape.rle['size'][0]}, the image {width}x{height}")
    elif isinstance(shape.rle["counts"], list):
        encoded = coco.frPyObjects(shape.rle, height, width)
    else:
        encoded = shape.rle
    drawn: NDArray[np.bool_] = coco.decode(encoded).astype(bool)
    return drawn


def check_annotated_size(
    content: Mapping[str, Any], keys: tuple[str, str], size: Size, path: Path, source: str
) -> None:
    """DataError if annotations name another size than the image has: their shapes would be drawn in wrong places.

    Args:
        keys: of height and width in `content`; either may be missing.
        size: height and width of the image.
    """
    height, width = (content.get(key) for key in keys)
    if all(isinstance(side, int) and side > 0 for side in (height, width)) and (height, width) != size:
        raise DataError(
            f"{source}: {path.name} was annotated at {width}x{height} pixels, and the file has {size[1]}x{size[0]}. "
            "Give the images that were annotated."
        )


def read_size(path: Path, source: str, remedy: str) -> Size:
    """Height and width of an image file.

    Raises:
        DataError: it is missing or no image; names the annotations, too.
    """
    if not path.is_file():
        raise DataError(f"{path}: is missing, but {source} annotates it. {remedy}.")
    return decode_file(str(path), image_size)
