"""From the bytes of one file to pixels: our decoders, and those of other libraries. decode.py compares them.

Each function imports its library and raises ImportError, OSError or RuntimeError where it does not work.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from files import HEIGHT, WIDTH
from numpy.typing import NDArray
from peers import EXAMPLE, import_torchvision
from PIL import Image

from fastseg.data.decode import decode_image, decode_mask
from fastseg.data.gif import decode_gif_mask
from fastseg.data.resample import resize_area, sampling_grid

Pixels = NDArray[Any]


class Decoder(NamedTuple):
    task: str
    name: str
    decode: Callable[[bytes], Pixels]
    on_blocks: bool = False  # averages whole JPEG blocks, as a decode at 1/8 does


def ours() -> list[Decoder]:
    image, mask = np.empty((HEIGHT, WIDTH, 3), np.uint8), np.empty((HEIGHT, WIDTH), np.uint8)

    def eighth(data: bytes) -> Pixels:
        return simplejpeg.decode_jpeg(data, min_height=HEIGHT, min_width=WIDTH, buffer=image)

    def full(data: bytes) -> Pixels:
        pixels = simplejpeg.decode_jpeg(data)
        grid = sampling_grid(pixels.shape[1], pixels.shape[0], WIDTH, HEIGHT)
        return resize_area(pixels, grid, HEIGHT, WIDTH, image)

    return [
        Decoder("gif", "fastseg", decode_gif_mask),
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
    import_torchvision()
    from torchvision.io import decode_gif, decode_jpeg
    from torchvision.transforms.v2.functional import resize

    def read(data: bytes) -> Pixels:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return resize(pixels, [HEIGHT, WIDTH], antialias=True).permute(1, 2, 0).numpy()

    def read_gif(data: bytes) -> Pixels:
        return decode_gif(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0].numpy()

    read(bytes(EXAMPLE))
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

    read(bytes(EXAMPLE))
    return [
        Decoder("jpeg", "SPDL (FFmpeg) at 1/8", lambda data: read(data, lowres), True),
        Decoder("jpeg", "SPDL (FFmpeg) in full", read),
    ]
