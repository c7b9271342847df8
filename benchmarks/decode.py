"""Files per second of one thread: our decoders against the libraries that read the same files, bytes in memory.

    python benchmarks/decode.py
    python benchmarks/decode.py --data DIR --files 64 --repeat 11 --json benchmarks/results/decode.json

Every decoder is checked before it is timed: GIFs bit by bit against Pillow, what is averaged down to 160x240 against an
exact average. The last line also has `limit_pairs_per_s`, what libjpeg-turbo's decode at 1/8 would allow on all cores.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from measure import (
    OURS,
    PEER,
    Bar,
    area_average,
    carvana_pairs,
    cores,
    describe,
    draw_bars,
    machine,
    median,
    print_table,
    report,
    spread,
    time_in_turn,
)
from numpy.typing import NDArray
from PIL import Image

from fastseg.data.decode import decode_image, decode_mask
from fastseg.data.gif import decode_gif
from fastseg.data.resample import resize_area, sampling_grid

HEIGHT, WIDTH = 160, 240
PACKAGES = ("opencv-python-headless", "imageio", "spdl-io", "torchvision", "torchcodec")
WRONG_IMAGE = 8.0  # grey levels
TASKS = {"gif": "GIF to all pixels", "mask": "GIF to 160x240", "jpeg": "JPEG to 160x240"}

Pixels = NDArray[Any]


class Decoder(NamedTuple):
    task: str
    name: str
    decode: Callable[[bytes], Pixels]
    on_blocks: bool = False  # samples over whole JPEG blocks, as a decode at 1/8 does


def our_decoders() -> list[Decoder]:
    image, mask = np.empty((HEIGHT, WIDTH, 3), np.uint8), np.empty((HEIGHT, WIDTH), np.uint8)

    def eighth(data: bytes) -> Pixels:
        return simplejpeg.decode_jpeg(data, min_height=HEIGHT, min_width=WIDTH, buffer=image)

    def full(data: bytes) -> Pixels:
        pixels = simplejpeg.decode_jpeg(data)
        grid = sampling_grid(pixels.shape[1], pixels.shape[0], WIDTH, HEIGHT)
        return resize_area(pixels, grid, HEIGHT, WIDTH, image)

    return [
        Decoder("gif", "fastseg", lambda data: decode_gif(data)[0]),
        Decoder("mask", "fastseg, area", lambda data: (decode_mask(data, mask, "area"), mask)[1], True),
        Decoder("mask", "fastseg, nearest", lambda data: (decode_mask(data, mask, "nearest"), mask)[1], True),
        Decoder("jpeg", "fastseg", lambda data: (decode_image(data, image), image)[1], True),
        Decoder("jpeg", "libjpeg-turbo at 1/8", eighth, True),
        Decoder("jpeg", "libjpeg-turbo in full, our area average", full, True),
    ]


def pillow() -> list[Decoder]:
    size = (WIDTH, HEIGHT)

    def open_draft(data: bytes) -> Pixels:
        picture = Image.open(io.BytesIO(data))
        picture.draft("RGB", size)
        return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX))

    def open_full(data: bytes) -> Pixels:
        return np.asarray(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BOX))

    def open_mask(data: bytes) -> Pixels:
        return np.asarray(Image.open(io.BytesIO(data)).convert("L").resize(size, Image.Resampling.BOX))

    return [
        Decoder("gif", "Pillow", lambda data: np.asarray(Image.open(io.BytesIO(data)))),
        Decoder("mask", "Pillow, box", open_mask),
        Decoder("jpeg", "Pillow with draft", open_draft, True),
        Decoder("jpeg", "Pillow in full, box", open_full),
    ]


def opencv() -> list[Decoder]:
    import cv2

    cv2.setNumThreads(1)

    def read(data: bytes, how: int) -> Pixels:
        return cv2.imdecode(np.frombuffer(data, np.uint8), how)

    def resize(pixels: Pixels) -> Pixels:
        return cv2.resize(pixels, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)

    reduced = cv2.IMREAD_REDUCED_COLOR_8
    return [
        Decoder("gif", "OpenCV", lambda data: read(data, cv2.IMREAD_GRAYSCALE)),
        Decoder("mask", "OpenCV, area", lambda data: resize(read(data, cv2.IMREAD_GRAYSCALE))),
        Decoder("jpeg", "OpenCV at 1/8", lambda data: cv2.cvtColor(read(data, reduced), cv2.COLOR_BGR2RGB), True),
        Decoder("jpeg", "OpenCV in full, area", lambda data: resize(read(data, cv2.IMREAD_COLOR))[..., ::-1]),
    ]


def imageio() -> list[Decoder]:
    from imageio.v3 import imread

    def read(data: bytes) -> Pixels:
        pixels = imread(data, extension=".gif", index=0)
        return pixels if pixels.ndim == 2 else pixels[..., 0]

    return [Decoder("gif", "imageio", read)]


def torchvision() -> list[Decoder]:
    from torchvision.io import decode_gif, decode_jpeg
    from torchvision.transforms.v2.functional import resize

    def read(data: bytes) -> Pixels:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return resize(pixels, [HEIGHT, WIDTH], antialias=True).permute(1, 2, 0).numpy()

    def read_gif(data: bytes) -> Pixels:
        return decode_gif(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0].numpy()

    return [Decoder("gif", "torchvision", read_gif), Decoder("jpeg", "torchvision in full, antialiased", read)]


def torchcodec() -> list[Decoder]:
    from torch.nn.functional import interpolate
    from torchcodec.decoders import decode_gif, decode_jpeg

    def read(data: bytes) -> Pixels:
        pixels = interpolate(decode_jpeg(data)[None], (HEIGHT, WIDTH), mode="bilinear", antialias=True)
        return pixels[0].permute(1, 2, 0).numpy()

    return [
        Decoder("gif", "torchcodec", lambda data: decode_gif(data)[0].numpy()),
        Decoder("jpeg", "torchcodec in full, antialiased", read),
    ]


def spdl() -> list[Decoder]:
    import spdl.io

    scale = spdl.io.get_video_filter_desc(scale_width=WIDTH, scale_height=HEIGHT, scale_mode=None, pix_fmt="rgb24")
    lowres = spdl.io.decode_config(decoder_options={"lowres": "3"})

    def read(data: bytes, options: Any = None) -> Pixels:
        return spdl.io.to_numpy(spdl.io.load_image(data, decode_config=options, filter_desc=scale))

    read(simplejpeg.encode_jpeg(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))  # raises where FFmpeg's libraries are missing
    return [
        Decoder("jpeg", "SPDL (FFmpeg) at 1/8", lambda data: read(data, lowres), True),
        Decoder("jpeg", "SPDL (FFmpeg) in full", read),
    ]


def find_decoders() -> tuple[list[Decoder], dict[str, str]]:
    """Ours, those of the peers that are installed, and the peers that are not."""
    found, missing = our_decoders() + pillow(), {}
    for peer in (opencv, imageio, torchvision, torchcodec, spdl):
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
    decoders, missing = find_decoders()
    exact = exact_answers(images, masks)
    errors, jobs = {}, {}
    for decoder in decoders:
        files = images if decoder.task == "jpeg" else masks
        errors[decoder] = check(decoder, files, exact[decoder.task, decoder.on_blocks])
        jobs[decoder] = lambda decode=decoder.decode, files=files: [decode(data) for data in files]
    rates = {d: [len(images) / s for s in seconds] for d, seconds in time_in_turn(jobs, repeat).items()}
    rows = [
        {
            "task": decoder.task,
            "decoder": decoder.name,
            "files_per_s": round(median(rates[decoder]), 1),
            "spread": round(spread(rates[decoder]), 1),
            "error": round(errors[decoder], 5),
        }
        for decoder in decoders
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
