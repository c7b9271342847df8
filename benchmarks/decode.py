"""Files per second of one thread: our decoders against the libraries that read the same files, bytes in memory.

    python benchmarks/decode.py
    python benchmarks/decode.py --data DIR --files 64 --repeat 11 --json benchmarks/results/decode.json

Every decoder is checked before it is timed: GIFs bit by bit against Pillow, what is averaged down to 160x240 against an
exact average. The last line also has `limit_pairs_per_s`, what libjpeg-turbo's decode at 1/8 would allow on all cores.
"""

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import torch
from chart import OURS, PEER, Bar, draw_bars
from decoders import HEIGHT, WIDTH, Decoder, Pixels
from measure import (
    area_average,
    carvana_pairs,
    cores,
    describe,
    machine,
    median,
    print_table,
    report,
    spread,
    time_in_turn,
)
from PIL import Image

PACKAGES = ("opencv-python-headless", "imageio", "spdl-io", "torchvision", "torchcodec")
WRONG_IMAGE = 8.0  # grey levels
TASKS = {"gif": "GIF to all pixels", "mask": "GIF to 160x240", "jpeg": "JPEG to 160x240"}


def find_decoders() -> tuple[list[Decoder], dict[str, str]]:
    """Ours, those of the peers that are installed, and the peers that are not."""
    found, missing = decoders.ours() + decoders.pillow(), {}
    for peer in (decoders.opencv, decoders.imageio, decoders.torchvision, decoders.torchcodec, decoders.spdl):
        try:
            found += peer()
        except (ImportError, OSError, RuntimeError) as error:
            missing[peer.__name__] = f"not installed ({type(error).__name__})"
    return found, missing


def check(decoder: Decoder, files: list[bytes], exact: list[Pixels]) -> float:
    """Mean absolute error in grey levels (JPEG), or the share of pixels on the wrong side of one half (GIF).

    Raises:
        ValueError: the decoder is wrong.
    """
    errors = []
    for data, right in zip(files, exact, strict=True):
        pixels = decoder.decode(data)
        if decoder.task == "jpeg":
            errors.append(np.abs(pixels.astype(np.float64) - right).mean())
        else:  # some say 1, some 255 for white
            errors.append(((pixels > pixels.max() / 2) != (right >= 0.5)).mean())
    error = float(np.mean(errors))
    if error > {"gif": 0.0, "mask": 0.02, "jpeg": WRONG_IMAGE}[decoder.task]:
        raise ValueError(f"{TASKS[decoder.task]}, {decoder.name}: wrong by {error}.")
    return error


def decode_all(decode: Callable[[bytes], Pixels], files: list[bytes]) -> None:
    for data in files:
        decode(data)  # not kept: memory that the system hands out anew would cost more than a fast decoder


def exact_answers(images: list[bytes], masks: list[bytes]) -> dict[tuple[str, bool], list[Pixels]]:
    """By task and whether cells cover whole JPEG blocks."""
    photos = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    shapes = [np.asarray(Image.open(io.BytesIO(data)).convert("L")) > 0 for data in masks]
    exact: dict[tuple[str, bool], list[Pixels]] = {("gif", False): list(shapes)}
    for block in (1, 8):
        for task, full in (("jpeg", photos), ("mask", shapes)):
            extents = [(-(-size[0] // block) * block, -(-size[1] // block) * block) for size in (x.shape for x in full)]
            averages = [area_average(x, extent, (HEIGHT, WIDTH)) for x, extent in zip(full, extents, strict=True)]
            exact[task, block > 1] = averages
    return exact


def measure_all(images: list[bytes], masks: list[bytes], repeat: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row a decoder, checked and timed, and the peers that are missing."""
    found, missing = find_decoders()
    exact = exact_answers(images, masks)
    errors, jobs = {}, {}
    for decoder in found:
        files = images if decoder.task == "jpeg" else masks
        errors[decoder] = check(decoder, files, exact[decoder.task, decoder.on_blocks])
        jobs[decoder] = partial(decode_all, decoder.decode, files)
    rates = {d: [len(images) / s for s in seconds] for d, seconds in time_in_turn(jobs, repeat).items()}
    rows = [
        {
            "task": decoder.task,
            "decoder": decoder.name,
            "files_per_s": round(median(rates[decoder]), 1),
            "spread": round(spread(rates[decoder]), 1),
            "error": round(errors[decoder], 5),
        }
        for decoder in found
    ]
    order = list(TASKS)
    return sorted(rows, key=lambda row: (order.index(row["task"]), -row["files_per_s"])), missing


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The limit, and our decoders' speed as multiples of each other one of the task."""
    rate = {(row["task"], row["decoder"]): row["files_per_s"] for row in rows}
    times = {
        task: {name: round(rate[task, ours] / value, 2) for (other, name), value in rate.items() if other == task}
        for task, ours in (("gif", "fastseg"), ("mask", "fastseg, area"), ("jpeg", "fastseg"))
    }
    return {
        "limit_pairs_per_s": round(cores() * rate["jpeg", "libjpeg-turbo at 1/8"], 1),
        "limit_threads": cores(),
        "times_as_fast": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with train_images and train_masks; default: make Carvana-like pairs")
    parser.add_argument("--files", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", default="", metavar="FILE", help="write the result here, and a chart beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    pairs, data = carvana_pairs(options.data, options.files)
    images = [Path(pairs.image_path(index)).read_bytes() for index in range(len(pairs))]
    masks = [Path(pairs.mask_path(index)).read_bytes() for index in range(len(pairs))]
    rows, missing = measure_all(images, masks, options.repeat)
    summary = summarise(rows)
    table = []
    for row in rows:
        times = summary["times_as_fast"][row["task"]][row["decoder"]]
        error = f"{row['error']:.2f}" if row["task"] == "jpeg" else f"{row['error']:.3%}"
        cells = [TASKS[row["task"]], row["decoder"], f"{row['files_per_s']:,.0f} ± {row['spread']:,.0f}", error]
        table.append([*cells, f"{times:.2f}"])
    print_table(["task", "decoder", "files/s", "error", "fastseg is x times as fast"], table)
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    print("limit: {limit_pairs_per_s:,.0f} pairs/s = {limit_threads} x libjpeg-turbo at 1/8".format(**summary))
    if options.json:
        chart = str(Path(options.json).with_suffix(".png"))
        panels: dict[str, list[Bar]] = {name: [] for name in TASKS.values()}
        for row in rows:
            color = OURS if row["decoder"].startswith("fastseg") else PEER
            panels[TASKS[row["task"]]].append(Bar(row["decoder"], row["files_per_s"], row["spread"], color))
        title = f"Decoding Carvana-like files (1918x1280) with one thread: {describe(about)}"
        subtitle = "Medians; half the interquartile range as error bar; files in memory"
        draw_bars(chart, title, subtitle, "files per second", panels)
    content = {"rows": rows, **summary, "missing": missing, "data": data, "repeat": options.repeat}
    report("decode", content, about, PACKAGES, options.json)


if __name__ == "__main__":
    main()
