"""check_pairs: every faulty file is found and named before training, and no good one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.data.decode import decode_mask
from fastseg.quality.headers import check_pairs, check_sets
from tests.conftest import write_pair

WIDTH, HEIGHT = 96, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good pairs: a_01, b_01, c_01."""
    for seed, name in enumerate(("a_01", "b_01", "c_01")):
        write_pair(tmp_path, name, WIDTH, HEIGHT, seed)
    return tmp_path


def find(folder: Path) -> fastseg.Pairs:
    return fastseg.find_pairs(folder / "images", folder / "masks")


def refusal(*sets: fastseg.Pairs, bad_samples: str = "raise") -> str:
    with pytest.raises(fastseg.DataError) as error:
        check_sets(sets, bad_samples=bad_samples)
    return str(error.value)


def assert_names(message: str, path: Path, *words: object) -> None:
    """The message counts one pair, names the file, and offers both remedies."""
    assert "1 of 3 pairs" in message
    assert f"{path}: " in message
    for word in ("Replace the files", 'bad_samples="skip"', *words):
        assert str(word) in message


def cut(path: Path) -> None:
    """Drop the last third of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def grey_levels(count: int) -> Image.Image:
    return Image.fromarray((np.arange(WIDTH * HEIGHT) % count * 20).astype(np.uint8).reshape(HEIGHT, WIDTH))


def read_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def save_bytes(path: Path, image: Image.Image, kind: str, **options) -> None:
    """Save in a format that the file's name may contradict."""
    with open(path, "wb") as file:
        image.save(file, kind, **options)


def test_good_pairs_pass_as_they_are(pairs):
    assert check_pairs(pairs) is pairs
    assert check_pairs(pairs, bad_samples="skip") is pairs


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_image_is_named(kind, folder):
    path = folder / "images" / "b_01.jpg"
    save_bytes(path, read_picture(path), kind)
    check_pairs(find(folder))  # complete, and its format is that of its content, not of its name
    cut(path)
    assert_names(refusal(find(folder)), path, "1 unreadable", "truncated")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_truncated_mask_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, read_picture(path).convert("1"), kind)
    check_pairs(find(folder))
    cut(path)
    assert_names(refusal(find(folder)), path, "1 unreadable", "truncated")


@pytest.mark.parametrize("name", ["images/b_01.jpg", "masks/b_01_mask.gif"])
@pytest.mark.parametrize(
    ("content", "fault"), [(b"", "empty"), (b"no picture", "no image"), (b"\xff\xd8\xff\xe0", "no image")]
)
def test_file_that_is_no_image_is_named(name, content, fault, folder):
    (folder / name).write_bytes(content)
    assert_names(refusal(find(folder)), folder / name, "1 unreadable", fault)


@pytest.mark.parametrize("name", ["images/b_01.jpg", "masks/b_01_mask.gif"])
def test_broken_link_is_named(name, folder):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")
    assert_names(refusal(find(folder)), folder / name, "1 unreadable", "No such file")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_mask_of_another_size_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, Image.new("1", (HEIGHT, WIDTH)), kind)
    assert_names(refusal(find(folder)), path, "another size", "96x64", "64x96")


def test_sizes_are_those_displayed(folder):
    """A photo that EXIF rotates by 90 degrees needs a mask of the rotated size."""
    image, mask = folder / "images/b_01.jpg", folder / "masks/b_01_mask.gif"
    exif = Image.Exif()
    exif[0x0112] = 6
    read_picture(image).save(image, exif=exif)
    assert_names(refusal(find(folder)), mask, "another size", "64x96", "96x64")
    read_picture(mask).convert("1").transpose(Image.Transpose.ROTATE_270).save(mask)
    check_pairs(find(folder))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_mask_of_three_values_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, grey_levels(3), kind)
    assert_names(refusal(find(folder)), path, "1 with a mask of more than two values", "found 3")


BLOB = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOB[10:40, 20:70] = 1


def with_palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        *((kind, Image.fromarray(BLOB)) for kind in ("PNG", "BMP", "GIF")),  # 0 and 1
        *((kind, Image.fromarray(BLOB * 255)) for kind in ("PNG", "BMP", "GIF")),
        *((kind, Image.fromarray(BLOB.astype(bool))) for kind in ("PNG", "BMP", "GIF")),
        *((kind, with_palette(BLOB, (0, 0, 0), (255, 255, 255))) for kind in ("PNG", "GIF")),
        *((kind, with_palette(1 - BLOB, (255, 255, 255), (0, 0, 0))) for kind in ("PNG", "BMP", "GIF")),
        *((kind, with_palette(BLOB, (0, 0, 128), (255, 255, 0))) for kind in ("PNG", "BMP", "GIF")),
        ("PNG", with_palette(BLOB * 7, *[(0, 0, 0)] * 7, (128, 0, 0))),
    ],
)
def test_masks_of_two_values_all_mean_the_same(kind, image, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, image, kind)
    check_pairs(find(folder))
    mask = np.empty((HEIGHT, WIDTH), np.uint8)
    assert decode_mask(path.read_bytes(), mask, "area") == (HEIGHT, WIDTH)
    assert np.array_equal(mask, BLOB * 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_mask_of_nothing_is_a_mask(kind, folder):
    save_bytes(folder / "masks" / "b_01_mask.gif", Image.new("1", (WIDTH, HEIGHT)), kind)
    check_pairs(find(folder))


def damaged(folder: Path) -> fastseg.Pairs:
    """Seven pairs: two unreadable, one of two sizes, one of three values, three good."""
    for seed, name in enumerate(("d_01", "e_01", "f_01", "g_01")):
        write_pair(folder, name, WIDTH, HEIGHT, seed + 3)
    (folder / "images" / "a_01.jpg").write_bytes(b"")
    (folder / "masks" / "c_01_mask.gif").write_bytes(b"")
    Image.new("1", (10, 20)).save(folder / "masks" / "e_01_mask.gif")
    grey_levels(5).save(folder / "masks" / "g_01_mask.gif")
    return find(folder)


def test_faults_are_counted_by_kind_and_the_first_of_each_is_named(folder):
    message = refusal(damaged(folder))
    assert "4 of 7 pairs" in message
    assert "(2 unreadable, 1 with a mask of another size, 1 with a mask of more than two values)" in message
    named = [file for file in folder.glob("*/*") if f"{file}: " in message]
    assert {file.name for file in named} == {"a_01.jpg", "e_01_mask.gif", "g_01_mask.gif"}


def test_training_and_validation_are_reported_together(folder):
    pairs = damaged(folder)
    train, val = pairs.subset([0, 1, 2]), pairs.subset([3, 4, 5, 6])
    assert refusal(train, val) == refusal(pairs)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_skip_logs_each_and_returns_the_others(num_workers, folder, caplog):
    pairs = check_pairs(damaged(folder), bad_samples="skip", num_workers=num_workers)
    assert pairs.images == ["b_01.jpg", "d_01.jpg", "f_01.jpg"]
    assert pairs.masks == ["b_01_mask.gif", "d_01_mask.gif", "f_01_mask.gif"]
    assert pairs.left_out == ("a_01.jpg", "c_01.jpg", "e_01.jpg", "g_01.jpg")
    bad = ("images/a_01.jpg", "masks/c_01_mask.gif", "masks/e_01_mask.gif", "masks/g_01_mask.gif")
    for message, name in zip(caplog.messages, bad, strict=True):
        assert message.startswith(f"left out: {folder / name}: ")


def test_skip_extends_left_out(folder):
    (folder / "masks" / "a_01_mask.gif").unlink()
    (folder / "images" / "b_01.jpg").write_bytes(b"")
    pairs = fastseg.find_pairs(folder / "images", folder / "masks", bad_samples="skip")
    assert check_pairs(pairs, bad_samples="skip").left_out == ("a_01.jpg", "b_01.jpg")


def test_skip_refuses_a_set_without_a_usable_pair(folder):
    pairs = find(folder)
    (folder / "masks" / "c_01_mask.gif").write_bytes(b"")
    train, val = pairs.subset([0, 1]), pairs.subset([2])
    message = refusal(train, val, bad_samples="skip")
    assert message.startswith(f"{folder}/images: 1 of 1 pairs")
    assert "c_01_mask.gif: is empty" in message
    assert "bad_samples" not in message


def read_without_hanging(code: str, folder: Path) -> str:
    """Run code in a process, which is ended after a while: reading a FIFO would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=40,
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n"
        "from fastseg.data.host import read_file\n"
        "from fastseg.network.checkpoint import load_checkpoint\n"
        "for name in 'zero.jpg', 'fifo.jpg':\n"
        "    for read in read_file, load_checkpoint:\n"
        "        try: read(name)\n"
        "        except Exception as error: print(type(error).__name__, error)\n"
    )
    output = read_without_hanging(code, tmp_path)
    assert output.count("DataError") == output.count("CheckpointError") == 2, output
    assert output.count("is not a regular file") == 4, output
