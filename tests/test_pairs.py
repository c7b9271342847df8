"""Pairs: the mask of each image, the split by cars, and the errors."""

import gc
import itertools
import logging
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import fastseg
from fastseg.data.pairs import find_images, find_pairs, group_of
from fastseg.errors import DataError
from fastseg.quality.headers import check_pairs

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_EXTENSIONS = (".gif", ".png", ".bmp")


def fill(folder: Path, *names: str) -> Path:
    """Make empty files: finding pairs opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def assert_refused(image_dir: Path, mask_dir: Path, *patterns: str) -> None:
    """The error's message has the patterns, in order."""
    with pytest.raises(fastseg.DataError, match=".*".join(patterns)):
        fastseg.find_pairs(image_dir, mask_dir)


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


def test_other_files_are_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fill(tmp_path / "images", "a.jpg", ".DS_Store", "._a.jpg", ".cache/a.jpg", "Thumbs.db", "notes.txt")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif", "._a_mask.gif")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pairs.images, pairs.masks, pairs.left_out) == (["a.jpg"], ["a_mask.gif"], ())
    assert re.search("images: left out 2 files.*.db, .txt", caplog.text)
    assert re.search("masks: left out 1 mask without an image", caplog.text)


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
    assert_refused(
        tmp_path / "images", tmp_path / "masks", "2 of 3 images", "masks", "car_02.jpg", "car_02_mask", "Add", "skip"
    )


def test_image_with_two_masks_names_both(tmp_path):
    fill(tmp_path / "images", "a.jpg", "b.jpg")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif", "b.png")
    assert_refused(
        tmp_path / "images", tmp_path / "masks", "1 of 2 images", "b.jpg", "b.png and b_mask.gif", "Keep one", "skip"
    )


def test_two_images_of_one_stem_are_named(tmp_path):
    fill(tmp_path / "images", "a.jpg", "b.jpg", "b.png")
    fill(tmp_path / "masks", "a_mask.gif", "b_mask.gif")
    assert_refused(tmp_path / "images", tmp_path / "masks", "2 of 3 images", "b.jpg and b.png", "Keep one", "skip")


def unmatched(tmp_path: Path) -> tuple[Path, Path]:
    """One good pair, an image without a mask, one with two masks, two of one stem."""
    images = fill(tmp_path / "images", "good.jpg", "alone.jpg", "double.jpg", "twin.jpg", "twin.png")
    masks = fill(tmp_path / "masks", "good_mask.gif", "double.gif", "double_mask.gif", "twin_mask.gif")
    return images, masks


def test_all_problems_are_reported_together(tmp_path):
    images, masks = unmatched(tmp_path)
    assert_refused(images, masks, "1 of 5", "alone.jpg", "1 of 5", "double.jpg", "2 of 5", "twin.jpg", "skip")


def test_skip_leaves_out_and_logs_each(tmp_path, caplog):
    images, masks = unmatched(tmp_path)
    pairs = fastseg.find_pairs(images, masks, bad_samples="skip")
    assert (pairs.images, pairs.masks) == (["good.jpg"], ["good_mask.gif"])
    assert pairs.left_out == ("alone.jpg", "double.jpg", "twin.jpg", "twin.png")
    names = ("alone.jpg", "double.jpg", "twin.jpg, twin.png")
    for name, message in zip(names, caplog.messages, strict=True):
        assert message.startswith("left out: ")
        assert message.endswith(name)


def test_skip_needs_one_pair_that_is_left(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "b_mask.gif")
    with pytest.raises(fastseg.DataError, match=r"images: none .*_mask\.gif"):
        fastseg.find_pairs(images, masks, bad_samples="skip")


def test_missing_folder_is_named(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")
    assert_refused(tmp_path / "no", masks, f"{tmp_path}/no", "folder of images", "fastseg synth")
    assert_refused(images, tmp_path / "no", f"{tmp_path}/no", "folder of masks", "fastseg synth")
    assert_refused(images / "a.jpg", masks, f"{images}/a.jpg", "folder of images", "fastseg synth")


def test_folder_without_images_or_masks_is_named(tmp_path):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")
    empty = fill(tmp_path / "empty")
    empty.mkdir()
    assert_refused(empty, masks, f"{empty}", "images", ".jpg, .jpeg", "found nothing", "Give the folder")
    assert_refused(images, empty, f"{empty}", "masks", ".gif, .png", "found nothing", "Give the folder")
    assert_refused(masks, images, f"{masks}", "images", r"found only other files \(.gif\)", "Give the folder")


def test_folder_without_permission_is_named(tmp_path, monkeypatch):
    images, masks = fill(tmp_path / "images", "a.jpg"), fill(tmp_path / "masks", "a_mask.gif")

    def deny(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", deny)  # file modes do not stop root
    assert_refused(images, masks, f"{images}", "Permission denied", "Make it readable")


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


def test_single_images_of_one_group_are_held_out(caplog):
    """Names as cameras give them."""
    stems = [f"IMG_{number:04}" for number in range(20)]
    train, val = fastseg.split_by_group(pairs_of(stems), 0.1, seed=0)
    assert (len(train), len(val)) == (18, 2)
    assert sorted([*train.images, *val.images]) == [f"{stem}.jpg" for stem in stems]
    assert re.search(r"20 images .*one group \(IMG\).*val_img_dir", caplog.text)


def test_split_of_one_image_is_refused():
    with pytest.raises(fastseg.DataError, match=r"1 usable image .*val_img_dir"):
        fastseg.split_by_group(pairs_of(["car_01"]), 0.1, seed=0)


def test_split_keeps_the_names_that_were_left_out():
    train, val = fastseg.split_by_group(pairs_of(cars(4, views=2)).without([0, 5]), 0.25, seed=0)
    left_out = [*train.left_out, *val.left_out]
    assert left_out == ["000000000000_01.jpg", "000000000002_02.jpg"]


def test_without_records_what_it_leaves_out():
    pairs = pairs_of(["a", "b", "c", "d"]).without([2]).without([0])
    assert (pairs.images, pairs.masks) == (["b.jpg", "d.jpg"], ["b_mask.gif", "d_mask.gif"])
    assert pairs.left_out == ("c.jpg", "a.jpg")


T = TypeVar("T")


def allocated_bytes(make: Callable[[], T]) -> tuple[T, int]:
    """A result, and the memory that is still allocated for it when it is returned."""
    gc.collect()
    tracemalloc.start()
    try:
        result = make()
        gc.collect()
        return result, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_20_000_pairs_take_at_most_300_bytes_each(tmp_path):
    photo, mask = tmp_path / "photo.jpg", tmp_path / "mask.gif"
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    stems = cars(1250, views=16)
    for stem in stems:
        os.symlink(photo, f"{images}/{stem}.jpg")
        os.symlink(mask, f"{masks}/{stem}_mask.gif")
    pairs, size = allocated_bytes(lambda: fastseg.find_pairs(images, masks))
    assert len(pairs) == len(stems) == 20_000
    assert 100 * len(pairs) < size <= 300 * len(pairs)  # two names take more than 100 bytes
    _, size = allocated_bytes(lambda: [(images / f"{stem}.jpg", masks / f"{stem}.gif") for stem in stems[:1000]])
    assert size > 300 * 1000  # proof that the bound detects an index of Path objects


def test_a_link_to_itself_is_a_file_that_cannot_be_read(pairs_dir, tmp_path):
    """It neither ends the search nor is followed."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for path in (pairs_dir / part).iterdir():
            (tmp_path / part / path.name).symlink_to(path)
    (tmp_path / "images" / "loop").symlink_to("loop")
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "masks" / "loop.gif").symlink_to("loop.gif")
    assert "loop.jpg" in find_images(tmp_path / "images")
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert len(pairs) == 13
    assert len(check_pairs(pairs, bad_samples="skip")) == 12
    with pytest.raises(DataError, match=r"loop\.jpg: cannot be read"):
        check_pairs(pairs)


def test_images_whose_own_names_end_in_mask(tmp_path):
    fill(tmp_path / "images", "with_mask.jpg", "without_mask.jpg")
    fill(tmp_path / "masks", "with_mask.png", "without_mask_mask.png")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert dict(zip(pairs.images, pairs.masks, strict=True)) == {
        "with_mask.jpg": "with_mask.png", "without_mask.jpg": "without_mask_mask.png",
    }  # fmt: skip
    fill(tmp_path / "images", "with.jpg")  # whose mask with_mask.png is then, as it always was
    fill(tmp_path / "masks", "with_mask_mask.png")
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert dict(zip(pairs.images, pairs.masks, strict=True)) == {
        "with.jpg": "with_mask.png", "with_mask.jpg": "with_mask_mask.png", "without_mask.jpg": "without_mask_mask.png",
    }  # fmt: skip


def test_masks_may_lie_in_a_folder_within_that_of_the_images(tmp_path):
    fill(tmp_path, "a.jpg", "sub/b.jpg", "masks/a.png", "masks/sub/b_mask.png", "masks2/c.jpg", "masks/masks2/c.png")
    pairs = fastseg.find_pairs(tmp_path, tmp_path / "masks")
    assert dict(zip(pairs.images, pairs.masks, strict=True)) == {
        "a.jpg": "a.png", "sub/b.jpg": "sub/b_mask.png", "masks2/c.jpg": "masks2/c.png",
    }  # fmt: skip
