"""check_pairs: what is found wrong in the files before training, in which words, and what is no fault."""

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
    """Whatever the name of the file says."""
    with open(path, "wb") as file:
        image.save(file, kind, **options)


def test_good_pairs_pass_as_they_are(pairs):
    assert check_pairs(pairs) is pairs
    assert check_pairs(pairs, bad_samples="skip") is pairs


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_image_is_named(kind, folder):
    path = folder / "images" / "b_01.jpg"
    save_bytes(path, read_picture(path), kind)
    check_pairs(find(folder))  # whole, and named .jpg whatever it is: the content decides
    cut(path)
    sentence = refusal(find(folder))
    assert sentence.startswith(f"1 of 3 pairs cannot be used (1 unreadable); first: {path}: ")
    assert "truncated" in sentence
    assert sentence.endswith('. Replace the files, or pass bad_samples="skip" to leave them out.')


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_truncated_mask_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, read_picture(path).convert("1"), kind)
    check_pairs(find(folder))
    cut(path)
    sentence = refusal(find(folder))
    assert sentence.startswith(f"1 of 3 pairs cannot be used (1 unreadable); first: {path}: ")
    assert "truncated" in sentence


@pytest.mark.parametrize("name", ["images/b_01.jpg", "masks/b_01_mask.gif"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty (0 bytes)"),
        (b"no picture", "is no image that can be read (JPEG, PNG, BMP, WebP; masks also GIF)"),
        (b"\xff\xd8\xff\xe0", "is no image that can be read (JPEG, PNG, BMP, WebP; masks also GIF)"),
    ],
)
def test_file_that_is_no_image_is_named(name, content, fault, folder):
    (folder / name).write_bytes(content)
    assert refusal(find(folder)) == (
        f"1 of 3 pairs cannot be used (1 unreadable); first: {folder / name}: {fault}. "
        'Replace the files, or pass bad_samples="skip" to leave them out.'
    )


@pytest.mark.parametrize("name", ["images/b_01.jpg", "masks/b_01_mask.gif"])
def test_link_to_nothing_is_named(name, folder):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")
    sentence = refusal(find(folder))
    assert f"first: {folder / name}: cannot be read (No such file or directory). Replace" in sentence


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_mask_of_another_size_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, Image.new("1", (HEIGHT, WIDTH)), kind)
    assert refusal(find(folder)) == (
        f"1 of 3 pairs cannot be used (1 with a mask of another size); first: {path}: "
        "must have its image's size, 96x64; it has 64x96. "
        'Replace the files, or pass bad_samples="skip" to leave them out.'
    )


def test_sizes_are_those_displayed(folder):
    """A photo that EXIF turns by 90 degrees belongs to a mask of the turned size, and to no other."""
    image, mask = folder / "images" / "b_01.jpg", folder / "masks" / "b_01_mask.gif"
    exif = Image.Exif()
    exif[0x0112] = 6
    read_picture(image).save(image, exif=exif)
    assert "must have its image's size, 64x96; it has 96x64" in refusal(find(folder))
    read_picture(mask).convert("1").transpose(Image.Transpose.ROTATE_270).save(mask)
    check_pairs(find(folder))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "BMP"])
def test_mask_of_three_values_is_named(kind, folder):
    path = folder / "masks" / "b_01_mask.gif"
    save_bytes(path, grey_levels(3), kind)
    assert refusal(find(folder)) == (
        f"1 of 3 pairs cannot be used (1 with a mask of more than two values); first: {path}: "
        "a mask must have two values; found 3. "
        'Replace the files, or pass bad_samples="skip" to leave them out.'
    )


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


def test_all_faults_are_counted_by_kind_and_the_first_of_each_is_named(folder):
    assert refusal(damaged(folder)) == (
        "4 of 7 pairs cannot be used (2 unreadable, 1 with a mask of another size, 1 with a mask of more than two "
        f"values); first: {folder}/images/a_01.jpg: is empty (0 bytes); {folder}/masks/e_01_mask.gif: must have its "
        f"image's size, 96x64; it has 10x20; {folder}/masks/g_01_mask.gif: a mask must have two values; found 5. "
        'Replace the files, or pass bad_samples="skip" to leave them out.'
    )


def test_training_and_validation_are_reported_together(folder):
    pairs = damaged(folder)
    train, val = pairs.subset([0, 1, 2]), pairs.subset([3, 4, 5, 6])
    assert refusal(train, val) == refusal(pairs)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_skip_names_each_and_keeps_the_rest(num_workers, folder, caplog):
    pairs = check_pairs(damaged(folder), bad_samples="skip", num_workers=num_workers)
    assert pairs.images == ["b_01.jpg", "d_01.jpg", "f_01.jpg"]
    assert pairs.masks == ["b_01_mask.gif", "d_01_mask.gif", "f_01_mask.gif"]
    assert pairs.left_out == ("a_01.jpg", "c_01.jpg", "e_01.jpg", "g_01.jpg")
    assert caplog.messages == [
        f"left out: {folder}/images/a_01.jpg: is empty (0 bytes)",
        f"left out: {folder}/masks/c_01_mask.gif: is empty (0 bytes)",
        f"left out: {folder}/masks/e_01_mask.gif: must have its image's size, 96x64; it has 10x20",
        f"left out: {folder}/masks/g_01_mask.gif: a mask must have two values; found 5",
    ]


def test_skip_adds_to_what_was_left_out_before(folder):
    (folder / "masks" / "a_01_mask.gif").unlink()
    (folder / "images" / "b_01.jpg").write_bytes(b"")
    pairs = fastseg.find_pairs(folder / "images", folder / "masks", bad_samples="skip")
    assert check_pairs(pairs, bad_samples="skip").left_out == ("a_01.jpg", "b_01.jpg")


def test_skip_refuses_a_set_of_which_nothing_is_left(folder):
    pairs = find(folder)
    (folder / "masks" / "c_01_mask.gif").write_bytes(b"")
    train, val = pairs.subset([0, 1]), pairs.subset([2])
    assert refusal(train, val, bad_samples="skip") == (
        f"{folder}/images: 1 of 1 pairs cannot be used (1 unreadable); first: {folder}/masks/c_01_mask.gif: "
        "is empty (0 bytes). Replace the files."
    )
