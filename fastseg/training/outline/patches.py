"""The training data of the outline refiner: patches of training photos about the outlines that the network predicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.data.batch import BadSamples
from fastseg.data.decode import Size, image_size
from fastseg.data.host import HostDecoder, decode_file
from fastseg.data.pairs import Pairs
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import Refiner, find_outline
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.device import Runtime
from fastseg.runtime.out_of_memory import halve_until_it_fits
from fastseg.runtime.threads import count_threads

__all__ = ["PATCH", "Example", "Patches", "cut_patches", "read_examples"]

PATCH = 64  # points of the grid on each side of a patch
MAX_PATCHES, MAX_PER_PHOTO = 8192, 256
MAX_BYTES = 2**28  # of all patches


@dataclass
class Patches:
    """Patches of `PATCH` points on each side, at most; those before the refiner also have its halo around them."""

    photos: Tensor  # (N, P + 2 halo, P + 2 halo, 3) uint8
    logits: Tensor  # (N, C, P + 2 halo, P + 2 halo) float16, upsampled
    masks: Tensor  # (N, P, P) uint8: coverage 0..255, or numbers of classes and IGNORED


@dataclass
class Example:
    """A pair on the grid of the refiner, with the network's logits."""

    photo: Tensor  # (H, W, 3) uint8
    mask: Tensor  # (H, W) uint8: coverage 0..255, or numbers of classes and IGNORED
    logits: Tensor  # (C, h, w) float32, on the CPU
    size: Size  # height and width of the photo itself


def read_examples(pairs: Pairs, model: nn.Module, scale: int, config: Config, runtime: Runtime) -> Iterator[Example]:
    """Decode pairs, at the size of the network and on the grid of the refiner, in order.

    Raises:
        DataError: a pair cannot be decoded.
    """
    settings: dict[str, Any] = {
        "bad": BadSamples(pairs, config.bad_samples),
        "mask_resize": config.mask_resize,
        "classes": config.classes,
        "ignore_value": config.ignore_value,
        "num_workers": count_threads(config.num_workers),
    }
    height, width = config.image_height, config.image_width

    def forward(images: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            logits: Tensor = model(normalise(images.to(runtime.device)))
            return logits.float().cpu()

    predict = halve_until_it_fits(forward, runtime.device)
    small = HostDecoder(pairs, height, width, **settings)
    fine = HostDecoder(pairs, height * scale, width * scale, **settings)
    batches = np.array_split(np.arange(len(pairs)), -(-len(pairs) // (config.micro_batch or config.batch_size)))
    singles = ([index] for index in range(len(pairs)))
    at_full = fine.decode(np.array(single) for single in singles)
    for images, _, indices in small.decode(batches):
        for one, index in zip(predict(images), indices, strict=True):
            photos, masks, found = next(at_full)
            if found[0] == index:  # another pair replaces one that is broken
                yield Example(photos[0], masks[0], one, decode_file(pairs.image_path(index), image_size))


def cut_patches(
    examples: Iterator[Example], num_examples: int, refiner: Refiner, rng: np.random.Generator
) -> Patches | None:
    """Cut patches about the outlines; None if no example has one."""
    photos, logits, masks = [], [], []
    for example in examples:
        places = find_outline(example.logits[None])[0].nonzero().numpy()
        if not len(places):
            continue
        height, width = example.mask.shape
        size = min(PATCH, height, width)
        padded_side = size + 2 * refiner.halo
        num_bytes = padded_side**2 * (3 + 2 * len(example.logits)) + size**2
        count = min(max(min(MAX_PATCHES, MAX_BYTES // num_bytes) // num_examples, 1), MAX_PER_PHOTO)
        border = (refiner.halo, refiner.halo)
        fine = upsample_logits(example.logits[None], *example.size, onto=(height, width))[0]
        fine = torch.from_numpy(np.pad(fine.numpy(), ((0, 0), border, border), "edge"))
        photo = torch.from_numpy(np.pad(example.photo.numpy(), (border, border, (0, 0)), "edge"))
        centres = (places[rng.integers(len(places), size=count)] + rng.random((count, 2))) * int(refiner.scale)
        corners = np.clip(np.round(centres).astype(int) - size // 2, 0, (height - size, width - size))
        for top, left in corners.tolist():
            rows, columns = slice(top, top + padded_side), slice(left, left + padded_side)
            photos.append(photo[rows, columns].clone())
            logits.append(fine[:, rows, columns].half())
            masks.append(example.mask[top : top + size, left : left + size].clone())
    return Patches(torch.stack(photos), torch.stack(logits), torch.stack(masks)) if photos else None
