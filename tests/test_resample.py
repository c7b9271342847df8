"""resample.py against area averages in NumPy, and photos against masks on one grid."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastseg.data import resample
from fastseg.data.decode import decode_mask
from fastseg.data.resample import Grid, binary_mask, mask_from_array, resize_area, sample_mask, sampling_grid
from fastseg.errors import DataError


def overlaps(extent: int, target: int) -> np.ndarray:
    """(target, extent) share of each pixel in each cell; a row adds up to 1."""
    cells = np.linspace(0, extent, target + 1)
    starts, ends = cells[:-1, None], cells[1:, None]
    pixels = np.arange(extent)
    return np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None) * target / extent


def reference_area(values: np.ndarray, extent_x: int, extent_y: int, shape: tuple[int, int]) -> np.ndarray:
    """Float64 area average of (H, W, ...) values over cells of the extent; pixels beyond repeat the edge."""
    beyond = [(0, extent_y - values.shape[0]), (0, extent_x - values.shape[1])] + [(0, 0)] * (values.ndim - 2)
    padded = np.pad(values.astype(np.float64), beyond, mode="edge")
    rows = np.tensordot(overlaps(extent_y, shape[0]), padded, axes=(1, 0))
    return np.moveaxis(np.tensordot(overlaps(extent_x, shape[1]), rows, axes=(1, 1)), 0, 1)


def assert_rounded(got: np.ndarray, exact: np.ndarray) -> None:
    """Nearest integer, halves up; only where float64 cannot tell a half, either is right."""
    assert got.dtype == np.uint8
    assert got.shape == exact.shape
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-9
    assert np.array_equal(got[clear], np.floor(exact + 0.5)[clear])
    assert np.abs(got - exact).max() <= 0.5 + 1e-9


SIZES = [  # width, height, target width, target height
    (1918, 1280, 240, 160),
    (1280, 1918, 160, 240),
    (1918, 1280, 480, 320),
    (1918, 1280, 959, 640),
    (1918, 1280, 384, 256),
    (1918, 1280, 224, 224),
    (63, 41, 63, 41),
    (37, 50, 60, 60),
    (1, 1, 5, 4),
    (9, 9, 1, 1),
    (3, 900, 2, 7),
    (5000, 3, 40, 5),
    (300, 300, 1, 1),
    (1001, 999, 1000, 1000),
]


def random_sizes(seed: int, count: int) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(2**exponent) for exponent in rng.uniform(0, 8, 4)) for _ in range(count)]


def random_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Half planes and noise: cells of every coverage."""
    x, y = np.arange(width), np.arange(height)[:, None]
    edge = rng.uniform(-1, 1) * (x - width / 2) + rng.uniform(-1, 1) * (y - height / 2) > 0
    return (edge ^ (rng.random((height, width)) < 0.1)).astype(np.uint8)


def test_grid_is_the_smallest_jpeg_scale_that_is_not_below_the_target():
    assert sampling_grid(1918, 1280, 240, 160) == Grid(8, 1920, 1280)
    assert sampling_grid(1918, 1280, 241, 160) == Grid(4, 1920, 1280)
    assert sampling_grid(1918, 1280, 240, 161) == Grid(4, 1920, 1280)
    assert sampling_grid(1918, 1280, 959, 640) == Grid(2, 1918, 1280)
    assert sampling_grid(1918, 1280, 960, 640) == Grid(1, 1918, 1280)
    assert sampling_grid(1, 1, 1, 1) == Grid(8, 8, 8)
    assert sampling_grid(100, 7, 300, 300) == Grid(1, 100, 7)
    for size in [(0, 5, 5, 5), (5, 5, 5, 0), (-1, 5, 5, 5)]:
        with pytest.raises(ValueError, match="at least one pixel"):
            sampling_grid(*size)


def test_mask_cells_are_area_averages():
    rng = np.random.default_rng(0)
    for width, height, target_width, target_height in SIZES + random_sizes(1, 150):
        mask, grid = random_mask(rng, width, height), sampling_grid(width, height, target_width, target_height)
        exact = 255 * reference_area(mask, grid.extent_x, grid.extent_y, (target_height, target_width))
        assert_rounded(mask_from_array(mask * 255, target_height, target_width), exact)


def test_mask_cells_are_nearest_pixels():
    rng = np.random.default_rng(2)
    for width, height, target_width, target_height in SIZES + random_sizes(3, 150):
        mask, grid = random_mask(rng, width, height), sampling_grid(width, height, target_width, target_height)
        # In halves of a cell, so that centres are whole numbers.
        columns = [min((2 * c + 1) * grid.extent_x // (2 * target_width), width - 1) for c in range(target_width)]
        rows = [min((2 * r + 1) * grid.extent_y // (2 * target_height), height - 1) for r in range(target_height)]
        nearest = mask_from_array(mask * 255, target_height, target_width, "nearest")
        assert np.array_equal(nearest, mask[np.ix_(rows, columns)] * 255)


def test_whole_cells_agree_with_cells_of_any_size():
    rng = np.random.default_rng(4)
    for block_x in (1, 2, 4, 8):
        for block_y in (1, 2, 3, 8, 31):
            for cut in (0, block_x - 1):
                mask = random_mask(rng, block_x * 37 - cut, block_y * 11 - min(cut, block_y - 1))
                whole, general = np.empty((2, 11, 37), np.uint8)
                resample._average_blocks(mask, block_x, block_y, whole)
                resample._average_cells(mask, 1, block_x * 37, block_y * 11, 255, general)
                assert np.array_equal(whole, general), (block_x, block_y, cut)
                assert len(np.unique(whole)) > 1
    full = np.ones((31 * 2, 8 * 3), np.uint8)  # the largest sum of a cell
    out = np.empty((2, 3), np.uint8)
    resample._average_blocks(full, 8, 31, out)
    assert (out == 255).all()


def test_images_are_area_averages():
    rng = np.random.default_rng(5)
    for width, height, target_width, target_height in SIZES[5:] + random_sizes(6, 100):
        grid, shape = sampling_grid(width, height, target_width, target_height), (target_height, target_width)
        channels = [(), (1,), (3,)][rng.integers(3)]
        full = rng.integers(0, 256, (height, width, *channels)).astype(np.uint8)
        exact = reference_area(full, grid.extent_x, grid.extent_y, shape)
        assert_rounded(resize_area(full, grid, *shape), exact)
        scaled_shape = (grid.extent_y // grid.denominator, grid.extent_x // grid.denominator)
        scaled = rng.integers(0, 256, (*scaled_shape, *channels)).astype(np.uint8)
        exact = reference_area(scaled, scaled.shape[1], scaled.shape[0], shape)
        assert_rounded(resize_area(scaled, grid, *shape), exact)


def test_resize_area_writes_to_out():
    grid, out = sampling_grid(20, 10, 6, 4), np.zeros((2, 4, 6, 3), np.uint8)
    image = np.full((10, 20, 3), 7, np.uint8)
    assert resize_area(image, grid, 4, 6, out[1]) is not None
    assert (out[1] == 7).all()
    assert not out[0].any()
    same = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(resize_area(same, sampling_grid(6, 4, 6, 4), 4, 6), same)
    readonly = np.broadcast_to(image[:, ::2], image[:, ::2].shape)
    assert (resize_area(readonly, sampling_grid(10, 10, 6, 4), 4, 6) == 7).all()
    for wrong in (np.zeros((4, 5, 3), np.uint8), np.zeros((4, 6, 3), np.int8), np.zeros((4, 12, 3), np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            resize_area(image, grid, 4, 6, wrong)
    with pytest.raises(ValueError, match="full size"):
        resize_area(image[:, :9], grid, 4, 6)
    with pytest.raises(ValueError, match="uint8"):
        resize_area(np.zeros((10, 20)), grid, 4, 6)


def jpeg_at_scale(pixels: np.ndarray, grid: Grid) -> np.ndarray:
    """The pixels as libjpeg-turbo decodes them at 1 / denominator."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    image = Image.open(file)
    image.draft("L", (pixels.shape[1] // grid.denominator, pixels.shape[0] // grid.denominator))
    return np.array(image)


@pytest.mark.parametrize("target", [(160, 240), (320, 480), (640, 959)])
def test_mask_and_image_share_one_grid(target: tuple[int, int]):
    """A mask that is stored as a photo and as a mask gives the same cells, up to the JPEG's own error.

    (If no JPEG scale equals the target, the photo is averaged twice, which blurs its edges without moving them.)
    """
    height, width = 1280, 1918
    x, y = np.arange(width), np.arange(height)[:, None]
    mask = ((x * 7 + y * 3) // 211 % 2).astype(np.uint8)  # slanting edges, up to the right margin
    grid = sampling_grid(width, height, target[1], target[0])
    scaled = jpeg_at_scale(mask * 255, grid)
    assert scaled.shape == (grid.extent_y // grid.denominator, grid.extent_x // grid.denominator)
    image, sampled = resize_area(scaled, grid, *target).astype(float), mask_from_array(mask, *target)
    assert np.abs(image - sampled).mean() < 0.2
    # Proof that this would detect separate grids: at the right margin the edges are off by up to 2 columns.
    if grid.extent_x > width:
        drifted = 255 * reference_area(mask, width, height, target)
        margin = slice(-target[1] // 8, None)
        assert np.abs(image - drifted)[:, margin].mean() > 50 * np.abs(image - sampled)[:, margin].mean()


def mask_gif(mask: np.ndarray, colours: list[int], interlace: int = 0) -> bytes:
    image, file = Image.fromarray(mask), io.BytesIO()
    image.putpalette(colours)
    image.save(file, "GIF", interlace=interlace, optimize=False)
    return file.getvalue()


def mask_from_gif(data: bytes, target_height: int, target_width: int, mode: str = "area") -> np.ndarray:
    out = np.empty((target_height, target_width), np.uint8)
    decode_mask(data, out, mode)
    return out


@pytest.mark.parametrize("mode", ["area", "nearest"])
def test_gif_and_array_masks_agree(mode: str):
    rng = np.random.default_rng(7)
    for width, height, target_width, target_height in [*SIZES[:2], *random_sizes(8, 100)]:
        mask = random_mask(rng, width, height)
        mask[0, 0], mask[-1, -1] = 0, 1
        if mask.size == 1:
            continue
        data = mask_gif(mask, [[0, 0, 0, 255, 255, 255], [1, 2, 3, 1, 2, 9]][rng.integers(2)], int(rng.integers(2)))
        low, high = np.sort(rng.choice(256, 2, replace=False))
        values = np.where(mask, high, low).astype(np.uint8)
        got = mask_from_gif(data, target_height, target_width, mode)
        assert np.array_equal(got, mask_from_array(values, target_height, target_width, mode))
        inverted = mask_from_gif(mask_gif(mask, [9, 9, 9, 0, 0, 0]), target_height, target_width, mode)
        assert np.array_equal(inverted, mask_from_array(1 - mask, target_height, target_width, mode))


def test_masks_of_one_value():
    assert (mask_from_array(np.zeros((9, 9), np.uint8), 2, 3) == 0).all()
    assert (mask_from_array(np.full((9, 9), 1, np.uint8), 2, 3) == 255).all()
    assert (mask_from_array(np.full((9, 9), 255, np.uint8), 2, 3, "nearest") == 255).all()
    assert (mask_from_array(np.ones((9, 9), bool), 2, 3) == 255).all()
    flat = np.zeros((9, 9), np.uint8)
    assert (mask_from_gif(mask_gif(flat, [0, 0, 0, 255, 255, 255]), 2, 3) == 0).all()
    assert (mask_from_gif(mask_gif(flat, [0, 0, 1, 255, 255, 255]), 2, 3) == 255).all()
    assert (mask_from_gif(mask_gif(flat, [0, 9, 0, 255, 255, 255]), 2, 3) == 255).all()
    two_of_one_luma = np.arange(81, dtype=np.uint8).reshape(9, 9) % 2
    assert (mask_from_gif(mask_gif(two_of_one_luma, [7, 7, 7, 7, 7, 7]), 2, 3) == 255).all()


def test_masks_of_other_layouts():
    mask = random_mask(np.random.default_rng(9), 50, 40)
    expected = mask_from_array(mask, 6, 7)
    assert np.array_equal(mask_from_array(mask.astype(bool), 6, 7), expected)
    assert np.array_equal(mask_from_array(np.asfortranarray(mask), 6, 7), expected)
    assert np.array_equal(mask_from_array(np.repeat(mask, 2, axis=1)[:, ::2], 6, 7), expected)
    assert np.array_equal(mask_from_array(np.broadcast_to(mask, mask.shape), 6, 7), expected)  # read-only


def test_masks_of_more_than_two_values_are_refused():
    three = np.array([[0, 1, 2]], np.uint8)
    with pytest.raises(DataError, match=r"two values.* 3$") as caught:
        binary_mask(three)
    assert caught.value.kind == "values"


@pytest.mark.parametrize("values", [np.zeros((1, 3), np.uint16), np.zeros((2, 2, 1), np.uint8), np.zeros((3, 0), bool)])
def test_other_arrays_are_no_masks(values: np.ndarray):
    with pytest.raises(ValueError, match="mask must be uint8 or bool"):
        binary_mask(values)


def test_mode_and_target_are_checked():
    mask = np.ones((3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"mode.*area, nearest.*bilinear"):
        sample_mask(mask, np.empty((2, 2), np.uint8), "bilinear")
    with pytest.raises(ValueError, match="at least one pixel"):
        sample_mask(mask, np.empty((0, 2), np.uint8))


def test_a_refused_mask_leaves_out_untouched():
    data = mask_gif(random_mask(np.random.default_rng(11), 90, 90), [0, 0, 0, 1, 1, 1])
    out = np.full((4, 4), 77, np.uint8)
    with pytest.raises(DataError, match="truncated"):
        decode_mask(data[:-300], out, "area")
    assert (out == 77).all()


def test_threads_share_nothing():
    rng = np.random.default_rng(12)
    masks = [random_mask(rng, 300 + 10 * i, 200) for i in range(8)]
    files = [mask_gif(mask, [0, 0, 0, 1, 1, 1], i % 2) for i, mask in enumerate(masks)]
    alone = [mask_from_gif(data, 25, 38) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: mask_from_gif(files[i % 8], 25, 38), range(400)))
    assert all(np.array_equal(got, alone[i % 8]) for i, got in enumerate(together))
