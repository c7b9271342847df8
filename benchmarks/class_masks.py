"""Files per second of one thread: masks of six classes, from bytes in memory to 160x240 class indices.

    .venv/bin/python benchmarks/class_masks.py
    .venv/bin/python benchmarks/class_masks.py --files 32 --repeat 11 --json benchmarks/results/class_masks.json

The masks are those of `fastseg synth --parts`, 1918x1280, as palette PNGs and as GIFs. Every cell of ours is compared
with a count of its pixels, and every inflated stream with zlib's.
"""

import io
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files import HEIGHT, WIDTH
from measure import median, spread, time_in_turn
from numpy.typing import NDArray
from PIL import Image
from report import make_parser, plus_minus, print_table, run, write_report

import fastseg
from fastseg.data.labels.decode import decode_classes
from fastseg.data.labels.encoding import ClassEncoding
from fastseg.data.labels.inflate import inflate
from fastseg.data.labels.png import read_png
from fastseg.runtime.memory import set_retaining_allocator

PEER = "Pillow, decode and resize to the nearest"


def make_masks(count: int) -> tuple[dict[str, list[bytes]], ClassEncoding]:
    """The masks of `count` views by format, and their classes."""
    with tempfile.TemporaryDirectory() as name:
        made = fastseg.generate(name, cars=2, views=-(-count // 2), parts=True)
        config = fastseg.Config(classes=made["classes"])
        paths = sorted(Path(name).glob("*_masks/*.png"))[:count]
        files: dict[str, list[bytes]] = {"PNG": [path.read_bytes() for path in paths], "GIF": []}
    for data in files["PNG"]:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).save(buffer, "GIF", optimize=False)
        files["GIF"].append(buffer.getvalue())
    return files, ClassEncoding(config.classes, config.ignore_value)


def compressed_pixels(data: bytes) -> bytes:
    """The joined IDAT chunks of a PNG."""
    parts, at = [], 8
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : end])
        at = end + 4
    return b"".join(parts)


def check(decode: Callable[[bytes], NDArray[np.uint8]], files: list[bytes]) -> None:
    """ValueError if a cell is not the class of most of its 8x8 pixels; the grid has 1920 columns, the last repeated."""
    for data in files:
        pixels = np.pad(np.asarray(Image.open(io.BytesIO(data))), ((0, 0), (0, 2)), "edge")
        counts = [(pixels == at).reshape(HEIGHT, 8, WIDTH, 8).sum((1, 3)) for at in range(6)]
        if not np.array_equal(decode(data), np.argmax(counts, 0)):
            raise ValueError("fastseg, area: a cell has not the class of most of its pixels.")


def decode_all(decode: Callable[[bytes], Any], files: list[bytes]) -> None:
    for data in files:
        decode(data)


def our_inflate(stream: bytes, sizes: dict[bytes, int]) -> NDArray[np.uint8]:
    pixels = inflate(stream, sizes[stream])
    if pixels is None:
        raise ValueError("fastseg, inflation: leaves a stream to zlib.")
    return pixels


def find_jobs(files: dict[str, list[bytes]], encoding: ClassEncoding) -> dict[str, Callable[[], None]]:
    out = np.empty((HEIGHT, WIDTH), np.uint8)

    def ours(mode: str, data: bytes) -> NDArray[np.uint8]:
        decode_classes(data, out, mode, encoding)
        return out

    def pillow(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(data)).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))

    streams = [compressed_pixels(data) for data in files["PNG"]]
    sizes = {stream: len(zlib.decompress(stream)) for stream in streams}
    for stream in streams:
        if bytes(our_inflate(stream, sizes)) != zlib.decompress(stream):
            raise ValueError("fastseg, inflation: another content than zlib's.")
    area = partial(ours, "area")
    check(area, files["PNG"])
    check(area, files["GIF"])
    return {
        "fastseg, PNG, area": partial(decode_all, area, files["PNG"]),
        "fastseg, PNG, nearest": partial(decode_all, partial(ours, "nearest"), files["PNG"]),
        "fastseg, GIF, area": partial(decode_all, area, files["GIF"]),
        "fastseg, PNG, pixels alone": partial(decode_all, read_png, files["PNG"]),
        "fastseg, PNG, inflation alone": partial(decode_all, partial(our_inflate, sizes=sizes), streams),
        "zlib, PNG, inflation alone": partial(decode_all, zlib.decompress, streams),
        f"{PEER}, PNG": partial(decode_all, pillow, files["PNG"]),
        f"{PEER}, GIF": partial(decode_all, pillow, files["GIF"]),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7, help="passes over the files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_retaining_allocator()  # as in training
    files, encoding = make_masks(options.files)
    seconds = time_in_turn(find_jobs(files, encoding), torch.device("cpu"), options.repeat)
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        rates = [len(files["PNG"]) / value for value in values]
        rows.append({"decoder": name, "files_per_s": round(median(rates), 1), "spread": round(spread(rates), 1)})
    rate = {row["decoder"]: row["files_per_s"] for row in rows}
    for row in rows:
        row["ms"] = round(1000 / row["files_per_s"], 2)
        row["times_pillow_png"] = round(row["files_per_s"] / rate[f"{PEER}, PNG"], 2)
    cells = [
        [row["decoder"], plus_minus(row["files_per_s"], row["spread"]), f"{row['ms']}", f"{row['times_pillow_png']}"]
        for row in rows
    ]
    print_table(["decoder", "files/s", "ms per file", "x Pillow (PNG)"], cells)
    kib = {kind: round(sum(map(len, datas)) / len(datas) / 1024, 1) for kind, datas in files.items()}
    write_report("class_masks", {"rows": rows, "mean_kib": kib, "repeat": options.repeat}, options.json)


if __name__ == "__main__":
    run(main)
