"""check: every fault that is planted in a good data set is found and named, and nothing else is."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import fastseg
from fastseg.cli import main
from fastseg.quality import duplicates
from fastseg.quality.duplicates import MAX_DISTANCE, find_near_duplicates
from tests.conftest import write_pair

WIDTH, HEIGHT = 240, 160
CARS = {"train": "abcdef", "val": "gh"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train_* of six cars and val_* of two, one view each, 240x160."""
    for split, cars in CARS.items():
        for car in cars:
            write_pair(tmp_path / split, f"{car}_01", WIDTH, HEIGHT, seed=ord(car))
        for part in ("images", "masks"):
            (tmp_path / split / part).rename(tmp_path / f"{split}_{part}")
        (tmp_path / split).rmdir()
    return tmp_path


def found(data: Path, severity: str, **options) -> dict[tuple[str, str], list[str]]:
    """File names of all findings of a severity, by (what, where)."""
    findings = fastseg.check(data, **options).findings
    return {
        (finding.what, finding.where): [Path(example.file).name for example in finding.files]
        for finding in findings
        if finding.severity == severity
    }


def notes(data: Path, what: str) -> list[str]:
    return [file.note for finding in fastseg.check(data).findings if finding.what == what for file in finding.files]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["check", *map(str, arguments)])
    return ended.value.code


def copy_pair(data: Path, source: str, target: str) -> None:
    """Copy the pair `split/stem` to another name."""
    (split, stem), (new_split, new_stem) = source.split("/"), target.split("/")
    shutil.copy(data / f"{split}_images/{stem}.jpg", data / f"{new_split}_images/{new_stem}.jpg")
    shutil.copy(data / f"{split}_masks/{stem}_mask.gif", data / f"{new_split}_masks/{new_stem}_mask.gif")


def read_picture(path: Path, mode: str = "RGB") -> Image.Image:
    with Image.open(path) as image:
        return image.convert(mode)


def mask_values(data: Path, name: str) -> np.ndarray:
    return np.asarray(read_picture(data / "train_masks" / f"{name}_mask.gif", "L"))


def replace_mask(data: Path, name: str, values: np.ndarray) -> None:
    (data / "train_masks" / f"{name}_mask.gif").unlink()
    Image.fromarray(values).save(data / "train_masks" / f"{name}_mask.png")


def test_good_data_has_neither_errors_nor_warnings(data, capsys):
    report = fastseg.check(data)
    assert {finding.severity for finding in report.findings} == {"info"}
    assert {name: part.pairs for name, part in report.sets.items()} == {"train": 6, "val": 2}
    assert run(data) == 0
    assert run(data, "--strict") == 0
    out = capsys.readouterr().out
    assert "6 pairs in train, 2 pairs in val" in out
    assert "errors: 0, warnings: 0" in out


@pytest.mark.parametrize("name", ["train_images/b_01.jpg", "train_masks/b_01_mask.gif"])
def test_truncated_file(name, data):
    path = data / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert found(data, "error") == {("files that cannot be decoded", "train"): [path.name]}
    assert "truncated" in notes(data, "files that cannot be decoded")[0]


def test_damage_between_the_header_and_the_end_of_a_file(data):
    path = data / "train_images/b_01.jpg"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + whole[-2:])
    fastseg.data.decode.check_readable(path.read_bytes())  # raises nothing
    assert found(data, "error") == {("files that cannot be decoded", "train"): ["b_01.jpg"]}


def test_image_without_mask(data):
    (data / "train_masks/c_01_mask.gif").unlink()
    assert found(data, "error") == {("images without a mask", "train"): ["c_01.jpg"]}


def test_mask_without_image(data):
    (data / "val_images/g_01.jpg").unlink()
    assert found(data, "warning") == {("masks without an image", "val"): ["g_01_mask.gif"]}
    assert run(data) == 0
    assert run(data, "--strict") == 1


def test_mask_without_image_is_decoded(data):
    (data / "val_images/g_01.jpg").unlink()
    (data / "val_masks/g_01_mask.gif").write_bytes(b"GIF89a")
    assert found(data, "error") == {("files that cannot be decoded", "val"): ["g_01_mask.gif"]}


def test_two_masks_for_an_image(data):
    Image.fromarray(mask_values(data, "d_01")).save(data / "train_masks/d_01.png")
    assert found(data, "error") == {("images with more than one mask", "train"): ["d_01.jpg"]}
    assert notes(data, "images with more than one mask") == ["d_01.png and d_01_mask.gif"]


def test_two_images_for_a_mask(data):
    read_picture(data / "train_images/d_01.jpg").rotate(180).save(data / "train_images/d_01.png")
    assert found(data, "error") == {("images that share a mask with another", "train"): ["d_01.jpg", "d_01.png"]}


def test_mask_of_another_size(data):
    replace_mask(data, "e_01", mask_values(data, "e_01")[:80])
    assert found(data, "error") == {("masks of another size than their image", "train"): ["e_01_mask.png"]}
    assert notes(data, "masks of another size than their image") == ["240x80, its image 240x160"]


def test_mask_of_many_values(data):
    soft = Image.fromarray(mask_values(data, "e_01")).filter(ImageFilter.GaussianBlur(2))
    replace_mask(data, "e_01", np.asarray(soft))
    assert found(data, "error") == {("masks with more than two values", "train"): ["e_01_mask.png"]}
    assert f"found {len(np.unique(np.asarray(soft)))}" in notes(data, "masks with more than two values")[0]


@pytest.mark.parametrize(("value", "what"), [(0, "empty masks"), (255, "masks that are all foreground")])
def test_mask_of_one_value(value, what, data):
    replace_mask(data, "f_01", np.full((HEIGHT, WIDTH), value, np.uint8))
    assert found(data, "warning") == {(what, "train"): ["f_01_mask.png"]}


@pytest.mark.parametrize("value", [0, 255])
def test_single_pixel_of_the_other_value_counts(value, data):
    values = np.full((HEIGHT, WIDTH), value, np.uint8)
    values[77, 133] = 255 - value
    replace_mask(data, "f_01", values)
    assert found(data, "warning") == {}


def test_foreground_is_that_of_numpy(data):
    shares = [float((mask_values(data, f"{car}_01") > 0).mean()) for car in CARS["train"]]
    low, high, middle = min(shares), max(shares), sorted(shares)[3]
    expected = f"foreground covers {low:.1%} to {high:.1%} of a mask, median {middle:.1%}"
    assert (expected, "train") in found(data, "info")


def test_sizes_are_listed(data):
    write_pair(data, "i_01", 120, 80, seed=ord("i"))
    for part in ("images", "masks"):
        for path in (data / part).iterdir():
            path.rename(data / f"val_{part}" / path.name)
        (data / part).rmdir()
    assert found(data, "info")["images of 2 sizes", "val"] == ["g_01.jpg", "i_01.jpg"]
    assert notes(data, "images of 2 sizes") == ["240x160, 2 of the images", "120x80, 1 of the images"]


def test_duplicate_files_within_a_set_and_across_the_split(data):
    copy_pair(data, "train/a_01", "train/x_01")
    copy_pair(data, "train/b_01", "val/y_01")
    assert found(data, "warning") == {("duplicate images", "train"): ["x_01.jpg"]}
    between = ("validation images that are also training images", "train, val")
    assert found(data, "error") == {between: ["y_01.jpg"]}
    assert run(data) == 1


@pytest.mark.parametrize(("scale", "quality"), [(1, 20), (2, 50), (3, 40)])
def test_near_duplicate_across_the_split(scale, quality, data):
    copy_pair(data, "train/b_01", "val/y_01")
    size = (WIDTH // scale, HEIGHT // scale)
    read_picture(data / "train_images/b_01.jpg").resize(size).save(data / "val_images/y_01.jpg", quality=quality)
    mask = read_picture(data / "val_masks/y_01_mask.gif", "L").resize(size, Image.Resampling.NEAREST)
    mask.convert("1").save(data / "val_masks/y_01_mask.gif")
    between = ("validation images that nearly duplicate a training image", "train, val")
    assert found(data, "warning") == {between: ["y_01.jpg"]}
    assert f"looks like {data / 'train_images/b_01.jpg'} (" in notes(data, between[0])[0]
    assert found(data, "warning", duplicates=False) == {}


def test_near_duplicate_within_a_set(data):
    copy_pair(data, "train/b_01", "train/y_01")
    read_picture(data / "train_images/b_01.jpg").save(data / "train_images/y_01.jpg", quality=30)
    assert found(data, "warning") == {("near-duplicate images", "train"): ["y_01.jpg"]}


def test_views_of_one_car_are_no_near_duplicates(tmp_path):
    fastseg.generate(tmp_path, cars=2, views=16, width=480, height=320, workers=1)
    assert found(tmp_path, "warning") == {}


def test_car_in_both_sets(data):
    (data / "val_images/g_01.jpg").rename(data / "val_images/a_02.jpg")
    (data / "val_masks/g_01_mask.gif").rename(data / "val_masks/a_02_mask.gif")
    between = ("validation images of a car that is also in training", "train, val")
    assert found(data, "warning") == {between: ["a_02.jpg"]}
    assert notes(data, between[0]) == ["training has a_01.jpg"]


@pytest.mark.parametrize("num_originals", [None, 90])
def test_find_near_duplicates_equals_brute_force(num_originals, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", 32)
    rng = np.random.default_rng(0)
    hashes = rng.random((100, 256)) < 0.5
    originals = None if num_originals is None else rng.random((num_originals, 256)) < 0.5
    known = hashes if originals is None else originals
    for duplicate, original, flips in ((70, 3, MAX_DISTANCE), (99, 5, 0), (40, 39, MAX_DISTANCE + 1)):
        hashes[duplicate] = known[original]
        hashes[duplicate, :flips] ^= True
    expected = []
    for i in range(100):
        distances = [(int((hashes[i] != known[j]).sum()), j) for j in range(i if originals is None else len(known))]
        if distances and min(distances)[0] <= MAX_DISTANCE:
            expected.append((i, min(distances)[1], min(distances)[0]))
    assert find_near_duplicates(hashes, originals) == expected == [(70, 3, MAX_DISTANCE), (99, 5, 0)]


@pytest.mark.parametrize("count", [0, 1])
def test_find_near_duplicates_of_one_and_of_none(count):
    hashes = np.zeros((count, 256), bool)
    assert find_near_duplicates(hashes) == []
    assert find_near_duplicates(hashes, hashes[:0]) == []


def test_json_names_every_file(data, tmp_path):
    for car in "abcd":
        (data / f"train_masks/{car}_01_mask.gif").unlink()
    path = tmp_path / "report.json"
    assert run(data, "--json", path) == 1
    report = json.loads(path.read_text())
    missing = next(finding for finding in report["findings"] if finding["what"] == "images without a mask")
    assert (missing["severity"], missing["where"]) == ("error", "train")
    assert [file["file"] for file in missing["files"]] == [str(data / f"train_images/{car}_01.jpg") for car in "abcd"]
    assert report["sets"]["train"]["pairs"] == 2


def test_folder_layouts(data, tmp_path):
    names = [data / f"{split}_{part}" for split in ("train", "val") for part in ("images", "masks")]
    assert {*fastseg.check(*names).sets} == {"train", "val"}
    assert {*fastseg.check(*names[:2]).sets} == {"all"}
    shutil.move(names[0], tmp_path / "images")
    shutil.move(names[1], tmp_path / "masks")
    shutil.rmtree(names[2])
    shutil.rmtree(names[3])
    assert {*fastseg.check(tmp_path).sets} == {"all"}


def test_same_folders_as_both_sets(data):
    folders = [data / "train_images", data / "train_masks"]
    errors = {finding.what: len(finding.files) for finding in fastseg.check(*folders, *folders).findings[:1]}
    assert errors == {"validation images that are also training images": 6}


@pytest.mark.parametrize(
    ("arguments", "place", "remedy"),
    [
        (["."], "val_masks", "Give the folder"),
        (["nothing"], "nothing", "fastseg check IMAGES MASKS"),
        (["a", "b", "c"], "folders", "--help"),
        ([".", "--num-workers", -1], "num_workers", "default"),
    ],
)
def test_errors_name_place_and_remedy(arguments, place, remedy, data, capsys, monkeypatch):
    monkeypatch.chdir(data)
    Path("nothing").mkdir()
    shutil.rmtree("val_masks")
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split(": ")[1].endswith(place)
    assert remedy in line


def test_without_imagehash(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert run(data) == 2
    error = capsys.readouterr().err
    assert "fastseg-dali[check]" in error
    assert "--no-duplicates" in error
    assert run(data, "--no-duplicates") == 0


def test_paths_without_a_common_folder_are_shown_whole(data, tmp_path, capsys, monkeypatch):
    (data / "train_images" / "car0_01.jpg").write_bytes(b"broken")
    monkeypatch.setattr(os.path, "commonpath", lambda paths: "/")
    run(data)
    shown = "".join(capsys.readouterr().out.split())
    assert str(data / "train_images" / "car0_01.jpg").replace(" ", "") in shown
