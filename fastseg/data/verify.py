"""Cached pixels against the host decoder's: a sample of rows is decoded again after the epoch that filled them.

A GPU's decoder can tear a picture without an error, and the cache would keep it for every epoch.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.data.cache import Cache
from fastseg.data.decode import decode_image
from fastseg.data.host import HostDecoder, decode_file
from fastseg.errors import DataError, FastsegError

__all__ = ["verify_rows"]

SAMPLE = 16  # rows
BLOCK = 4  # pixels

# The largest difference between decoders, in grey levels. The IDCT, colour conversion and chroma upsampling of DALI and
# the host change the grain of a picture, but hardly the means of its blocks. Measured with DALI 2.4 on a CPU: 85 photos
# of 100x90 to 1918x1280 on grids of 16x24 to 330x500; the largest mean of a row of pixels, then of a block.
#     rendered cars 0.4, 0.8; textured, odd sizes, EXIF, progressive, grey 2.2, 2.2; PNG 0, 0
#     noise 15, 5.3; red and blue squares of 3 pixels 37, 5.7
#     cars with a twentieth of the rows from another view: 50 and more for a block (one row on a grid of 16x24: 13)
TOLERANCES = {"host": 0.0, "dali": 10.0}
REMEDIES = {
    "host": "The file has changed since, or the memory is damaged: start again, or use cache=off",
    "dali": "DALI may have torn the picture: use decoder=host",
}


def verify_rows(cache: Cache, decoder: HostDecoder) -> None:
    """Decode 16 cached rows again on the host, and compare them: masks exactly, photos exactly or, of DALI, by blocks.

    Rows whose files the host decoder refuses are not compared: it detects damage that DALI ignores.

    Raises:
        FastsegError: a row differs. The cache is empty then, and is not published.
    """
    rows = np.flatnonzero(cache.filled)
    rows = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
    images, masks, _ = cache.gather(rows)
    with ThreadPoolExecutor(decoder.num_workers, thread_name_prefix="fastseg-verify") as pool:
        found = pool.map(partial(_difference, decoder), rows, images.cpu().numpy(), masks.cpu().numpy())
        for row, (image, mask) in zip(rows, found, strict=True):
            if image > TOLERANCES[decoder.name] or mask > 0:
                cache.clear()
                raise FastsegError(
                    f"{decoder.pairs.image_path(row)}: its cached pixels or mask differ from the host decoder's by "
                    f"{max(image, mask):.0f} of 255. {REMEDIES[decoder.name]}."
                )


def _difference(
    decoder: HostDecoder, row: int, image: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> tuple[float, float]:
    """The largest differences of a cached image and mask from the host decoder's; 0, 0 if it refuses the files."""
    exact_image, exact_mask = np.empty_like(image), np.empty_like(mask)
    try:
        decode_file(decoder.pairs.image_path(row), decode_image, exact_image)
        decoder.decode_mask_file(decoder.pairs.mask_path(row), exact_mask)
    except DataError:
        return 0.0, 0.0
    of_image: NDArray[Any] = image.astype(float) - exact_image
    of_mask = np.abs(mask.astype(float) - exact_mask).max()
    if decoder.name == "host":
        return float(np.abs(of_image).max()), float(of_mask)
    return float(np.abs(_block_means(of_image)).mean(2).max()), float(of_mask)


def _block_means(values: NDArray[Any]) -> NDArray[Any]:
    """Means over blocks of 4x4 pixels; blocks at the lower and right edge may be smaller.

    Args:
        values: (H, W, 3).
    """
    for axis in (0, 1):
        length = values.shape[axis]
        starts = np.arange(0, length, BLOCK)
        sizes = np.minimum(starts + BLOCK, length) - starts
        values = np.add.reduceat(values, starts, axis) / np.expand_dims(sizes, (1 - axis, 2))
    return values
