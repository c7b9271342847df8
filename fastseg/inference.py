"""Using a trained network: scores on a folder of pairs."""

import os
from typing import Any

from fastseg.checkpoint import load_model
from fastseg.config import Config
from fastseg.data.check import check_pairs
from fastseg.data.loader import Loader
from fastseg.data.pairs import find_pairs
from fastseg.metrics import score_batches
from fastseg.runtime import choose_runtime

__all__ = ["evaluate"]


def evaluate(
    checkpoint: str | os.PathLike[str],
    img_dir: str | os.PathLike[str],
    mask_dir: str | os.PathLike[str],
    **changes: Any,
) -> dict[str, float]:
    """Score a checkpoint on a folder of pairs, at the size it was trained at.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run.
        img_dir, mask_dir: as for `find_pairs`.
        changes: fields of `Config` that differ from the checkpoint's, such as `device` or `batch_size`.

    Returns:
        `dice` and `iou` (means over images), `dice_pixels` and `iou_pixels` (pooled), `loss`, and `images`, their
        number. Masks count as foreground where at least half of a cell is covered.

    Raises:
        CheckpointError, ConfigError, DataError: one sentence with the remedy.
    """
    model, trained = load_model(checkpoint)
    config = Config(**{**trained.model_dump(exclude={"device", "precision"}), **changes})
    runtime = choose_runtime(config)
    pairs = find_pairs(img_dir, mask_dir, bad_samples=config.bad_samples)
    if config.check_data:
        pairs = check_pairs(pairs, bad_samples=config.bad_samples, num_workers=config.num_workers)
    loader = Loader(
        pairs,
        height=config.image_height,
        width=config.image_width,
        batch_size=config.batch_size,
        shuffle=False,
        device=runtime.device,
        decoder=config.decoder,
        num_workers=config.num_workers,
        mask_resize=config.mask_resize,
        cache="off",
        bad_samples=config.bad_samples,
        pin_memory=config.pin_memory,
    )
    return {**score_batches(runtime.place(model), loader, runtime), "images": len(pairs)}
