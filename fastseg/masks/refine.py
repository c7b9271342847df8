"""The choice of how photos refine the outline of their masks."""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseg.config import Config
from fastseg.data.decode import Size, decode_image
from fastseg.data.host import decode_file, load_photo
from fastseg.errors import ConfigError
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.refiner import MAX_CLASSES, Refiner, read_refiner

__all__ = ["METHODS", "check_method", "choose_refinement", "load_guide", "refine_by_crf"]

METHODS = ("none", "crf", "learned")


def choose_refinement(method: str, checkpoint: str | os.PathLike[str], config: Config) -> tuple[str, Refiner | None]:
    """One of METHODS, and for "learned" the checkpoint's outline refiner.

    "auto" is "learned" for a checkpoint with a refiner, else "crf", whose time grows with the number of classes: "none"
    for more than 32.

    Args:
        config: that of the network's training.

    Raises:
        ConfigError: the method is unknown, or does not fit the checkpoint.
        CheckpointError: the refiner's weights do not fit.
    """
    check_method(method)
    refiner = read_refiner(checkpoint) if method in ("auto", "learned") else None
    if method == "learned" and refiner is None:
        raise ConfigError(
            "refine: learned needs a checkpoint with an outline refiner, which best.pt has after training with "
            f"refiner_steps above 0 and at most {MAX_CLASSES} classes; this one has none. Use auto."
        )
    if method == "auto":
        method = "learned" if refiner else "crf" if len(config.classes) <= MAX_CLASSES else "none"
    return method, refiner


def check_method(method: str) -> None:
    """Raise a ConfigError for a method that is unknown."""
    if method not in ("auto", *METHODS):
        raise ConfigError(f"refine: must be one of auto, {', '.join(METHODS)}; got {method!r}. Use auto.")


def refine_by_crf(logits: Tensor, path: str, size: Size) -> Tensor:
    """The logits of one photo, refined by its file on the CRF's grid.

    Args:
        logits: (C, h, w), of the network's cells.
        size: height and width of the photo itself.

    Returns:
        (C, H, W) float32.

    Raises:
        DataError: the file cannot be decoded.
    """
    photo = torch.from_numpy(load_photo(path, guide_size(logits.shape[1], logits.shape[2])))
    return refine_with_crf(logits[None], photo[None], size)[0]


def load_guide(path: str, config: Config, refiner: Refiner) -> tuple[Size, NDArray[np.uint8]]:
    """A photo's own size (height, width), and its pixels (H, W, 3) on the refiner's grid.

    Raises:
        DataError: the file cannot be decoded.
    """
    scale = int(refiner.scale)
    guide = np.empty((config.image_height * scale, config.image_width * scale, 3), np.uint8)
    return decode_file(path, decode_image, guide), guide
