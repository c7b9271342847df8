"""Reads the labels of YOLO's segmentation data sets: one text file per image, one polygon per line.

Source: https://docs.ultralytics.com/datasets/segment
"""

from pathlib import Path
from typing import Any

from fastseg.annotations.shapes import AnnotatedImage, Shape, read_size
from fastseg.data.pairs import find_images
from fastseg.errors import ConfigError, DataError

__all__ = ["read_yolo"]

Split = tuple[str, Path, Path]  # its name, or "", its images and its labels


def read_yolo(path: Path, images: Path | None) -> tuple[list[str], dict[str, list[AnnotatedImage]]]:
    """Labels in order, and the images of each split; images without a text file have no object.

    Args:
        path: the data set's YAML file, whose splits train and val are read; or a folder of text files.
        images: folder of the images, if `path` is a folder; None: that with `images` in place of `labels`.

    Raises:
        DataError: a file or folder is missing, or a line is no polygon.
    """
    if path.is_dir():
        splits: list[Split] = [("", images or _swap(path, "labels", "images"), path)]
        names: dict[int, str] = {}
    else:
        names, splits = _read_yaml(path)
    found = {split: _read_split(folder, labels) for split, folder, labels in splits}
    numbers = {int(shape.label) for part in found.values() for image in part for shape in image.shapes}
    if names and (unknown := sorted(numbers - names.keys())):
        raise DataError(f"{path}: has no name of class {unknown[0]}, which labels have. Add it to names.")
    names = names or {number: f"class_{number}" for number in range(max(numbers, default=0) + 1)}
    named = {
        split: [
            image._replace(shapes=[shape._replace(label=names[int(shape.label)]) for shape in image.shapes])
            for image in part
        ]
        for split, part in found.items()
    }
    return [names[number] for number in sorted(names)], named


def _read_yaml(path: Path) -> tuple[dict[int, str], list[Split]]:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            "import: needs PyYAML, which is not installed. Install it with pip install 'fastseg-dali[import]'."
        ) from None
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = content["names"]
        names = {
            int(number): str(name) for number, name in (names.items() if isinstance(names, dict) else enumerate(names))
        }
        root = path.parent / str(content.get("path") or "")
        folders = {split: root / str(content[split]) for split in ("train", "val") if content.get(split)}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a YAML file or a folder of labels.") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must have names, and train or val ({type(error).__name__}: {error}).") from None
    if not folders:
        raise DataError(f"{path}: must name the folders of images of train or val. Add them.")
    return names, [(split, folder, _swap(folder, "images", "labels")) for split, folder in folders.items()]


def _swap(folder: Path, old: str, new: str) -> Path:
    """The folder with the last part of its path that is `old` replaced."""
    parts = list(folder.absolute().parts)
    at = next((at for at in reversed(range(len(parts))) if parts[at] == old), None)
    if at is None:
        raise DataError(f"{folder}: must have a part named {old} in its path, beside one named {new}. Give --images.")
    return Path(*parts[:at], new, *parts[at + 1 :])


def _read_split(folder: Path, labels: Path) -> list[AnnotatedImage]:
    if not labels.is_dir():
        raise DataError(f"{labels}: no such folder of labels. Give the one that holds the text files.")
    images = []
    for name in find_images(folder):
        file = labels / Path(name).with_suffix(".txt")
        size = read_size(folder / name, str(file), "Replace it")
        shapes = _read_shapes(file, *size) if file.is_file() else []
        images.append(AnnotatedImage(folder / name, name, size, shapes, str(file)))
    return images


def _read_shapes(file: Path, height: int, width: int) -> list[Shape]:
    shapes = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Make it readable.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not text in UTF-8. Save it as UTF-8.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise DataError(f"{file}, line {number}: must be a class and numbers; got {line[:40]!r}.") from None
        if len(values) < 6 or len(values) % 2 or label < 0:
            kind = "a box" if len(values) == 4 else f"{len(values)} numbers"
            raise DataError(f"{file}, line {number}: must be a class and a polygon of at least 3 points; got {kind}.")
        scaled = [value * (height if at % 2 else width) for at, value in enumerate(values)]
        shapes.append(Shape(str(label), [scaled]))
    return shapes
