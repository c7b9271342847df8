"""Near-duplicate photos: re-encoded, resized, or slightly brighter, found by their perceptual hashes.

Measured on 16 Carvana-like cars of 16 views, the 256-bit hashes differ

- in 16 bits or fewer between a photo and its near-duplicate: a third of the size at JPEG quality 40, PNG, 5 % brighter,
  or cropped by 1 % on each side;
- in 22 bits or more between two views of one car;
- in 44 bits or more between two cars.

The usual 64 bits do not separate near-duplicates from other views of one car.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastseg.errors import ConfigError

__all__ = ["HASH_BITS", "MAX_DISTANCE", "THUMBNAIL_SIDE", "find_near_duplicates", "import_imagehash", "perceptual_hash"]

HASH_SIDE = 16
HASH_BITS = HASH_SIDE**2
THUMBNAIL_SIDE = 4 * HASH_SIDE  # pixels, of the thumbnail that is hashed
MAX_DISTANCE = 16  # bits that differ between near-duplicates
CHUNK = 1024  # hashes compared with all others at a time

Bits = NDArray[np.bool_]


def import_imagehash() -> None:
    """Raise a ConfigError if ImageHash is not installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise ConfigError(
            "duplicates: needs ImageHash, which is not installed. Install it with pip install 'fastseg-dali[check]', "
            "or pass duplicates=False (--no-duplicates)."
        ) from None


def perceptual_hash(thumbnail: NDArray[np.uint8]) -> Bits:
    """Perceptual hash of a photo, (HASH_BITS,) bool.

    Args:
        thumbnail: (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), the photo averaged over a square grid, whatever its shape.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions; ImageHash's `phash`.
    """
    import imagehash

    return np.asarray(imagehash.phash(Image.fromarray(thumbnail), hash_size=HASH_SIDE).hash).ravel()


def find_near_duplicates(hashes: Bits, originals: Bits | None = None) -> list[tuple[int, int, int]]:
    """Find the nearest original of each hash, if they differ in at most MAX_DISTANCE bits.

    Args:
        hashes: (N, HASH_BITS).
        originals: (M, HASH_BITS); None compares each hash with those before it, so that N equal photos give N - 1
            near-duplicates.

    Returns:
        (index, index of its original, number of bits that differ) for each near-duplicate. Memory grows with CHUNK x M.
    """
    known = hashes if originals is None else originals
    # The dot product of vectors of -1 and 1 is the number of equal bits minus that of different bits. BLAS computes it.
    signs, known_signs = _signs(hashes), _signs(known)
    found = []
    for start in range(0, len(signs), CHUNK):
        products = signs[start : start + CHUNK] @ known_signs.T
        if originals is None:
            products[np.arange(len(known)) >= np.arange(start, start + len(products))[:, None]] = -np.inf
        if not products.size:
            continue
        nearest = products.argmax(axis=1)
        distances = (hashes.shape[1] - products[np.arange(len(products)), nearest]) / 2
        for row in np.flatnonzero(distances <= MAX_DISTANCE):
            found.append((start + int(row), int(nearest[row]), int(distances[row])))
    return found


def _signs(hashes: Bits) -> NDArray[np.float32]:
    return np.where(hashes, np.float32(1), np.float32(-1))
