"""Compile every numba kernel once, so that the first command on a machine does not: `make install` runs it.

numba caches the machine code in the __pycache__ folders beside the sources, or in NUMBA_CACHE_DIR. Cached kernels are
loaded, so a second call takes a second or two.

python scripts/compile_kernels.py
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

import fastseg
from fastseg.data.host import HostDecoder
from fastseg.data.labels.encoding import class_encoding
from fastseg.data.labels.vote import count_bytes, index_colours
from fastseg.data.resample import MASK_MODES
from fastseg.network.outline.crf import mean_field_crf
from fastseg.network.outline.upsample import label_logits
from fastseg.training.step.augment import augment, sample_params

HEIGHT, WIDTH = 32, 48


def compile_kernels(folder: Path) -> None:
    """Call every kernel once, with the types of arguments that fastseg's commands use.

    Args:
        folder: for a few small files.
    """
    made = fastseg.generate(folder, cars=2, views=1, width=2 * WIDTH, height=2 * HEIGHT, workers=1, progress=False)
    images, masks = made["train_images"], made["train_masks"]
    # Beside a JPEG with a GIF mask: a PNG with a PNG mask, whose side is not a multiple of the target's.
    Image.new("RGB", (2 * WIDTH + 1, 2 * HEIGHT + 1)).save(images / "png_01.png")
    Image.new("L", (2 * WIDTH + 1, 2 * HEIGHT + 1)).save(masks / "png_01_mask.png")
    pairs = fastseg.find_pairs(images, masks)
    for mode in MASK_MODES:
        batch = next(HostDecoder(pairs, HEIGHT, WIDTH, mask_resize=mode).decode([np.arange(len(pairs))]))
    compile_class_kernels(images, masks)
    config = fastseg.Config(image_height=HEIGHT, image_width=WIDTH)
    augment(batch.images, batch.masks, sample_params(config, len(pairs), torch.Generator()))
    for labels in (1, 2):
        mean_field_crf(torch.zeros(1, labels, HEIGHT, WIDTH), batch.images[:1])


def compile_class_kernels(images: Path, masks: Path) -> None:
    """The kernels of masks of classes, which are values in a PNG and a GIF, and colours in a PNG."""
    for path in masks.iterdir():
        path.unlink()
    pixels = np.zeros((2 * HEIGHT, 2 * WIDTH), np.uint8)
    for image in images.iterdir():
        kind = "png" if image.suffix == ".png" else "gif"
        with Image.open(image) as photo:
            Image.new("L", photo.size).save(masks / f"{image.stem}_mask.{kind}")
    pairs = fastseg.find_pairs(images, masks)
    classes = fastseg.Config(classes={"wall": 0, "car": 1}).classes
    batch = next(HostDecoder(pairs, HEIGHT, WIDTH, classes=classes).decode([np.arange(len(pairs))]))
    params = sample_params(fastseg.Config(), len(pairs), torch.Generator())
    augment(batch.images, batch.masks, params, classes=True)
    label_logits(np.zeros((2, HEIGHT, WIDTH), np.float32), 2 * HEIGHT, 2 * WIDTH)
    encoding = class_encoding(fastseg.Config(classes={"wall": [0, 0, 0], "car": [1, 1, 1]}).classes, 255)
    count_bytes(index_colours(np.stack([pixels] * 3, 2), *encoding.codes))


if __name__ == "__main__":
    began = time.perf_counter()
    with TemporaryDirectory() as name:
        compile_kernels(Path(name))
    print(f"kernels: compiled and cached in {time.perf_counter() - began:.0f} s")
