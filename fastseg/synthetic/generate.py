"""Carvana-like pairs: cars in a photo studio, on a turntable, from 16 views, with exact masks.

Carvana's rules forbid redistributing its images, so tests, benchmarks and the demo use these. Size, file parameters,
names and views are Carvana's, and no threshold separates the car. Scores on them say nothing about real photos.

    fastseg synth --out data --cars 6 --views 16 --seed 0
    fastseg synth --out data --parts                         masks of six classes, and data/classes.json
    fastseg synth --out data --hard                          dark cars on dark floors, reflections, shadows, clutter
"""

import math
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import simplejpeg
from numpy import ndarray

from fastseg.classes import default_colours, read_classes
from fastseg.data.gif import encode_gif
from fastseg.data.labels.palette import classes_json, encode_labels
from fastseg.errors import ConfigError, DataError
from fastseg.messages import count_of
from fastseg.runtime.files import atomic_write, make_folder, target_of_temporary
from fastseg.runtime.progress import progress_bar
from fastseg.runtime.threads import count_threads
from fastseg.synthetic.car import PAINTS, STYLES, make_car
from fastseg.synthetic.hard import dim_studio, hard_paints, render_hard_pair
from fastseg.synthetic.studio import PARTS, make_studio, render_pair

__all__ = ["encode_image", "generate"]

COLOURS = default_colours(len(PARTS))
JPEG_QUALITY = 55  # its luma quantisation table starts with 14 10 9 14 22 36 46 55, as Carvana's does


def encode_image(image: ndarray) -> bytes:
    """Encode an (H, W, 3) uint8 image as Carvana's JPEGs: baseline, 4:2:0, JFIF, no EXIF, standard Huffman tables."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def prepare_folder(folder: Path, names: set[str]) -> None:
    """Make a folder, and remove the temporary files of a killed run.

    Args:
        names: the files that this run will write.

    Raises:
        DataError: the folder holds other files, which are left in place.
        OutputError: the folder cannot be made or written.
    """
    make_folder(folder)
    found = {path: target_of_temporary(path.name) for path in folder.iterdir()}
    others = {target or path.name for path, target in found.items()} - names
    if others:
        raise DataError(
            f"{folder}: must be empty or hold an earlier run with the same cars, views and seed; found "
            f"{count_of(len(others), 'other file')}, first: {min(others)}. Choose another out or move them away."
        )
    for path, target in found.items():
        if target:
            path.unlink(missing_ok=True)


def generate(
    out: str | Path,
    *,
    cars: int = 6,
    views: int = 16,
    seed: int = 0,
    width: int = 1918,
    height: int = 1280,
    parts: bool = False,
    hard: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write Carvana-like pairs to out/{train,val}_{images,masks}; a quarter of the cars, at least one, validate.

    Args:
        out: folder, made if missing. Files of an earlier run with the same arguments are overwritten.
        cars: number of cars, at least 2.
        views: number of images of each car, 1 to 99.
        seed: at least 0; the same seed gives the same bytes, whatever the number of workers.
        width: pixels, at least 32.
        height: pixels, at least 32.
        parts: masks are palette PNGs of the classes in out/classes.json: ground, wall, body, windows, wheels, lights.
            The images are the same.
        hard: dark cars on dark floors, reflections and shadows, and bags, cones, tripods and people before and behind
            the car. They are background; masks stay exact.
        workers: threads, about 250 MB each, 500 MB with `hard`; None for one per core.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        {"train_pairs": int, "val_pairs": int} and the Path of each folder under its name; with `parts` also that of
        "classes".

    Raises:
        ConfigError: a number is out of range.
        DataError: the folders hold other files.
        OutputError: the folders cannot be written.
    """
    rules = (
        ("cars", cars, 2, 10_000, "one for training, one for validation"),
        ("views", views, 1, 99, "file names have two digits for the view"),
        ("seed", seed, 0, 2**63 - 1, "numpy refuses negative seeds"),
        ("width", width, 32, 16_384, "in pixels"),
        ("height", height, 32, 16_384, "in pixels"),
        ("workers", 1 if workers is None else workers, 1, 1024, "the number of threads"),
    )
    for field, value, low, high, why in rules:
        if not low <= value <= high:
            nearest = min(max(value, low), high)
            raise ConfigError(f"{field}: must be {low} to {high} ({why}); got {value}. Use {nearest}.")
    rng = np.random.default_rng(seed)
    stems = [rng.bytes(6).hex() for _ in range(cars)]
    rounds = range(math.ceil(cars / len(STYLES)))  # each style and paint occurs once before any repeats
    styles = [str(style) for _ in rounds for style in rng.permutation(list(STYLES))]
    choices = hard_paints() if hard else list(PAINTS)
    paints = [str(paint) for _ in rounds for paint in rng.permutation(choices)]
    num_train = cars - max(1, math.floor(cars / 4 + 0.5))

    mask_suffix, encode_mask = (
        ("_mask.png", partial(encode_labels, colours=COLOURS)) if parts else ("_mask.gif", encode_gif)
    )
    folders = {name: Path(out) / name for name in ("train_images", "train_masks", "val_images", "val_masks")}
    for name, folder in folders.items():
        members = stems[:num_train] if name.startswith("train") else stems[num_train:]
        suffix = ".jpg" if name.endswith("images") else mask_suffix
        prepare_folder(folder, {f"{stem}_{view:02d}{suffix}" for stem in members for view in range(1, views + 1)})

    made: dict[str, Any] = dict(folders)
    if parts:
        made["classes"] = Path(out) / "classes.json"
        with atomic_write(made["classes"], sync=False) as temporary:
            temporary.write_text(classes_json(read_classes(list(PARTS))), encoding="utf-8")

    stop = Event()

    def write_views(i: int, view_range: range) -> None:
        car_rng = np.random.default_rng((seed, i))
        car = make_car(car_rng, styles[i], paints[i])
        studio = make_studio(car_rng, car, width, height)
        if hard:
            studio = dim_studio(car_rng, studio, car)
        split = "train" if i < num_train else "val"
        for view in view_range:
            if stop.is_set():
                return
            view_rng = np.random.default_rng((seed, i, view))
            turn = math.pi + 2 * math.pi * (view - 1) / views + view_rng.uniform(-0.03, 0.03)
            image, mask = (render_hard_pair if hard else render_pair)(car, studio, turn, view_rng, parts)
            stem = f"{stems[i]}_{view:02d}"
            # The mask first, so that an interrupted run leaves no image without a mask.
            with atomic_write(folders[f"{split}_masks"] / f"{stem}{mask_suffix}", sync=False) as temporary:
                temporary.write_bytes(encode_mask(mask))
            with atomic_write(folders[f"{split}_images"] / f"{stem}.jpg", sync=False) as temporary:
                temporary.write_bytes(encode_image(image))
            bar.advance(task)

    workers = count_threads(workers or 0)
    jobs_per_car = max(1, workers // cars)  # each job builds its car
    with progress_bar(shown=progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("drawing", total=cars * views)
        view_ranges = [range(first, views + 1, jobs_per_car) for first in range(1, jobs_per_car + 1)]
        jobs = [pool.submit(write_views, i, view_range) for i in range(cars) for view_range in view_ranges]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()  # each thread finishes its current pair
            pool.shutdown(cancel_futures=True)
            raise
    return {"train_pairs": num_train * views, "val_pairs": (cars - num_train) * views, **made}
