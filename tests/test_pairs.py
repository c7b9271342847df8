"""Pairs: which mask belongs to which image, which car to which half, and what is refused."""

import gc
import itertools
import logging
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import fastseg
from fastseg.data.pairs import find_images, group_of

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_EXTENSIONS = (".gif", ".png", ".bmp")
ADVICE = "Give the folder that holds them, or make Carvana-like pairs with `fastseg synth --out data`."


def fill(folder: Path, *names: str) -> Path:
    """Empty files: finding pairs opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def refusal(image_dir: Path, mask_dir: Path) -> str:
    with pytest.raises(fastseg.DataError) as error:
        fastseg.find_pairs(image_dir, mask_dir)
    return str(error.value)


def cars(count: int, views: int) -> list[str]:
    return [f"{car:012x}_{view:02d}" for car in range(count) for view in range(1, views + 1)]


def pairs_of(stems: list[str]) -> fastseg.Pairs:
    return fastseg.Pairs("images", "masks", [f"{stem}.jpg" for stem in stems], [f"{stem}_mask.gif" for stem in stems])


def test_mask_is_found_by_stem_whatever_the_extensions(tmp_path):
    image_kinds = [*IMAGE_EXTENSIONS, *map(str.upper, IMAGE_EXTENSIONS), ".Jpg"]
    mask_kinds = [suffix + kind for suffix in ("_mask", "") for kind in (*MASK_EXTENSIONS, ".GIF", ".PNG", ".BMP")]
    expected = {}
    for i, (image, mask) in enumerate(itertools.product(image_kinds, mask_kinds)):
        expected[f"car_{i:03d}{image}"] = f"car_{i:03d}{mask}"
    fill(tmp_path / "images", *expected)
    fill(tmp_path / "masks", *expected.values())
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert dict(zip(pairs.images, pairs.masks, strict=True)) == expected
    assert len(pairs) == len(expected) == 132
    assert pairs.images == sorted(expected)


def test_paths_of_a_pair(tmp_path):
    fill(tmp_path / "images", "b.jpg", "a.jpg")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif")
    pairs = fastseg.find_pairs(f"{tmp_path}/images/", f"{tmp_path}/masks/")
    assert [Path(pairs.image_path(i)) for i in range(2)] == [tmp_path / "images/a.jpg", tmp_path / "images/b.jpg"]
    assert [Path(pairs.mask_path(i)) for i in range(2)] == [
        tmp_path / "masks/a_mask.gif",
        tmp_path / "masks/b_mask.gif",
    ]


def test_stem_may_hold_dots(tmp_path):
    fill(tmp_path / "images", "a.v2.jpg", "a.jpg")
    fill(tmp_path / "masks", "a.v2_mask.gif", "a_mask.gif")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert dict(zip(pairs.images, pairs.masks, strict=True)) == {"a.jpg": "a_mask.gif", "a.v2.jpg": "a.v2_mask.gif"}


def test_masks_lie_in_the_same_subfolder(tmp_path):
    fill(tmp_path / "images", "one/a.jpg", "two/a.jpg")
    fill(tmp_path / "masks", "one/a_mask.gif", "two/a_mask.gif")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pairs.images, pairs.masks) == (["one/a.jpg", "two/a.jpg"], ["one/a_mask.gif", "two/a_mask.gif"])


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp"])
def test_images_and_masks_may_share_a_folder(kind, tmp_path):
    fill(tmp_path, f"a.{kind}", "a_mask.png", f"b.{kind}", "b_mask.png")
    pairs = fastseg.find_pairs(tmp_path, tmp_path)
    assert (pairs.images, pairs.masks) == ([f"a.{kind}", f"b.{kind}"], ["a_mask.png", "b_mask.png"])


def test_other_files_are_no_data(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fill(tmp_path / "images", "a.jpg", ".DS_Store", "._a.jpg", ".cache/a.jpg", "Thumbs.db", "notes.txt")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif", "._a_mask.gif")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pairs.images, pairs.masks, pairs.left_out) == (["a.jpg"], ["a_mask.gif"], ())
    assert f"{tmp_path}/images: left out 2 files that are no images (.db, .txt)" in caplog.messages
    assert f"{tmp_path}/masks: left out 1 masks without an image" in caplog.messages


def test_links_to_files_and_folders_are_followed(tmp_path):
    fill(tmp_path / "disk", "a.jpg")
    fill(tmp_path / "masks", "a_mask.gif", "sub/a_mask.gif")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").symlink_to(tmp_path / "disk" / "a.jpg")
    (tmp_path / "images" / "sub").symlink_to(tmp_path / "disk")
    assert fastseg.find_pairs(tmp_path / "images", tmp_path / "masks").images == ["a.jpg", "sub/a.jpg"]


def test_links_that_lead_back_are_not_followed_forever(tmp_path):
    fill(tmp_path / "images", "a.jpg", "one/b.jpg", "two/c.jpg")
    (tmp_path / "images" / "all").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "one" / "other").symlink_to(tmp_path / "images" / "two")
    (tmp_path / "images" / "two" / "other").symlink_to(tmp_path / "images" / "one")
    found = find_images(tmp_path / "images")
    assert found == ["a.jpg", "one/b.jpg", "one/other/c.jpg", "two/c.jpg", "two/other/b.jpg"]


def test_images_without_masks_are_counted_and_the_first_is_named(tmp_path):
    fill(tmp_path / "images", "car_01.jpg", "car_02.jpg", "car_03.jpg")
    fill(tmp_path / "masks", "car_01_mask.gif", "car_02_mask.tif", "car_3_mask.gif")
    assert refusal(tmp_path / "images", tmp_path / "masks") == (
        f"2 of 3 images have no mask in {tmp_path}/masks; first: car_02.jpg "
        "(looked for car_02_mask.* and car_02.*: .gif, .png, .bmp). "
        'Add the masks, or pass bad_samples="skip" to leave them out.'
    )


def test_image_with_two_masks_names_both(tmp_path):
    fill(tmp_path / "images", "a.jpg", "b.jpg")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif", "b.png")
    assert refusal(tmp_path / "images", tmp_path / "masks") == (
        f"1 of 2 images have more than one mask in {tmp_path}/masks; first: b.jpg (b.png and b_mask.gif). "
        'Keep one of each, or pass bad_samples="skip" to leave them out.'
    )


def test_two_images_of_one_stem_are_named(tmp_path):
    fill(tmp_path / "images", "a.jpg", "b.jpg", "b.png")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif")
    assert refusal(tmp_path / "images", tmp_path / "masks") == (
        f"2 of 3 images in {tmp_path}/images share their stem with another; first: b.jpg and b.png. "
        'Keep one of each, or pass bad_samples="skip" to leave them out.'
    )


def unmatched(tmp_path: Path) -> tuple[Path, Path]:
    """One good pair, an image without a mask, one with two masks, two of one stem."""
    images = fill(tmp_path / "images", "good.jpg", "alone.jpg", "double.jpg", "twin.jpg", "twin.png")
    masks = fill(tmp_path / "masks", "good_mask.gif", "double.gif", "double_mask.gif", "twin_mask.gif")
    return images, masks


def test_all_that_does_not_match_is_reported_together(tmp_path):
    images, masks = unmatched(tmp_path)
    assert refusal(images, masks) == (
        f"1 of 5 images have no mask in {masks}; first: alone.jpg (looked for alone_mask.* and alone.*: .gif, .png, "
        f".bmp). Add the masks. 1 of 5 images have more than one mask in {masks}; first: double.jpg (double.gif and "
        f"double_mask.gif). Keep one of each. 2 of 5 images in {images} share their stem with another; first: "
        'twin.jpg and twin.png. Keep one of each, or pass bad_samples="skip" to leave them out.'
    )


def test_skip_leaves_out_and_names_each(tmp_path, caplog):
    images, masks = unmatched(tmp_path)
    pairs = fastseg.find_pairs(images, masks, bad_samples="skip")
    assert (pairs.images, pairs.masks) == (["good.jpg"], ["good_mask.gif"])
    assert pairs.left_out == ("alone.jpg", "double.jpg", "twin.jpg", "twin.png")
    assert caplog.messages == [
        f"left out: 1 of 5 images have no mask in {masks}: alone.jpg",
        f"left out: 1 of 5 images have more than one mask in {masks}: double.jpg",
        f"left out: 2 of 5 images in {images} share their stem with another: twin.jpg, twin.png",
    ]


def test_skip_needs_one_pair_that_is_left(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "b_mask.gif")
    with pytest.raises(fastseg.DataError) as error:
        fastseg.find_pairs(images, masks, bad_samples="skip")
    assert str(error.value) == (
        f"{images}: not one of its 1 images has one mask in {masks}. Add the masks as <stem>_mask.gif."
    )


def test_missing_folder_is_named(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")
    assert refusal(tmp_path / "no", masks) == f"{tmp_path}/no: no such folder of images. {ADVICE}"
    assert refusal(images, tmp_path / "no") == f"{tmp_path}/no: no such folder of masks. {ADVICE}"
    assert refusal(images / "a.jpg", masks) == f"{images}/a.jpg: no such folder of images. {ADVICE}"


def test_empty_folder_is_named(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", masks) == (
        f"{tmp_path}/empty: must hold images (.jpg, .jpeg, .png, .bmp, .webp); found nothing. "
        "Give the folder that holds them."
    )
    assert refusal(images, tmp_path / "empty") == (
        f"{tmp_path}/empty: must hold masks (.gif, .png, .bmp); found nothing. Give the folder that holds them."
    )


def test_folder_of_other_files_says_what_it_holds(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")
    assert refusal(masks, images) == (
        f"{masks}: must hold images (.jpg, .jpeg, .png, .bmp, .webp); found only other files (.gif). "
        "Give the folder that holds them."
    )


def test_folder_without_permission_is_named(tmp_path, monkeypatch):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")

    def deny(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", deny)  # a real one would not stop the superuser
    assert refusal(images, masks) == f"{images}/: cannot be read (Permission denied). Make it readable."


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("00087a6bd4dc_01.jpg", "00087a6bd4dc"),
        ("a_b_c.png", "a_b"),
        ("single.jpg", "single"),
        ("_01.jpg", "_01"),
        ("some_folder/single.jpg", "some_folder/single"),
        ("day_1/car_01.jpg", "day_1/car"),
    ],
)
def test_group_is_the_stem_up_to_its_last_underscore(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(20, 0.1, 2), (20, 0.01, 1), (3, 0.34, 1), (2, 0.9, 1)])
def test_split_holds_out_whole_groups(count, fraction, held_out):
    stems = cars(count, views=16)
    train, val = fastseg.split_by_group(pairs_of(stems), fraction, seed=0)
    assert len(val) == 16 * held_out
    assert sorted([*train.images, *val.images]) == [f"{stem}.jpg" for stem in stems]
    assert not {group_of(name) for name in train.images} & {group_of(name) for name in val.images}
    for part in (train, val):
        assert [name.replace(".jpg", "_mask.gif") for name in part.images] == part.masks


def test_split_depends_on_the_seed_alone():
    def held_out(seed: int) -> list[str]:
        return fastseg.split_by_group(pairs_of(cars(20, views=2)), 0.1, seed)[1].images

    assert held_out(0) == held_out(0)
    assert len({tuple(held_out(seed)) for seed in range(8)}) > 4


def test_split_of_one_group_is_refused():
    with pytest.raises(fastseg.DataError) as error:
        fastseg.split_by_group(pairs_of(["car_01", "car_02"]), 0.1, seed=0)
    assert str(error.value) == (
        "images: all 2 images belong to one group (car), so none can be held out. Give val_img_dir and val_mask_dir."
    )


def test_split_keeps_the_count_of_what_was_left_out():
    train, val = fastseg.split_by_group(pairs_of(cars(4, views=2)).without([0, 5]), 0.25, seed=0)
    left_out = [*train.left_out, *val.left_out]
    assert left_out == ["000000000000_01.jpg", "000000000002_02.jpg"]


def test_without_notes_what_it_leaves_out():
    pairs = pairs_of(["a", "b", "c", "d"]).without([2]).without([0])
    assert (pairs.images, pairs.masks) == (["b.jpg", "d.jpg"], ["b_mask.gif", "d_mask.gif"])
    assert pairs.left_out == ("c.jpg", "a.jpg")


Kept = TypeVar("Kept")


def bytes_kept(make: Callable[[], Kept]) -> tuple[Kept, int]:
    """A result, and what is still allocated for it once it is made."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = make()
        gc.collect()
        return kept, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_index_of_20_000_links_costs_at_most_300_bytes_a_pair(tmp_path):
    photo, mask = tmp_path / "photo.jpg", tmp_path / "mask.gif"
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    stems = cars(1250, views=16)
    for stem in stems:
        os.symlink(photo, f"{images}/{stem}.jpg")
        os.symlink(mask, f"{masks}/{stem}_mask.gif")
    pairs, size = bytes_kept(lambda: fastseg.find_pairs(images, masks))
    assert len(pairs) == len(stems) == 20_000
    assert 100 * len(pairs) < size <= 300 * len(pairs)  # two names take more than 100 bytes: the measure sees them
    _, size_of_paths = bytes_kept(lambda: [(images / f"{stem}.jpg", masks / f"{stem}.gif") for stem in stems[:1000]])
    assert size_of_paths > 300 * 1000  # what a careless index would cost
