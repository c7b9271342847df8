"""What the pytest-benchmark versions measure on: a few full-size pairs, quick to make."""

import numpy as np
import pytest
from PIL import Image

import fastseg

NUM_PAIRS = 8


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> fastseg.Pairs:
    """1918x1280 JPEGs and GIF masks: a grainy wall, and a disc that moves."""
    folder = tmp_path_factory.mktemp("bench")
    for part in ("train_images", "train_masks"):
        (folder / part).mkdir()
    y, x = np.ogrid[:1280, :1918]
    grain = np.random.default_rng(0).normal(0, 3, (1280, 1918))
    for index in range(NUM_PAIRS):
        disc = (x - 700 - 60 * index) ** 2 + (y - 640) ** 2 < 450**2
        grey = (np.where(disc, 90, 170) + grain).astype(np.uint8)
        image = Image.merge("RGB", [Image.fromarray(grey)] * 3)
        image.save(folder / "train_images" / f"car_{index + 1:02d}.jpg", quality=55)
        Image.fromarray(disc).save(folder / "train_masks" / f"car_{index + 1:02d}_mask.gif")
    return fastseg.find_pairs(folder / "train_images", folder / "train_masks")
