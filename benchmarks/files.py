"""The files that the benchmarks measure on, and what their pixels are exactly."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fastseg
from fastseg.errors import DataError

HEIGHT, WIDTH = 160, 240  # of a decoded pair
SPLITS = ("train", "val")


def carvana_pairs(data: str | None, count: int) -> tuple[fastseg.Pairs, dict[str, Any]]:
    """`count` pairs of DIR/{train,val}_{images,masks}, and their description for the report.

    If there are fewer files, they are used several times. Without a folder, Carvana-like pairs are generated once, in
    the user's cache folder.

    Raises:
        DataError: the folder has no pairs.
    """
    folder = Path(data) if data else _generate(count)
    images, masks = [], []
    for split in SPLITS:
        if (folder / f"{split}_images").is_dir():
            found = fastseg.find_pairs(folder / f"{split}_images", folder / f"{split}_masks")
            images += [f"{split}_images/{name}" for name in found.images]
            masks += [f"{split}_masks/{name}" for name in found.masks]
    if not images:
        raise DataError(f"{folder}: must have train_images and train_masks. Make them with `fastseg synth --out`.")
    files = fastseg.Pairs(str(folder), str(folder), images, masks)
    pairs = files.subset(index % len(files) for index in range(count))
    height, width, _ = read_pixels(pairs.image_path(0), "RGB").shape
    about = {
        "source": "given folder" if data else "fastseg.generate, seed 0",
        "pairs": count,
        "files": min(len(files), count),
        "pixels": f"{width}x{height}",
        "mean_image_kib": _mean_kib(pairs.image_path(index) for index in range(count)),
        "mean_mask_kib": _mean_kib(pairs.mask_path(index) for index in range(count)),
    }
    return pairs, about


def _generate(count: int) -> Path:
    cars = max(2, -(-count // 16))
    return _cached_folder(f"{cars}-cars", cars, parts=False)


def parts_folder() -> Path:
    """The folder of `fastseg synth --cars 16 --parts`, generated once."""
    return _cached_folder("16-cars-parts", 16, parts=True)


def _cached_folder(name: str, cars: int, parts: bool) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseg" / "benchmarks"
    folder = root / name
    if not (folder / "complete").exists():
        print(f"generating {16 * cars} Carvana-like pairs once (0.2 s each on two cores)", file=sys.stderr)
        fastseg.generate(folder, cars=cars, views=16, seed=0, parts=parts)
        (folder / "complete").touch()
    return folder


def _mean_kib(paths: Iterable[str]) -> float:
    return round(float(np.mean([os.path.getsize(path) for path in paths])) / 1024, 1)


def fill_page_cache(pairs: fastseg.Pairs) -> None:
    """Read every file once."""
    for index in range(len(pairs)):
        for path in (pairs.image_path(index), pairs.mask_path(index)):
            Path(path).read_bytes()


def link_pairs(pairs: fastseg.Pairs, folder: Path, split: str, count: int) -> None:
    """Link `count` pairs, in order, into FOLDER/{split}_images and {split}_masks; too few are linked several times."""
    for kind, path_of in (("images", pairs.image_path), ("masks", pairs.mask_path)):
        place = folder / f"{split}_{kind}"
        place.mkdir()
        for index in range(count):
            source = Path(path_of(index % len(pairs))).absolute()
            (place / f"{index:05d}{source.name}").symlink_to(source)


def read_pixels(path: str, mode: str) -> NDArray[np.uint8]:
    """The whole picture, by Pillow."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert(mode))


def cell_means(pixels: NDArray[Any], block: int) -> NDArray[np.float64]:
    """(160, 240, ...): the exact mean of (H, W, ...) over each cell of a grid that covers whole blocks of pixels.

    Args:
        block: 1 for the image's own size, 8 for the blocks of a JPEG, which a decode at 1/8 averages.
    """
    height, width = (-(-size // block) * block for size in pixels.shape[:2])
    return area_average(pixels, (height, width), (HEIGHT, WIDTH))


def area_average(pixels: NDArray[Any], extent: tuple[int, int], target: tuple[int, int]) -> NDArray[np.float64]:
    """The exact mean of (H, W, ...) over each of `target` cells, in float64.

    Args:
        extent: rows and columns that the cells cover; pixels beyond the image repeat its edge.
    """
    rows, columns = (_overlaps(*sizes) for sizes in zip(pixels.shape[:2], extent, target, strict=True))
    return np.moveaxis(np.tensordot(columns, np.tensordot(rows, pixels.astype(np.float64), 1), (1, 1)), 0, 1)


def _overlaps(source: int, extent: int, target: int) -> NDArray[np.float64]:
    """(target, source): the share of each cell that each pixel fills."""
    pixel, edges = np.arange(extent), np.arange(target + 1) * (extent / target)
    overlap = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
    shares = overlap.clip(0) / (extent / target)
    shares[:, source - 1] += shares[:, source:].sum(1)
    return shares[:, :source]
