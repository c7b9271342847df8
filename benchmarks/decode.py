"""Files per second of one thread: our decoders against the libraries that read the same files, from bytes in memory.

    .venv-peers/bin/python benchmarks/decode.py
    .venv-peers/bin/python benchmarks/decode.py --data DIR --files 64 --repeat 11 --json benchmarks/results/decode.json

Every decoder is checked before it is timed: GIFs bit by bit against Pillow, resized pictures and masks against exact
averages. `limit_pairs_per_s` is the rate of libjpeg-turbo's decode at 1/8 on all cores.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import torch
from chart import OURS, PEER, Bar, draw_bars
from decoders import Decoder, Pixels
from files import carvana_pairs, cell_means
from measure import median, one_line, spread, time_in_turn
from PIL import Image
from report import cores, describe_machine, make_parser, plus_minus, print_table, run, write_report

PACKAGES = ("opencv-python-headless", "imageio", "spdl-io", "torchvision", "torchcodec")
TASKS = {"gif": "GIF to all pixels", "mask": "GIF to 160x240", "jpeg": "JPEG to 160x240"}
MAX_ERROR = {"gif": 0.0, "mask": 0.02, "jpeg": 8.0}  # share of the pixels; grey levels of a JPEG


def find_decoders() -> tuple[list[Decoder], dict[str, str]]:
    """Our decoders, those of the peers that work here, and the reason why the others do not."""
    found, missing = decoders.ours() + decoders.pillow(), {}
    for peer in (decoders.opencv, decoders.imageio, decoders.torchvision, decoders.torchcodec, decoders.spdl):
        try:
            found += peer()
        except (ImportError, OSError, RuntimeError) as error:
            missing[peer.__name__] = one_line(error)
    return found, missing


def check(decoder: Decoder, files: list[bytes], exact: list[Pixels]) -> float:
    """Mean absolute error in grey levels (JPEG), or the share of pixels on the wrong side of one half (GIF).

    Raises:
        ValueError: the error is larger than MAX_ERROR.
    """
    errors = []
    for data, right in zip(files, exact, strict=True):
        pixels = decoder.decode(data)
        if decoder.task == "jpeg":
            errors.append(np.abs(pixels.astype(np.float64) - right).mean())
        else:  # white is 1 in some decoders, 255 in others
            errors.append(((pixels > pixels.max() / 2) != (right >= 0.5)).mean())
    error = float(np.mean(errors))
    if error > MAX_ERROR[decoder.task]:
        raise ValueError(f"{TASKS[decoder.task]}, {decoder.name}: wrong by {error}, at most {MAX_ERROR[decoder.task]}.")
    return error


def decode_all(decode: Callable[[bytes], Pixels], files: list[bytes]) -> None:
    for data in files:
        decode(data)  # not stored: fresh memory for each result would cost more than a fast decoder


def exact_answers(images: list[bytes], masks: list[bytes]) -> dict[tuple[str, bool], list[Pixels]]:
    """Exact pixels by task, and by whether the grid covers whole JPEG blocks."""
    photos = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    shapes = [np.asarray(Image.open(io.BytesIO(data)).convert("L")) > 0 for data in masks]
    exact: dict[tuple[str, bool], list[Pixels]] = {("gif", False): list(shapes)}
    for block in (1, 8):
        for task, full in (("jpeg", photos), ("mask", shapes)):
            exact[task, block > 1] = [cell_means(pixels, block) for pixels in full]
    return exact


def measure_all(images: list[bytes], masks: list[bytes], repeat: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per decoder, checked and timed, and the peers that are missing."""
    found, missing = find_decoders()
    exact = exact_answers(images, masks)
    errors, jobs = {}, {}
    for decoder in found:
        files = images if decoder.task == "jpeg" else masks
        errors[decoder] = check(decoder, files, exact[decoder.task, decoder.on_blocks])
        jobs[decoder] = partial(decode_all, decoder.decode, files)
    seconds = time_in_turn(jobs, torch.device("cpu"), repeat)
    rows = []
    for decoder in found:
        rates = [len(images) / value for value in seconds[decoder]]
        rows.append(
            {
                "task": decoder.task,
                "decoder": decoder.name,
                "files_per_s": round(median(rates), 1),
                "spread": round(spread(rates), 1),
                "error": round(errors[decoder], 5),
            }
        )
    order = list(TASKS)
    return sorted(rows, key=lambda row: (order.index(row["task"]), -row["files_per_s"])), missing


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The limit, and the speed of our decoder as a multiple of every decoder of the same task."""
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


def print_rows(rows: list[dict[str, Any]], summary: dict[str, Any], missing: dict[str, str]) -> None:
    table = []
    for row in rows:
        times = summary["times_as_fast"][row["task"]][row["decoder"]]
        error = f"{row['error']:.2f}" if row["task"] == "jpeg" else f"{row['error']:.3%}"
        rate = plus_minus(row["files_per_s"], row["spread"])
        table.append([TASKS[row["task"]], row["decoder"], rate, error, f"{times:.2f}"])
    print_table(["task", "decoder", "files/s", "error", "fastseg is x times as fast"], table, missing)
    print("limit: {limit_pairs_per_s:,.0f} pairs/s = {limit_threads} x libjpeg-turbo at 1/8".format(**summary))


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    panels: dict[str, list[Bar]] = {name: [] for name in TASKS.values()}
    for row in rows:
        color = OURS if row["decoder"].startswith("fastseg") else PEER
        panels[TASKS[row["task"]]].append(Bar(row["decoder"], row["files_per_s"], row["spread"], color))
    title = f"Decoding Carvana-like files (1918x1280) with one thread: {describe_machine()}"
    draw_bars(path, title, "Medians with half the interquartile range; files in memory", "files per second", panels)


def main() -> None:
    parser = make_parser(__doc__, data=True)
    parser.add_argument("--files", type=int, default=32, help="of each kind")
    parser.add_argument("--repeat", type=int, default=7, help="passes over the files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, data = carvana_pairs(options.data, options.files)
    images = [Path(pairs.image_path(index)).read_bytes() for index in range(len(pairs))]
    masks = [Path(pairs.mask_path(index)).read_bytes() for index in range(len(pairs))]
    rows, missing = measure_all(images, masks, options.repeat)
    summary = summarise(rows)
    print_rows(rows, summary, missing)
    if options.json:
        draw(Path(options.json).with_suffix(".png"), rows)
    content = {"rows": rows, **summary, "missing": missing, "data": data, "repeat": options.repeat}
    write_report("decode", content, options.json, PACKAGES)


if __name__ == "__main__":
    run(main)
