"""How the weights are learned: loss, optimizer and learning rate of the two recipes.

`fast` is AdamW under a one-cycle schedule on BCE + Dice, the first steps on small images; `tutorial` is what beginners'
UNet projects use: Adam at one learning rate on BCE.
"""

import copy
import math

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.network.losses import bce_dice_loss, bce_loss

__all__ = [
    "learning_rate",
    "make_ema_model",
    "make_optimizer",
    "num_small_steps",
    "training_loss",
    "training_size",
    "update_ema",
]

PEAK = 30  # peak of the one-cycle schedule over `Config.learning_rate`, where it starts
WARM_UP = 0.25  # share of the steps in which the learning rate rises


def training_loss(config: Config, logits: Tensor, targets: Tensor) -> Tensor:
    """Scalar float32 loss of logits (B, 1, H, W) against coverage (B, 1, H, W) in [0, 1]."""
    return bce_loss(logits, targets) if config.recipe == "tutorial" else bce_dice_loss(logits, targets)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer; biases and batch norms are not decayed."""
    if config.recipe == "tutorial":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def make_ema_model(config: Config, model: nn.Module) -> nn.Module | None:
    """A network for the moving average of the weights and of batch norm's statistics, where one is asked for."""
    return copy.deepcopy(model) if config.ema_decay else None


def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Take the weights after `step` (from 0) into the average: the plain mean at first, then an exponential one.

    torch's `AveragedModel` does the same, but makes the host wait for a GPU twice a step.
    """
    before, now = (
        [value for value in network.state_dict().values() if value.is_floating_point()] for network in (average, model)
    )
    torch._foreach_lerp_(before, now, max(1 - decay, 1 / (step + 1)))


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Learning rate of a step: constant for the tutorial's recipe, else one cycle with cosine arcs.

    Source: Smith and Topin 2018, Super-Convergence (arXiv:1708.07120).
    """
    if config.recipe == "tutorial":
        return config.learning_rate
    peak, warm_up = PEAK * config.learning_rate, WARM_UP * total_steps
    if step < warm_up:
        rise = (1 - math.cos(math.pi * step / warm_up)) / 2
        return config.learning_rate + (peak - config.learning_rate) * rise
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up))) / 2


def num_small_steps(config: Config, total_steps: int) -> int:
    """How many steps, the first of the run, see small images."""
    return 0 if config.recipe == "tutorial" else math.ceil(config.progressive_resizing * total_steps)


def training_size(config: Config, step: int, total_steps: int) -> tuple[int, int]:
    """Height and width of what a step sees: about half of the image in the first `progressive_resizing` of the steps.

    A step then costs a quarter, and what it learns (which shapes are foreground) holds at full size; the steps that
    remain learn the outline. Both sides divide by 2**depth, and the network's innermost level keeps 2 x 2 cells.

    Source: Howard et al. 2018, DAWNBench entry of fast.ai (progressive resizing).
    """
    height, width = config.image_height, config.image_width
    if step >= num_small_steps(config, total_steps):
        return height, width
    cell = 2**config.depth
    half = [max(math.ceil(size / (2 * cell)), 2) * cell for size in (height, width)]
    return min(half[0], height), min(half[1], width)
