"""The loaders that people use now, each as its documentation shows it and reduced to this job.

`name(pairs, workers)` makes a function that takes an epoch's batches of indices and yields (images, masks, indices):
uint8 tensors of 160x240, without augmentation or normalisation, which is less than their users do. Workers or threads
live as long as the loader where it can keep them.

Masks: Pillow reads GIFs faster than any other peer (decode.py), so here they all read masks with it, and take every
eighth pixel or so. The libraries are imported when they are used: `pip install '.[peers]'`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import fastseg

HEIGHT, WIDTH = 160, 240

Batches = list[NDArray[np.int64]]
Epoch = Callable[[Batches], Iterable[tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]]]


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
    """torch's DataLoader with worker processes that stay; its batch sampler is the list that an epoch fills."""
    order: Batches = []
    loader = DataLoader(
        _Files(pairs, read),
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=pin_memory,
        multiprocessing_context="fork",  # what Linux does, but for processes that were spawned, as those of loader.py
    )

    def epoch(batches: Batches) -> Iterator[Any]:
        order[:] = batches
        for indices, (images, masks) in zip(batches, loader, strict=True):
            yield images, masks, indices

    return epoch


def tutorial(pairs: fastseg.Pairs, workers: int, pin_memory: bool = False) -> Epoch:
    """Pillow and albumentations, as the Carvana UNet tutorials do."""
    import albumentations

    resize = albumentations.Resize(height=HEIGHT, width=WIDTH)

    def read(image: str, mask: str) -> Any:
        pixels, values = np.array(Image.open(image).convert("RGB")), np.array(Image.open(mask).convert("L"))
        both = resize(image=pixels, mask=values)
        return both["image"], both["mask"]

    return _data_loader(pairs, workers, read, pin_memory)


def pillow(pairs: fastseg.Pairs, workers: int, pin_memory: bool = False) -> Epoch:
    """The tutorial where albumentations is not installed: torch resizes as OpenCV does, without antialiasing."""
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
    from torchvision.io import decode_jpeg, read_file
    from torchvision.transforms.v2.functional import resize

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
    """SPDL's threads; FFmpeg decodes and scales."""
    return _spdl(pairs, workers, None, with_masks=True)


def spdl_eighth(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """The same with FFmpeg's option lowres=3, a decode at 1/8."""
    return _spdl(pairs, workers, {"lowres": "3"}, with_masks=True)


def spdl_images(pairs: fastseg.Pairs, workers: int) -> Epoch:
    """SPDL without any masks, as it is most often measured."""
    return _spdl(pairs, workers, None, with_masks=False)
