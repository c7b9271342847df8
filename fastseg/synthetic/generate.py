"""Carvana-like pairs: cars in a photo studio, turned through 16 views, with exact masks.

Carvana's rules forbid passing its pictures on, so tests, benchmarks and the demo use these: the same size, file
parameters, names and views, and cars that no threshold finds. They say nothing about accuracy on real photos.

    fastseg synth --out data --cars 6 --views 16 --seed 0
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import simplejpeg
from numpy import ndarray

from fastseg.data.gif import encode_gif
from fastseg.errors import ConfigError, DataError
from fastseg.runtime.files import atomic_write, make_folder, target_of_temporary
from fastseg.runtime.progress import progress_bar
from fastseg.synthetic.car import PAINTS, STYLES, make_car
from fastseg.synthetic.studio import make_studio, render_pair

__all__ = ["encode_image", "generate"]

JPEG_QUALITY = 55  # its luma table starts 14 10 9 14 22 36 46 55, as Carvana's does


def encode_image(image: ndarray) -> bytes:
    """(H, W, 3) uint8 to a JPEG as Carvana's: baseline, 4:2:0, JFIF, no EXIF, standard Huffman tables."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def prepare_folder(folder: Path, names: set[str]) -> None:
    """Make the folder. Files in it that this run would not write belong to someone else, and stay."""
    make_folder(folder)
    found = {target_of_temporary(path.name) or path.name for path in folder.iterdir()} - names
    if found:
        raise DataError(
            f"{folder}: must be empty or hold an earlier run with the same cars, views and seed; found {len(found)} "
            f"other files, first: {min(found)}. Choose another out or move them away."
        )


def generate(
    out: str | Path,
    *,
    cars: int = 6,
    views: int = 16,
    seed: int = 0,
    width: int = 1918,
    height: int = 1280,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes out/{train,val}_{images,masks}, split by car: a quarter of the cars, at least one, validates.

    Args:
        out: folder, made if missing. Files of an earlier run with the same arguments are written again.
        cars, views: the number of cars, at least 2, and of pictures of each, 1 to 99.
        seed: at least 0; the same seed gives the same bytes, whatever the number of workers.
        width, height: pixels, at least 32.
        workers: threads, of some 250 MB each; None takes every core this process may use.
        progress: a bar on stderr, if that is a terminal.

    Returns:
        {"train_pairs": int, "val_pairs": int} and the Path of each folder under its name.

    Raises:
        ConfigError: a number is out of range.
        DataError: the folders hold other files.
        OutputError: the folders cannot be written.
    """
    rules = (
        ("cars", cars, 2, 10_000, "one car trains, another validates"),
        ("views", views, 1, 99, "file names have two digits for it"),
        ("seed", seed, 0, 2**63 - 1, "numpy takes no negative seed"),
        ("width", width, 32, 16_384, "in pixels"),
        ("height", height, 32, 16_384, "in pixels"),
        ("workers", 1 if workers is None else workers, 1, 1024, "the number of threads"),
    )
    for field, value, low, high, why in rules:
        if not low <= value <= high:
            use = min(max(value, low), high)
            raise ConfigError(f"{field}: must be {low} to {high} ({why}); got {value}. Use {use}.")
    rng = np.random.default_rng(seed)
    stems = [rng.bytes(6).hex() for _ in range(cars)]
    rounds = range(math.ceil(cars / len(STYLES)))
    styles = [str(style) for _ in rounds for style in rng.permutation(list(STYLES))]
    paints = [str(paint) for _ in rounds for paint in rng.permutation(list(PAINTS))]
    num_train = cars - max(1, math.floor(cars / 4 + 0.5))

    folders = {name: Path(out) / name for name in ("train_images", "train_masks", "val_images", "val_masks")}
    for name, folder in folders.items():
        members = stems[:num_train] if name.startswith("train") else stems[num_train:]
        ending = ".jpg" if name.endswith("images") else "_mask.gif"
        prepare_folder(folder, {f"{stem}_{view:02d}{ending}" for stem in members for view in range(1, views + 1)})

    stop = Event()

    def write_views(i: int, some: range) -> None:
        car_rng = np.random.default_rng((seed, i))
        car = make_car(car_rng, styles[i], paints[i])
        studio = make_studio(car_rng, car, width, height)
        split = "train" if i < num_train else "val"
        for view in some:
            if stop.is_set():
                return
            view_rng = np.random.default_rng((seed, i, view))
            turn = math.pi + 2 * math.pi * (view - 1) / views + view_rng.uniform(-0.03, 0.03)
            image, mask = render_pair(car, studio, turn, view_rng)
            stem = f"{stems[i]}_{view:02d}"
            with atomic_write(folders[f"{split}_masks"] / f"{stem}_mask.gif", sync=False) as temporary:
                temporary.write_bytes(encode_gif(mask))  # before the image, so that no image lacks its mask
            with atomic_write(folders[f"{split}_images"] / f"{stem}.jpg", sync=False) as temporary:
                temporary.write_bytes(encode_image(image))
            bar.advance(task)

    workers = workers or len(os.sched_getaffinity(0))
    parts = max(1, workers // cars)  # of a car's views; each thread builds the car it draws
    with progress_bar(shown=progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("drawing", total=cars * views)
        some_views = [range(first, views + 1, parts) for first in range(1, parts + 1)]
        jobs = [pool.submit(write_views, i, some) for i in range(cars) for some in some_views]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()  # every thread finishes the pair it is at
            pool.shutdown(cancel_futures=True)
            raise
    return {"train_pairs": num_train * views, "val_pairs": (cars - num_train) * views, **folders}
