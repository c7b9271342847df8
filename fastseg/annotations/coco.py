"""Reads COCO's instances_*.json: categories, polygons, run lengths.

Source: https://cocodataset.org/#format-data
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastseg.annotations.shapes import AnnotatedImage, Shape, check_annotated_size, read_size
from fastseg.errors import DataError

__all__ = ["read_coco"]


def read_coco(path: Path, images: Path | None) -> tuple[list[str], list[AnnotatedImage]]:
    """Labels in the order of their ids, and all images of a file.

    Larger objects come first, so that smaller ones cover them. Annotations without a segmentation are left out.

    Args:
        images: folder of the images; None: that of the file, or `images` or the split's folder beside it.

    Raises:
        DataError: the file is not COCO's JSON, or an image is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        labels = {item["id"]: str(item["name"]) for item in sorted(content["categories"], key=lambda item: item["id"])}
        shapes: dict[Any, list[Shape]] = defaultdict(list)
        for item in sorted(content.get("annotations", ()), key=lambda item: -item.get("area", 0)):
            if shape := _read_shape(item, labels):
                shapes[item["image_id"]].append(shape)
        entries = [(item["id"], item["file_name"], item) for item in content["images"]]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give COCO's instances_*.json.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: is not COCO's JSON of categories, images and annotations ({type(error).__name__}: {error}). "
            "Give an instances_*.json."
        ) from None
    split = path.stem.removeprefix("instances_")
    beside = [path.parent, path.parent / "images", path.parent.parent / split, path.parent.parent / "images" / split]
    folders = [images] if images else [*beside, path.parent.parent / "images"]
    annotated = []
    for image_id, name, item in entries:
        file = next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
        size = read_size(file, str(path), "Give the folder of its images with --images")
        check_annotated_size(item, ("height", "width"), size, file, str(path))
        annotated.append(AnnotatedImage(file, name, size, shapes[image_id], str(path)))
    return list(labels.values()), annotated


def _read_shape(item: dict[str, Any], labels: dict[Any, str]) -> Shape | None:
    segmentation = item.get("segmentation")
    if not segmentation:
        return None
    label = labels[item["category_id"]]
    return Shape(label, rle=segmentation) if isinstance(segmentation, dict) else Shape(label, polygons=segmentation)
