"""The loaders and augmentations that people use today, each as its documentation shows it.

`name(pairs, workers)` makes a function that takes an epoch's batches of indices and yields (images, masks, indices):
uint8 tensors of 160x240, without augmentation or normalisation, which is less than a user needs. Workers or threads
live as long as the loader where a library allows it.

Pillow reads GIF masks faster than any other peer (decode.py), so all of them read masks with it, one pixel per cell.
Each function imports its library; `make peers` installs them.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from files import HEIGHT, WIDTH
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import fastseg

Batches = list[NDArray[np.int64]]
Epoch = Callable[[Batches], Iterable[tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]]]

# Shows whether a library finds the shared libraries that it decodes with, before workers start.
EXAMPLE = bytearray(simplejpeg.encode_jpeg(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))


@functools.cache
def import_torchvision() -> object:
    """Import torchvision where its operators fit another build of torch.

    The peers `torchvision` and `smp` (which imports torchvision) need this beside the CPU build of torch: PyPI's
    torchvision is built for CUDA, its operators do not load, and the import fails ("operator torchvision::nms does
    not exist"). Names without an implementation let it pass. Networks then work; decoding does not. On a user's
    machine the two builds match, and nothing is defined here.

    Returns:
        What defines the names; they vanish with it.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed: make peers")
    folder, library = Path(spec.origin).parent, torch.library.Library("torchvision", "FRAGMENT")
    try:
        torch.ops.load_library(folder / "_C.so")
    except OSError:
        registrations = (folder / "_meta_registrations.py").read_text()
        for name in re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"\)', registrations):
            library.define(f"{name}(Tensor a) -> Tensor")
    import torchvision  # noqa: F401

    return library


def kornia_augmentation(config: fastseg.Config) -> Any:
    """kornia's classes with the strengths of a configuration: images and masks, float32 in [0, 1]."""
    import kornia.augmentation as K

    sizes = (1 - config.scale, 1 + config.scale)
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=config.flip),
        K.RandomAffine(config.rotation, (config.translation,) * 2, sizes, padding_mode="border", p=1.0),
        K.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue, p=1.0),
        data_keys=["input", "mask"],
    )


def read_mask(path: str) -> NDArray[np.uint8]:
    """(160, 240) of 0 and 255: the pixel at the centre of each cell."""
    mask = np.asarray(Image.open(path))
    rows = (np.arange(HEIGHT) + 0.5) * mask.shape[0] / HEIGHT
    columns = (np.arange(WIDTH) + 0.5) * mask.shape[1] / WIDTH
    return mask[rows.astype(int)[:, None], columns.astype(int)] * np.uint8(255)


class _Files(Dataset):
    def __init__(self, pairs: fastseg.Pairs, read: Callable[[str, str], Any]) -> None:
        self.pairs, self.read = pairs, read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.pairs.image_path(index), self.pairs.mask_path(index))


def _data_loader(
    pairs: fastseg.Pairs, workers: int, read: Callable[[str, str], Any], pin_memory: bool = False
) -> Epoch:
    """torch's DataLoader with persistent workers; its batch sampler is a list that each epoch fills."""
    order: Batches = []
    loader = DataLoader(
        _Files(pairs, read),
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=pin_memory,
        multiprocessing_context="fork",  # the default of Linux, but not in a spawned process
    )

    def epoch(batches: Batches) -> Iterator[Any]:
        order[:] = batches
        for indices, (images, masks) in zip(batches, loader, strict=True):
            yield images, masks, indices

    return epoch


def tutorial(pairs: fastseg.Pairs, workers: int, pin_memory: bool = False) -> Epoch:
    """Pillow and albumentations, as in the Carvana UNet tutorials."""
    import albumentations

    resize = albumentations.Resize(height=HEIGHT, width=WIDTH)

    def read(image: str, mask: str) -> Any:
        pixels, values = np.array(Image.open(image).convert("RGB")), np.array(Image.open(mask).convert("L"))
        both = resize(image=pixels, mask=values)
        return both["image"], both["mask"]

    return _data_loader(pairs, workers, read, pin_memory)


def pillow(pairs: fastseg.Pairs, workers: int, pin_memory: bool = False) -> Epoch:
    """`tutorial` without albumentations: torch resizes as OpenCV does, without antialiasing."""
    from torch.nn.functional import interpolate

    def read(image: str, mask: str) -> Any:
        pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None]
        values = torch.from_numpy(np.array(Image.open(mask).convert("L")))[None, None]
        small = interpolate(pixels, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
        return small[0].permute(1, 2, 0).contiguous(), interpolate(values, (HEIGHT, WIDTH), mode="nearest")[0, 0]

    return _data_loader(pairs, workers, read, pin_memory)


def opencv(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """A full decode and INTER_AREA."""
    import cv2

    cv2.setNumThreads(0)  # the worker processes are the threads

    def read(image: str, mask: str) -> Any:
        pixels = cv2.resize(cv2.imread(image), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), read_mask(mask)

    return _data_loader(pairs, workers, read)


def opencv_eighth(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """IMREAD_REDUCED_COLOR_8: the same libjpeg-turbo 1/8 decode as ours."""
    import cv2

    cv2.setNumThreads(0)

    def read(image: str, mask: str) -> Any:
        pixels = cv2.imread(image, cv2.IMREAD_REDUCED_COLOR_8)
        if pixels.shape[:2] != (HEIGHT, WIDTH):
            pixels = cv2.resize(pixels, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), read_mask(mask)

    return _data_loader(pairs, workers, read)


def torchvision(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """decode_jpeg and an antialiased resize."""
    import_torchvision()
    from torchvision.io import decode_jpeg, read_file
    from torchvision.transforms.v2.functional import resize

    decode_jpeg(torch.frombuffer(EXAMPLE, dtype=torch.uint8))

    def read(image: str, mask: str) -> Any:
        pixels = resize(decode_jpeg(read_file(image)), [HEIGHT, WIDTH], antialias=True)
        return pixels.permute(1, 2, 0), read_mask(mask)

    return _data_loader(pairs, workers, read)


def torchcodec(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """torchcodec's decode_jpeg and torch's antialiased interpolation."""
    from torch.nn.functional import interpolate
    from torchcodec.decoders import decode_jpeg

    def read(image: str, mask: str) -> Any:
        pixels = interpolate(decode_jpeg(image)[None], (HEIGHT, WIDTH), mode="bilinear", antialias=True)
        return pixels[0].permute(1, 2, 0), read_mask(mask)

    return _data_loader(pairs, workers, read)


def _spdl(pairs: fastseg.Pairs, workers: int, decoder_options: dict[str, str] | None, with_masks: bool) -> Epoch:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    spdl.io.load_image(bytes(EXAMPLE))
    scale = spdl.io.get_video_filter_desc(scale_width=WIDTH, scale_height=HEIGHT, scale_mode=None, pix_fmt="rgb24")
    options = spdl.io.decode_config(decoder_options=decoder_options) if decoder_options else None

    def decode(index: int) -> Any:
        packets = spdl.io.demux_image(pairs.image_path(index))
        frames = spdl.io.decode_packets(packets, decode_config=options, filter_desc=scale)
        return frames, read_mask(pairs.mask_path(index)) if with_masks else None

    def collate(samples: list[Any]) -> Any:
        images = spdl.io.to_torch(spdl.io.convert_frames([frames for frames, _ in samples]))
        return images, torch.from_numpy(np.stack([mask for _, mask in samples])) if with_masks else None

    def epoch(batches: Batches) -> Iterator[Any]:
        indices: Iterable[int] = np.concatenate(batches).tolist()
        pipeline = (
            PipelineBuilder()
            .add_source(indices)
            .pipe(decode, concurrency=workers, output_order="input")
            .aggregate(len(batches[0]))
            .pipe(collate)
            .add_sink(3)
            .build(num_threads=workers)
        )
        with pipeline.auto_stop():
            for order, (images, masks) in zip(batches, pipeline, strict=True):
                yield images, masks, order

    return epoch


def spdl(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """SPDL's threads; FFmpeg decodes and resizes."""
    return _spdl(pairs, workers, None, with_masks=True)


def spdl_eighth(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """`spdl` with FFmpeg's option lowres=3, a decode at 1/8."""
    return _spdl(pairs, workers, {"lowres": "3"}, with_masks=True)


def spdl_images(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """`spdl` without masks, as it is usually measured."""
    return _spdl(pairs, workers, None, with_masks=False)
