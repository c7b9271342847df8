"""Photos that are copies of one another, byte for byte or only in looks: re-encoded, resized, a little brighter.

Measured on 16 Carvana-like cars of 16 views: the 256-bit hashes of two views of one car differ in 22 bits or more, of
two cars in 44 or more; those of a photo and its copy at a third of the size and JPEG quality 40, as PNG, brighter by
5 %, or without a border of 1 %, in 16 at most. (With the usual 64 bits views of one car are as near as copies.)
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastseg.errors import ConfigError

__all__ = ["CELLS", "MAX_DISTANCE", "find_near_duplicates", "fingerprint", "import_imagehash"]

HASH_SIZE = 16  # the hash has its square of bits
CELLS = 4 * HASH_SIZE  # side of the picture that is hashed
MAX_DISTANCE = 16  # bits that may differ between copies
CHUNK = 1024  # hashes compared with all others at a time

Bits = NDArray[np.bool_]


def import_imagehash() -> None:
    """ConfigError where ImageHash is not installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise ConfigError(
            "check: needs ImageHash to find copies. Install it with pip install 'fastseg-dali[check]', or pass "
            "copies=False (--no-copies)."
        ) from None


def fingerprint(cells: NDArray[np.uint8]) -> Bits:
    """Perceptual hash of a photo, (256,) bool: copies differ in few bits.

    Args:
        cells: (64, 64, 3), the photo averaged over a grid of CELLS x CELLS, whatever its shape.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions; by ImageHash.
    """
    import imagehash

    return np.asarray(imagehash.phash(Image.fromarray(cells), hash_size=HASH_SIZE).hash).ravel()


def find_near_duplicates(hashes: Bits, originals: Bits | None = None) -> list[tuple[int, int, int]]:
    """For each hash the most alike of the originals, where they differ in no more than MAX_DISTANCE bits.

    Args:
        hashes: (N, 256).
        originals: (M, 256); if None, a hash's originals are the hashes before it. Of N hashes alike, N - 1 are copies.

    Returns:
        (index, index of its original, bits that differ) of each copy. Memory is CHUNK x M numbers.
    """
    known = hashes if originals is None else originals
    # Of vectors of -1 and 1 the product is the bits that agree less those that differ: BLAS counts them fastest.
    signs, known_signs = _signs(hashes), _signs(known)
    copies = []
    for start in range(0, len(signs), CHUNK):
        products = signs[start : start + CHUNK] @ known_signs.T
        if originals is None:
            products[np.arange(len(known)) >= np.arange(start, start + len(products))[:, None]] = -np.inf
        if not products.size:
            continue
        nearest = products.argmax(axis=1)
        distances = (hashes.shape[1] - products[np.arange(len(products)), nearest]) / 2
        for row in np.flatnonzero(distances <= MAX_DISTANCE):
            copies.append((start + int(row), int(nearest[row]), int(distances[row])))
    return copies


def _signs(hashes: Bits) -> NDArray[np.float32]:
    return np.where(hashes, np.float32(1), np.float32(-1))
