"""import_annotations: masks of COCO's, labelme's and YOLO's shapes, against rectangles and run lengths by hand."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.classes import IGNORED, read_classes
from fastseg.data.labels.decode import decode_full_classes
from fastseg.data.labels.encoding import ClassEncoding
from tests.conftest import TINY, flags, write_pair

WIDTH, HEIGHT = 96, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/a_01.jpg and images/sub/b_01.jpg, 96x64."""
    for seed, name in enumerate(("a_01", "b_01")):
        write_pair(tmp_path, name, WIDTH, HEIGHT, seed)
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "b_01.jpg").rename(tmp_path / "images" / "sub" / "b_01.jpg")
    return tmp_path


def rectangle(x0: int, y0: int, x1: int, y1: int) -> list[int]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def imported(kind: str, source: Path, out: Path, split: str = "", **options: Any) -> dict[str, np.ndarray]:
    """The masks that are read back with the written classes, by the image's name."""
    made = fastseg.import_annotations(kind, source, out, **options)
    encoding = ClassEncoding(read_classes(made["classes"]), 255)
    prefix = f"{split}_" if split else ""
    pairs = fastseg.find_pairs(out / f"{prefix}images", out / f"{prefix}masks")
    return {
        name: decode_full_classes(Path(pairs.mask_path(i)).read_bytes(), encoding)
        for i, name in enumerate(pairs.images)
    }


def names_of(out: Path) -> list[str]:
    return [item.name for item in read_classes(out / "classes.json")]


def refused(kind: str, source: Path, out: Path, *words: object) -> None:
    with pytest.raises(fastseg.DataError, match=".*".join(re.escape(str(word)) for word in words)):
        fastseg.import_annotations(kind, source, out)


# COCO


def coco(**changes: object) -> dict[str, object]:
    """A car with a wheel on it, by polygons, in the first image; run lengths and a bare box in the second."""
    counts = [5 * HEIGHT, 2 * HEIGHT, WIDTH * HEIGHT - 7 * HEIGHT]  # columns 5 and 6
    annotations = [
        {"image_id": 7, "category_id": 9, "area": 100, "segmentation": [rectangle(20, 30, 30, 40)]},
        {"image_id": 7, "category_id": 3, "area": 2000, "segmentation": [rectangle(10, 10, 60, 50)]},
        {"image_id": 8, "category_id": 9, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}, "iscrowd": 1},
        {"image_id": 8, "category_id": 3, "segmentation": [], "bbox": [1, 2, 3, 4]},
    ]
    return {
        "categories": [{"id": 9, "name": "wheel"}, {"id": 3, "name": "car"}],
        "images": [{"id": 7, "file_name": "a_01.jpg"}, {"id": 8, "file_name": "sub/b_01.jpg"}],
        "annotations": annotations,
        **changes,
    }


def test_coco_polygons_and_run_lengths(folder):
    source = write_json(folder / "annotations" / "instances_images.json", coco())
    masks = imported("coco", source, folder / "out")
    assert names_of(folder / "out") == ["background", "car", "wheel"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:50, 10:60] = 1
    expected[30:40, 20:30] = 2
    assert np.array_equal(masks["a_01.jpg"], expected)
    expected[:] = 0
    expected[:, 5:7] = 2
    assert np.array_equal(masks["sub/b_01.jpg"], expected)


def test_compressed_run_lengths(folder):
    from pycocotools import mask as coco_mask

    drawn = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH)).astype(np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(drawn))
    segmentation = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    annotations = [{"image_id": 7, "category_id": 3, "segmentation": segmentation}]
    source = write_json(folder / "coco.json", coco(annotations=annotations))
    masks = imported("coco", source, folder / "out")
    assert np.array_equal(masks["a_01.jpg"], drawn)
    assert not masks["sub/b_01.jpg"].any()


def test_images_are_linked_and_found_by_the_flag(folder):
    source = write_json(folder / "elsewhere" / "x" / "coco.json", coco())
    refused("coco", source, folder / "out", "a_01.jpg: is missing", "coco.json", "--images")
    imported("coco", source, folder / "out", images=folder / "images")
    link = folder / "out" / "images" / "sub" / "b_01.jpg"
    assert link.is_symlink()
    assert link.samefile(folder / "images" / "sub" / "b_01.jpg")
    imported("coco", source, folder / "out", images=folder / "images")  # again


def test_images_in_place_stay_and_other_files_are_not_replaced(folder):
    source = write_json(folder / "coco.json", coco())
    for mask in (folder / "masks").iterdir():
        mask.unlink()
    before = (folder / "images" / "a_01.jpg").read_bytes()
    assert set(imported("coco", source, folder)) == {"a_01.jpg", "sub/b_01.jpg"}
    assert not (folder / "images" / "a_01.jpg").is_symlink()
    assert (folder / "images" / "a_01.jpg").read_bytes() == before
    (folder / "out" / "images").mkdir(parents=True)
    (folder / "out" / "images" / "a_01.jpg").write_bytes(b"mine")
    refused("coco", source, folder / "out", "a_01.jpg: exists", "another out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], ["is not COCO's JSON"]),
        ({"images": []}, ["is not COCO's JSON", "categories"]),
        (coco(annotations=[{"image_id": 7, "category_id": 4, "segmentation": [[1] * 6]}]), ["not COCO's JSON", "4"]),
        (coco(annotations=[{"image_id": 7, "category_id": 3, "segmentation": [[1, 2]]}]), ["a_01.jpg", "car", "drawn"]),
        (
            coco(annotations=[{"image_id": 7, "category_id": 3, "segmentation": [[1, 2, 9, 9]]}]),
            ["a_01.jpg", "3 points"],
        ),
        (
            coco(annotations=[{"image_id": 7, "category_id": 3, "segmentation": {"size": [1, 2], "counts": [2]}}]),
            ["a_01.jpg", "car", "2x1", "96x64"],
        ),
        (coco(images=[{"id": 7, "file_name": "../images/a_01.jpg"}]), ["../images/a_01.jpg", "within"]),
        (coco(categories=[], annotations=[]), ["labels", "2 to 254", "1"]),
    ],
)
def test_wrong_coco_files_are_named(content, words, folder):
    source = write_json(folder / "images" / "coco.json", content)
    refused("coco", source, folder / "out", source, *words)


# labelme


def labelme(*shapes: tuple[str, str, list[list[float]]], image: str = "../images/a_01.jpg") -> dict[str, object]:
    items = [{"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes]
    return {"version": "5.0", "imagePath": image, "shapes": items}


def test_labelme_shapes(folder):
    shapes = [
        ("wall", "rectangle", [[0, 0], [95, 20]]),
        ("car", "polygon", [[10, 10], [60, 10], [60, 49], [10, 49]]),
        ("__ignore__", "rectangle", [[30, 40], [20, 30]]),
        ("_background_", "rectangle", [[50, 10], [52, 12]]),
        ("lamp", "circle", [[80, 50], [80, 40]]),
        ("lamp", "point", [[1, 1]]),
    ]
    write_json(folder / "json" / "a_01.json", labelme(*shapes))
    write_json(folder / "json" / "sub" / "b_01.json", labelme(image="..\\..\\images\\sub\\b_01.jpg"))
    masks = imported("labelme", folder / "json", folder / "out")
    assert names_of(folder / "out") == ["background", "car", "lamp", "wall"]
    mask = masks["a_01.jpg"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:21] = 3
    expected[10:50, 10:61] = 1
    expected[30:41, 20:31] = IGNORED
    expected[10:13, 50:53] = 0
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 80, y - 50)
    assert (mask[distance < 9] == 2).all()
    far = distance > 12
    assert np.argwhere(far & (mask != expected)).tolist() == []
    assert not masks["sub/b_01.jpg"].any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"shapes": []}, ["not labelme's JSON", "imagePath"]),
        (labelme(("car", "polygon", [[1, 1], [2, 2]])), ["2 points", "at least 3"]),
        (labelme(("car", "rectangle", [[1, 1], [9, 9]]), image="no.jpg"), ["no.jpg: is missing", "--images"]),
    ],
)
def test_wrong_labelme_files_are_named(content, words, folder):
    source = write_json(folder / "json" / "a.json", content)
    with pytest.raises(fastseg.DataError) as error:
        fastseg.import_annotations("labelme", folder / "json", folder / "out")
    for word in (*words, source):
        assert str(word) in str(error.value)


def test_a_folder_without_json_is_named(folder):
    refused("labelme", folder / "images", folder / "out", folder / "images", "found none")


# YOLO


def write_yolo(folder: Path, line: str) -> Path:
    """A YAML file of the splits train (a_01) and val (b_01, without objects)."""
    for split, name in (("train", "a_01.jpg"), ("val", "sub/b_01.jpg")):
        place = folder / "yolo" / "images" / split
        place.mkdir(parents=True)
        (folder / "images" / name).rename(place / Path(name).name)
        (folder / "yolo" / "labels" / split).mkdir(parents=True)
    (folder / "yolo" / "labels" / "train" / "a_01.txt").write_text(line)
    path = folder / "yolo" / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: car\n  1: wheel\n")
    return path


def test_yolo_polygons(folder):
    corners = [(0.25, 0.25), (0.5, 0.25), (0.5, 0.5), (0.25, 0.5)]
    path = write_yolo(folder, "1 " + " ".join(f"{x} {y}" for x, y in corners) + "\n\n")
    masks = imported("yolo", path, folder / "out", "train")
    assert names_of(folder / "out") == ["background", "car", "wheel"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[16:33, 24:49] = 2
    assert np.array_equal(masks["a_01.jpg"], expected)
    assert not imported("yolo", path, folder / "out", "val")["b_01.jpg"].any()
    masks = imported("yolo", folder / "yolo" / "labels" / "train", folder / "folder")
    assert names_of(folder / "folder") == ["background", "class_0", "class_1"]
    assert np.array_equal(masks["a_01.jpg"], expected)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.1 0.1", ["a_01.txt, line 1", "polygon", "a box"]),
        ("0 0 0 1 1 1", ["a_01.txt, line 1", "polygon", "5 numbers"]),
        ("car 0 0 1 1 1 0", ["a_01.txt, line 1", "numbers", "car"]),
        ("5 0 0 1 1 1 0", ["data.yaml", "class 5", "names"]),
    ],
)
def test_wrong_yolo_lines_are_named(line, words, folder):
    refused("yolo", write_yolo(folder, line), folder / "out", *words)


@pytest.mark.parametrize("content", ["names: [a]\n", "train: images\n", "a: [", "- 1\n"])
def test_wrong_yaml_files_are_named(content, folder):
    path = folder / "data.yaml"
    path.write_text(content)
    refused("yolo", path, folder / "out", path, "must")


# The command


def test_the_command_makes_what_training_takes(folder, cli):
    source = write_json(folder / "coco.json", coco())
    status, out, _ = cli("import", "coco", source, "--out", folder / "out")
    assert (status, out.split(" pairs")[0]) == (0, "2")
    program, *command = shlex.split(out.splitlines()[-1])
    assert program == "fastseg"
    trained = cli(*command, *flags({**TINY, "val_fraction": 0.5, "out_dir": folder / "runs"}))
    assert trained.status == 0, trained.err
    report = fastseg.check(folder / "out", classes=folder / "out" / "classes.json")
    assert report.count("error") == 0
    cli("import", "voc", source, "--out", folder / "out").assert_refused("kind: ", "coco, labelme, yolo", "voc")
    cli("import", "coco", folder / "no.json", "--out", folder / "out").assert_refused(
        folder / "no.json", "no such file"
    )


def test_the_command_takes_a_split_for_validation_alone(folder, cli):
    path = write_yolo(folder, "")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("train")))
    status, out, _ = cli("import", "yolo", path, "--out", folder / "out")
    assert (status, out) == (0, f"1 pair in {folder / 'out'}/.\n")


def test_ignored_pixels_have_a_colour(folder):
    write_json(
        folder / "json" / "a_01.json",
        labelme(("void", "rectangle", [[0, 0], [9, 9]]), ("car", "rectangle", [[9, 9], [20, 20]])),
    )
    fastseg.import_annotations("labelme", folder / "json", folder / "out")
    with Image.open(folder / "out" / "masks" / "a_01_mask.png") as mask:
        assert mask.convert("RGB").getpixel((0, 0)) == (224, 224, 192)


def test_images_that_are_links_already_stay(folder, tmp_path):
    """Such as those of DVC or git-annex, or of an earlier import."""
    store = folder / "store"
    (folder / "images").rename(store)
    for name in ("a_01.jpg", "sub/b_01.jpg"):
        link = folder / "images" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(store / name)
    for mask in (folder / "masks").iterdir():
        mask.unlink()
    source = write_json(folder / "coco.json", coco())
    assert set(imported("coco", source, folder)) == {"a_01.jpg", "sub/b_01.jpg"}
    assert (folder / "images" / "a_01.jpg").samefile(store / "a_01.jpg")


def test_two_entries_for_one_mask_are_refused(folder):
    images = [{"id": 7, "file_name": "a_01.jpg"}, {"id": 8, "file_name": "a_01.jpg"}]
    source = write_json(folder / "images" / "coco.json", coco(images=images))
    refused("coco", source, folder / "out", source, "a_01.jpg", "would have the mask of", "one entry")


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_shapes_of_another_size_are_refused(kind, folder):
    if kind == "coco":
        images = [{"id": 7, "file_name": "a_01.jpg", "width": 2 * WIDTH, "height": 2 * HEIGHT}]
        source = named = write_json(folder / "images" / "coco.json", coco(images=images, annotations=[]))
    else:
        source, content = folder / "json", labelme() | {"imageWidth": 2 * WIDTH, "imageHeight": 2 * HEIGHT}
        named = write_json(source / "a_01.json", content)
    refused(kind, source, folder / "out", named, "a_01.jpg", f"{2 * WIDTH}x{2 * HEIGHT}", f"{WIDTH}x{HEIGHT}", "Give")


def test_labels_that_are_no_text_are_named(folder):
    path = write_yolo(folder, "")
    labels = folder / "yolo" / "labels" / "train" / "a_01.txt"
    labels.write_text("0 0 0 1 1 1 0", encoding="utf-16")
    refused("yolo", path, folder / "out", labels, "UTF-8")
    labels.write_text("0 0 0 1 1 1 0", encoding="utf-8-sig")
    assert imported("yolo", path, folder / "out", "train")["a_01.jpg"].any()
