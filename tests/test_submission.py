"""Run lengths against a reference that walks pixel by pixel; the CSV read back with the standard library and Pillow."""

import csv
import itertools
import logging
import os
import shutil
import tracemalloc
import weakref

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.masks import submission

RNG = np.random.default_rng(0)


def slow_rle(mask: np.ndarray) -> str:
    """The competition's definition, a pixel at a time."""
    runs, number, before = [], 0, False
    for row in mask:
        for value in row:
            number += 1
            if value and not before:
                runs.append([number, 0])
            if value:
                runs[-1][1] += 1
            before = bool(value)
    return " ".join(f"{start} {length}" for start, length in runs)


def test_example_of_the_competition():
    """Its words: '1 3 10 5' implies pixels (1, 2, 3, 10, 11, 12, 13, 14); here rows of 4."""
    mask = fastseg.decode_rle("1 3 10 5", 4, 4)
    assert (np.flatnonzero(mask) + 1).tolist() == [1, 2, 3, 10, 11, 12, 13, 14]
    assert fastseg.encode_rle(mask) == "1 3 10 5"


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.98, 1])
def test_any_mask_is_encoded_as_the_reference_does_and_comes_back(share):
    shapes = [(1, 1), (1, 7), (7, 1), (2, 2), *RNG.integers(1, 40, (60, 2)).tolist()]
    for height, width in shapes:
        mask = RNG.random((height, width)) < share
        text = fastseg.encode_rle(mask)
        assert text == slow_rle(mask)
        back = fastseg.decode_rle(text, height, width)
        assert back.dtype == bool
        assert np.array_equal(back, mask)


def test_every_mask_of_six_pixels():
    for values in itertools.product([False, True], repeat=6):
        for shape in ((1, 6), (2, 3), (3, 2), (6, 1)):
            mask = np.array(values).reshape(shape)
            assert fastseg.encode_rle(mask) == slow_rle(mask)
            assert np.array_equal(fastseg.decode_rle(fastseg.encode_rle(mask), *shape), mask)


def test_runs_go_on_in_the_next_row():
    mask = np.zeros((3, 4), bool)
    mask[0, 2:] = mask[1, :3] = True
    assert fastseg.encode_rle(mask) == "3 5"


def test_layout_and_values_do_not_count():
    mask = RNG.random((31, 17)) < 0.3
    expected = slow_rle(mask)
    for value in (1, 2, 128, 255):
        assert fastseg.encode_rle(mask.astype(np.uint8) * value) == expected
    assert fastseg.encode_rle(np.asfortranarray(mask)) == expected
    assert fastseg.encode_rle(np.repeat(mask, 2, axis=1)[:, ::2]) == expected
    assert fastseg.encode_rle(mask[:, ::-1]) == slow_rle(mask[:, ::-1])


def test_masks_of_carvanas_size():
    y, x = np.mgrid[:1280, :1918]
    car = ((x - 950) / 700) ** 2 + ((y - 700) / 300) ** 2 < 1
    text = fastseg.encode_rle(car)
    assert len(text.split()) == 2 * np.any(car, axis=1).sum()
    assert np.array_equal(fastseg.decode_rle(text, 1280, 1918), car)
    assert fastseg.encode_rle(np.ones_like(car)) == f"1 {1280 * 1918}"
    assert fastseg.encode_rle(np.zeros_like(car)) == ""


@pytest.mark.parametrize("text", ["1", "1 2 3", "1 b", "1 2.5", "1 " + "9" * 50])
def test_run_lengths_are_pairs_of_whole_numbers(text):
    with pytest.raises(fastseg.DataError, match=r"^run lengths must be (pairs|whole numbers)") as error:
        fastseg.decode_rle(text, 3, 4)
    assert len(str(error.value)) < 120  # a long text is cut off


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("0 2", "0 2 after pixel 0"),
        ("-3 2", "-3 2 after pixel 0"),
        ("2 0", "2 0 after pixel 0"),
        ("2 -1", "2 -1 after pixel 0"),
        ("12 2", "12 2 after pixel 0"),
        ("13 1", "13 1 after pixel 0"),
        ("1 13", "1 13 after pixel 0"),
        ("1 3 3 2", "3 2 after pixel 3"),
        ("5 2 1 2", "1 2 after pixel 6"),
        ("1 1 9223372036854775807 9223372036854775807", "9223372036854775807 9223372036854775807 after pixel 1"),
        ("9223372036854775807 1 2 1", "9223372036854775807 1 after pixel 0"),
    ],
)
def test_wrong_run_is_named(text, run):
    with pytest.raises(fastseg.DataError, match=rf"4x3 mask.* {run}\b"):
        fastseg.decode_rle(text, 3, 4)


def test_runs_may_touch_and_fill_the_mask():
    assert fastseg.decode_rle("1 2 3 10", 3, 4).all()
    assert fastseg.decode_rle(" 12 1\n", 3, 4).sum() == 1
    assert not fastseg.decode_rle("", 3, 4).any()


@pytest.mark.parametrize(
    "mask", [np.zeros(4, bool), np.zeros((2, 2)), np.zeros((2, 2, 1), np.uint8), np.zeros((0, 2), bool)]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"bool or uint8"):
        fastseg.encode_rle(mask)


# Files


def rows(path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 0


@pytest.fixture
def masks(tmp_path, pairs_dir):
    """A copy of the twelve masks that a test may spoil."""
    return shutil.copytree(pairs_dir / "masks", tmp_path / "masks")


def test_csv_has_every_mask_of_a_folder_in_order(pairs_dir, tmp_path):
    out = tmp_path / "submission.csv"
    assert fastseg.write_submission(pairs_dir / "masks", out) == 12
    header, *lines = rows(out)
    assert header == ["img", "rle_mask"]
    assert [name for name, _ in lines] == sorted(path.name for path in (pairs_dir / "images").iterdir())
    for name, text in lines:
        expected = pixels(pairs_dir / "masks" / name.replace(".jpg", "_mask.gif"))
        assert np.array_equal(fastseg.decode_rle(text, *expected.shape), expected)
        assert expected.any()
    assert b"\r" not in out.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]


def test_masks_of_other_formats_and_of_one_colour(tmp_path):
    mask = RNG.random((9, 14)) < 0.5
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/a_mask.png")
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks/b.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks/c_mask.bmp")
    Image.fromarray(np.zeros((9, 14), np.uint8)).save(tmp_path / "masks/d.png")
    Image.fromarray(np.full((9, 14), 255, np.uint8)).save(tmp_path / "masks/e.png")
    fastseg.write_submission(tmp_path / "masks", tmp_path / "out.csv")
    text = slow_rle(mask)
    expected = [["a.jpg", text], ["b.jpg", text], ["c.jpg", text], ["d.jpg", ""], ["e.jpg", "1 126"]]
    assert rows(tmp_path / "out.csv")[1:] == expected


def test_number_of_threads_changes_nothing(pairs_dir, tmp_path):
    for workers in (1, 5):
        fastseg.write_submission(pairs_dir / "masks", tmp_path / f"{workers}.csv", num_workers=workers)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "5.csv").read_bytes()


def test_masks_from_memory_keep_their_order_and_names(tmp_path):
    made = [(name, RNG.random((5, 6)) < 0.5) for name in ("z.jpg", "a.png", "with, comma.jpg")]
    assert fastseg.write_submission(iter(made), tmp_path / "out.csv") == 3
    assert rows(tmp_path / "out.csv")[1:] == [[name, slow_rle(mask)] for name, mask in made]


def test_masks_are_taken_as_they_are_needed(tmp_path):
    """Of 400 masks no more are alive at a time than the threads have ahead of them, and memory does not grow."""
    alive, most = weakref.WeakSet(), 0

    class Tracked(np.ndarray):
        __hash__ = object.__hash__

    def made(count):
        nonlocal most
        for i in range(count):
            mask = np.zeros((200, 300), np.uint8).view(Tracked)
            mask[20:90, 40:100] = 1
            alive.add(mask)
            most = max(most, len(alive))
            yield f"{i}.jpg", mask

    peaks = []
    for count in (40, 400):
        tracemalloc.start()
        fastseg.write_submission(made(count), tmp_path / "out.csv", num_workers=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(rows(tmp_path / "out.csv")) == 401
    assert 2 <= most <= 2 * submission.AHEAD + 2 + 2  # queued, in the threads, and in the generators' hands
    assert peaks[1] < 1.3 * peaks[0]


def test_error_of_who_makes_the_masks_leaves_no_file(tmp_path):
    def made():
        yield "a.jpg", np.ones((2, 2), bool)
        raise fastseg.DataError("b.jpg: is damaged")

    with pytest.raises(fastseg.DataError, match=r"^b\.jpg: is damaged$"):
        fastseg.write_submission(made(), tmp_path / "out.csv")
    with pytest.raises(fastseg.ConfigError, match=r"^images: "):
        fastseg.write_submission([], tmp_path / "out.csv", images=tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command


def run(capsys, *arguments) -> tuple[int, str, list[str]]:
    with pytest.raises(SystemExit) as ended:
        main(["submission", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code, out, err.splitlines()


def test_images_give_the_names(pairs_dir, masks, tmp_path, capsys, caplog):
    images = shutil.copytree(pairs_dir / "images", tmp_path / "images")
    os.rename(images / "car0_01.jpg", images / "car0_01.jpeg")
    Image.fromarray(np.ones((4, 4), bool)).save(masks / "nobodys.png")
    out = tmp_path / "submission.csv"
    with caplog.at_level(logging.INFO):
        status, printed, _ = run(capsys, "--masks", masks, "--images", images, "--out", out, "--num-workers", 3)
    assert (status, printed) == (0, f"{out}: 12 lines\n")
    assert caplog.messages == [f"{masks}: left out 1 mask without an image"]
    assert [name for name, _ in rows(out)[1:]] == sorted(path.name for path in images.iterdir())


def test_missing_doubled_and_broken_masks_are_named_and_no_csv_is_written(pairs_dir, masks, tmp_path, capsys):
    images, out = pairs_dir / "images", tmp_path / "submission.csv"
    out.write_text("the file before")
    given = ("--masks", masks, "--images", images, "--out", out)

    spoilt, small = masks / "car1_02_mask.gif", masks / "car2_04_mask.gif"
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    Image.fromarray(np.ones((32, 48), bool)).save(small)
    status, printed, err = run(capsys, *given)
    assert (status, printed) == (1, "")
    assert err[0].startswith(f"{spoilt}: is ")
    assert err[1].startswith(f"{small}: ")
    assert "96x64" in err[1]
    assert "48x32" in err[1]
    assert err[2].startswith(f"fastseg: 2 of 12 masks cannot be used, so {out} was not written")
    assert len(err) == 3

    (masks / "car0_03_mask.gif").rename(masks / "car0_3_mask.gif")
    status, printed, err = run(capsys, *given)
    assert (status, printed, len(err)) == (2, "", 1)
    assert f"1 of 12 images in {images}" in err[0]
    assert "car0_03.jpg" in err[0]

    shutil.copy(masks / "car0_01_mask.gif", masks / "car0_01.gif")
    status, printed, err = run(capsys, *given)
    assert (status, printed, len(err)) == (2, "", 1)
    assert "car0_01.gif and car0_01_mask.gif" in err[0]
    assert out.read_text() == "the file before"
    assert {path.name for path in tmp_path.iterdir()} == {"masks", "submission.csv"}


def test_place_that_cannot_be_written_is_named(masks, tmp_path, capsys):
    out = tmp_path / "nowhere" / "submission.csv"
    status, printed, err = run(capsys, "--masks", masks, "--out", out)
    assert (status, printed, len(err)) == (2, "", 1)
    assert err[0].startswith(f"fastseg: {out}: ")
    assert run(capsys, "--masks", masks, "--out", out, "--num-workers", -1)[2][0].startswith("fastseg: num_workers: ")
