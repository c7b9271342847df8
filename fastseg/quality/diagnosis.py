"""Why a network predicts nothing, or everything: the likely reasons, from what its data and its scores tell."""

from typing import Any

import numpy as np

from fastseg.config import format_value
from fastseg.data.decode import decode_full_mask
from fastseg.data.host import decode_file
from fastseg.data.pairs import Pairs
from fastseg.errors import DataError

__all__ = ["explain_predictions", "foreground_shares", "warn_of_uniform_masks"]

SAMPLE = 32  # masks
SMALL_SHARE = 0.01  # of the pixels: a class so small that a network may ignore it
ENOUGH_STEPS = 200  # before them a network may predict nothing without any fault


def foreground_shares(pairs: Pairs) -> list[float]:
    """Foreground's share of the pixels in 32 masks, evenly spread over the pairs; unreadable masks are left out."""
    shares = []
    for index in np.unique(np.linspace(0, len(pairs) - 1, SAMPLE).astype(int)):
        try:
            shares.append(float(decode_file(pairs.mask_path(int(index)), decode_full_mask).mean()))
        except DataError:
            continue
    return shares


def warn_of_uniform_masks(shares: list[float]) -> str:
    """A warning if all masks are empty, or all are full; otherwise an empty string."""
    for value, name in ((0.0, "empty"), (1.0, "full")):
        if shares and all(share == value for share in shares):
            return (
                f"masks: all of {len(shares)} training masks that were read are {name}, so there is nothing to learn. "
                "The brighter of a mask's two values is foreground; `fastseg check` lists such masks."
            )
    return ""


def explain_predictions(entry: dict[str, Any], shares: list[float], learning_rate: float, steps: int) -> str:
    """The problem of an epoch's predictions and its likely reasons; an empty string if there is none.

    Args:
        entry: of metrics.jsonl.
        shares: of `foreground_shares` of the training masks.
        learning_rate: as configured.
        steps: so far.
    """
    problem = _find_problem(entry)
    if not problem:
        return ""
    median, rate = float(np.median(shares)) if shares else 0.0, format_value(learning_rate)
    uniform = sum(share in (0, 1) for share in shares)
    reasons = [  # whether the data speak for it, and the reason; the commonest first
        (uniform > 0, f"mask values: {uniform} of {len(shares)} training masks are of one value, empty or full"),
        (learning_rate > 1e-3, f"learning_rate: {rate}, lower it if the loss jumps, raise it if the loss stays"),
        (median < SMALL_SHARE, f"class share: foreground covers {median:.2%} of a training mask, larger images help"),
        (False, "pairs: masks that do not belong to their images, see overlay.png and `fastseg check`"),
    ]
    if steps < ENOUGH_STEPS:
        reasons.insert(1, (True, f"too few steps: {steps} so far"))
    ranked = sorted(reasons, key=lambda reason: not reason[0])
    listed = "; ".join(f"({place}) {reason}" for place, (_, reason) in enumerate(ranked, start=1))
    return f"predictions: {problem}. Likely reasons, the likeliest first: {listed}."


def _find_problem(entry: dict[str, Any]) -> str:
    predicted, true, dice = entry["val_predicted"], entry["val_foreground"], entry["val_dice_pixels"]
    if predicted == 0 < true:
        return f"all masks of epoch {entry['epoch']} are empty"
    if predicted == 1 > true:
        return f"all masks of epoch {entry['epoch']} are full"
    choices = {"everything": 2 * true / (1 + true), "nothing": float(true == 0)}
    best = max(choices, key=lambda choice: choices[choice])
    if dice < choices[best]:
        return f"Dice {dice:.3f} after epoch {entry['epoch']} is below {choices[best]:.3f}, that of predicting {best}"
    return ""
