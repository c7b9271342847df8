"""The scores of an outline refiner on validation photos, beside those of the CRF and of no refinement."""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastseg.config import Config
from fastseg.data.pairs import Pairs
from fastseg.network.metrics import ClassScores, Scores
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.refiner import Refiner, refine_outline
from fastseg.network.outline.upsample import upsample_logits
from fastseg.training.outline.patches import Example, read_examples
from fastseg.training.state import Run

__all__ = ["log_scores", "score_refiner"]

log = logging.getLogger(__name__)


@torch.inference_mode()
def score_refiner(refiner: Refiner, pairs: Pairs, run: Run) -> dict[str, Any]:
    """Dice of validation pairs on the refiner's grid: upsampled, after the CRF, and refined."""
    config, scale = run.config, int(refiner.scale)
    methods = ("none", "crf", "learned")
    scores = {method: ClassScores(len(config.classes)) if config.classes else Scores() for method in methods}
    for example in read_examples(pairs, run.model, scale, config, run.runtime):
        for method in methods:
            logits = _refine_example(example, method, refiner)
            if config.classes:
                scores[method].update(logits.argmax(0)[None], example.mask[None])
            else:
                scores[method].update(logits > 0, example.mask[None] >= 128)
    dice = {method: float(score.compute()["dice"]) for method, score in scores.items()}
    others = {method: value for method, value in dice.items() if method != "learned"}
    used = math.isfinite(dice["learned"]) and dice["learned"] > max(others.values())
    return {"dice": dice, "images": len(pairs), "used": used}


def log_scores(scores: dict[str, Any], scale: int, config: Config) -> None:
    """Log the Dice of every method, and whether the refiner is used."""
    log.info(
        "outline refiner: Dice on a grid of %dx%d is %s; it is %s",
        *(config.image_width * scale, config.image_height * scale),
        ", ".join(f"{dice:.4f} with refine={method}" for method, dice in scores["dice"].items()),
        "in best.pt" if scores["used"] else "not used",
    )


def _refine_example(example: Example, method: str, refiner: Refiner) -> Tensor:
    """The logits (C, H, W) of an example on the refiner's grid."""
    grid = (example.mask.shape[0], example.mask.shape[1])
    if method == "learned":
        return refine_outline(refiner, example.logits, example.photo, example.size)
    logits = example.logits[None]
    if method == "crf":
        pixels = example.photo.permute(2, 0, 1)[None].float()
        guide = interpolate(pixels, guide_size(*logits.shape[2:]), mode="area").round().to(torch.uint8)
        logits = refine_with_crf(logits, guide.permute(0, 2, 3, 1).contiguous(), example.size)
    return upsample_logits(logits, *example.size, onto=grid)[0]
