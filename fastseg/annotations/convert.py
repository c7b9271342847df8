"""import_annotations(kind, annotations, out): polygons and run lengths become palette PNGs, one per image.

fastseg import coco instances_train.json --out data
fastseg import labelme FOLDER --out data
fastseg import yolo data.yaml --out data
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fastseg.annotations.coco import read_coco
from fastseg.annotations.labelme import read_labelme
from fastseg.annotations.shapes import BACKGROUND, AnnotatedImage, draw_shapes, import_pycocotools, label_indices
from fastseg.annotations.yolo import read_yolo
from fastseg.classes import IGNORED, SegClass, read_classes
from fastseg.data.labels.palette import classes_json, encode_labels
from fastseg.errors import ConfigError, DataError, OutputError
from fastseg.runtime.files import atomic_write, make_folder
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads

__all__ = ["KINDS", "import_annotations"]

KINDS = ("coco", "labelme", "yolo")


def import_annotations(
    kind: str,
    annotations: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Write masks of annotated images to out/masks, link the images to out/images, and write out/classes.json.

    The background is the first class. Splits of YOLO become out/train_images, out/train_masks and so on. Where shapes
    overlap, COCO's smaller one is on top, elsewhere the later one. Shapes labelled `__ignore__`, `ignore` or `void` are
    ignored pixels.

    Args:
        kind: "coco", "labelme" or "yolo".
        annotations: COCO's JSON file; the folder of labelme's JSON files; YOLO's YAML file or a folder of text files.
        out: folder, made if missing.
        images: folder of the images, if they are not where the annotations say.
        num_workers: threads; 0 for one per core.

    Returns:
        {"pairs": int, "classes": Path, "folders": dict}, the latter from the name of a split, or "", to its folders of
        images and masks.

    Raises:
        ConfigError: the kind is unknown, or pycocotools is missing.
        DataError: the annotations or an image cannot be read, there are no labels or more than 253, or out has other
            images of the same name.
        OutputError: the folders cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: must be one of {', '.join(KINDS)}; got {kind!r}.")
    if kind == "coco":
        import_pycocotools()
    path, image_dir = Path(annotations), None if images is None else Path(images)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder of annotations. Give an existing one.")
    if kind == "yolo":
        labels, splits = read_yolo(path, image_dir)
    else:
        labels, found = (read_coco if kind == "coco" else read_labelme)(path, image_dir)
        splits = {"": found}
    indices = label_indices(labels)
    names = [label for label, index in indices.items() if 0 < index < IGNORED]
    try:
        classes = read_classes([BACKGROUND, *names])
    except ConfigError as error:
        raise DataError(f"{path}: its labels cannot be classes: {error}") from None
    write = partial(_write_pair, indices=indices, classes=classes, by_coco=kind == "coco")
    jobs, made = [], {}
    masks: dict[Path, AnnotatedImage] = {}
    for split, part in splits.items():
        prefix = f"{split}_" if split else ""
        made[split] = folders = Path(out) / f"{prefix}images", Path(out) / f"{prefix}masks"
        for folder in folders:
            make_folder(folder)
        for image in part:
            if Path(image.name).is_absolute() or ".." in Path(image.name).parts:
                raise DataError(
                    f"{image.source}: {image.name}: must be a name within the folder of images. Correct it."
                )
            mask = folders[1] / Path(image.name).with_suffix("")
            other = masks.setdefault(mask, image)
            if other is not image:
                raise DataError(
                    f"{image.source}: {image.name}: would have the mask of {other.name} ({other.source}). Give each "
                    "image one entry, and a name of its own without the extension."
                )
            jobs.append((image, *folders))
    with progress_bar() as bar, ThreadPoolExecutor(count_threads(num_workers)) as pool:
        for _ in bar.track(pool.map(lambda job: write(*job), jobs), total=len(jobs), description="drawing"):
            pass
    file = Path(out) / "classes.json"
    with atomic_write(file, sync=False) as temporary:
        temporary.write_text(classes_json(classes), encoding="utf-8")
    return {"pairs": len(jobs), "classes": file, "folders": made}


def _write_pair(
    image: AnnotatedImage,
    image_dir: Path,
    mask_dir: Path,
    *,
    indices: dict[str, int],
    classes: tuple[SegClass, ...],
    by_coco: bool,
) -> None:
    """The mask first, so that an interrupted run leaves no image without a mask."""
    mask = draw_shapes(image, indices, by_coco=by_coco)
    target = mask_dir / Path(image.name).with_suffix("")
    make_folder(target.parent)
    with atomic_write(target.with_name(f"{target.name}_mask.png"), sync=False) as temporary:
        temporary.write_bytes(encode_labels(mask, [item.colour for item in classes]))
    link = image_dir / image.name
    make_folder(link.parent)
    if link.exists():
        if link.samefile(image.path):  # also by links of the user's own, which stay
            return
        if not link.is_symlink():
            raise DataError(f"{link}: exists, and is another file than {image.path}. Choose another out.")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(image.path.absolute())
    except OSError:  # a file system without links
        try:
            shutil.copyfile(image.path, link)
        except OSError as error:
            raise OutputError(link, error) from None
