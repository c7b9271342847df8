"""The two recipes: loss, optimizer, learning rate, image size and weight averaging.

`fast` is AdamW or Muon under a one-cycle schedule on BCE + Dice, with small images in the first steps. `tutorial` is
the recipe of beginners' UNet projects: Adam at a constant learning rate on BCE. With classes, cross-entropy takes BCE's
place.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.classes import IGNORED
from fastseg.config import Config
from fastseg.data.loader import Loader
from fastseg.network.architecture import encoder_parameters
from fastseg.network.losses import bce_dice_loss, bce_loss, class_loss, cross_entropy_loss
from fastseg.runtime.device import Runtime
from fastseg.runtime.distributed import all_reduce
from fastseg.training.step.muon import BIAS_FACTOR, MUON, MUON_FACTOR, MuonAdamW, filters_of, norm_biases_of

__all__ = [
    "choose_optimizer",
    "drop_frozen_gradients",
    "learning_rate",
    "make_class_weights",
    "make_ema_model",
    "make_optimizer",
    "set_learning_rate",
    "small_share",
    "training_loss",
    "training_size",
    "update_ema",
    "without_dynamo",
]

PEAK = 30  # peak of the one-cycle schedule, as a multiple of `Config.learning_rate`, where it starts
LR_FACTOR = "lr_factor"  # key of a parameter group: factor of the schedule's learning rate
Kind = tuple[Callable[[Tensor], bool], float, dict[str, Any]]  # which parameters, their weight decay, other options
WARM_UP = 0.25  # share of the steps in which the learning rate rises

log = logging.getLogger(__name__)


def training_loss(config: Config, logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The recipe's loss.

    Args:
        logits: (B, 1, H, W), or (B, C, H, W) with classes; any float dtype.
        targets: (B, 1, H, W) coverage in [0, 1], or numbers of the classes, uint8.
        class_weights: (C,) float32, of `make_class_weights`.

    Returns:
        Scalar float32.
    """
    if config.classes:
        if config.recipe == "tutorial" and config.loss == "auto":
            return cross_entropy_loss(logits, targets[:, 0], class_weights)
        return class_loss(logits, targets[:, 0], class_weights, config.loss)
    return bce_loss(logits, targets) if config.recipe == "tutorial" else bce_dice_loss(logits, targets)


def make_class_weights(config: Config, loader: Loader, runtime: Runtime) -> Tensor | None:
    """(C,) float32 on the device: the classes' weights in the loss; None if all are 1.

    With "auto" a class weighs as much as the inverse square root of its share of the pixels, and the mean over pixels
    is 1; a class that does not occur weighs 1. The pixels are those of the training masks at the training size.
    Counting them decodes an epoch, which fills the cache of `loader`; its position does not change. In the tutorial
    recipe "auto" is "none".
    """
    if not config.classes or config.class_weights == "none":
        return None
    if config.class_weights == "auto" and config.recipe == "tutorial":
        return None
    if config.class_weights != "auto":
        return torch.tensor(config.class_weights, device=runtime.device)
    position = loader.state_dict()
    loader.load_state_dict({**position, "epoch": 0, "step": 0})  # the same pixels, whenever the run resumes
    counts = torch.zeros(IGNORED + 1, dtype=torch.float64, device=runtime.device)
    for _, masks, _ in loader:
        counts += torch.bincount(masks.flatten(), minlength=IGNORED + 1)
    loader.load_state_dict(position)
    counts = all_reduce(counts)[: len(config.classes)].cpu()
    share = counts / counts.sum().clamp(min=1)
    weights = torch.where(counts > 0, share.rsqrt() / share.sqrt().sum(), 1.0)
    named = ", ".join(
        f"{item.name} {weight:.3g}" for item, weight in zip(config.classes, weights.tolist(), strict=True)
    )
    log.info("class_weights: %s", named)
    return weights.float().to(runtime.device)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer. Biases and batch norms have no weight decay; encoders may learn more slowly."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if config.encoder_lr != 1:
        encoder = set(encoder_parameters(model))
        rest = [p for p in model.parameters() if p not in encoder]
        slow = {"params": [p for p in model.parameters() if p in encoder], LR_FACTOR: config.encoder_lr}
        groups = [{"params": rest}, slow]
    if config.recipe == "tutorial":
        return without_dynamo(torch.optim.Adam)(groups, lr=config.learning_rate)
    kinds: list[Kind] = [
        (lambda p: p.ndim > 1, config.weight_decay, {}),
        (lambda p: p.ndim <= 1, 0.0, {}),
    ]
    if choose_optimizer(config, None) == "adamw":
        return without_dynamo(torch.optim.AdamW)(_split(groups, kinds), lr=config.learning_rate, fused=True)
    filters, biases = filters_of(model), norm_biases_of(model)
    kinds = [
        (lambda p: p.ndim > 1 and p not in filters, config.weight_decay, {}),
        (lambda p: p.ndim <= 1 and p not in biases, 0.0, {}),
        (lambda p: p in biases, 0.0, {LR_FACTOR: BIAS_FACTOR}),
        (lambda p: p in filters, config.weight_decay, {LR_FACTOR: MUON_FACTOR, MUON: True}),
    ]
    return without_dynamo(MuonAdamW)(_split(groups, kinds), lr=config.learning_rate)


def choose_optimizer(config: Config, state: dict[str, Any] | None) -> str:
    """What `optimizer=auto` means for a run: that of the checkpoint to resume from, else Muon for the UNet.

    Args:
        state: of `last.pt`; None for a new run. Older versions had AdamW alone, and did not say so.

    Returns:
        "muon" or "adamw"; `config.optimizer` itself in the tutorial recipe, which has Adam.
    """
    if config.optimizer != "auto" or config.recipe == "tutorial":
        return config.optimizer
    if state is not None and isinstance(state.get("config"), dict):
        return str(state["config"].get("optimizer", "adamw"))
    return "muon" if config.network == "unet" else "adamw"


def _split(groups: list[dict[str, Any]], kinds: list[Kind]) -> list[dict[str, Any]]:
    return [
        {
            **group,
            "params": [p for p in group["params"] if chosen(p)],
            "weight_decay": decay,
            **options,
            **({LR_FACTOR: group.get(LR_FACTOR, 1.0) * options[LR_FACTOR]} if LR_FACTOR in options else {}),
        }
        for group in groups
        for chosen, decay, options in kinds
    ]


def without_dynamo(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """One of torch's optimizers, without the import of `torch._dynamo` on its first call, which takes seconds.

    torch wraps the methods below, so that `torch.compile` of a whole step leaves them as they are. fastseg compiles the
    network only.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    return type(optimizer.__name__, (optimizer,), methods | {"step": torch.no_grad()(methods["step"])})


def make_ema_model(config: Config, model: nn.Module) -> nn.Module | None:
    """A copy of the model for the moving average of its weights and batch statistics; None if `ema_decay` is 0."""
    return copy.deepcopy(model) if config.ema_decay else None


def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Add the weights after `step` (from 0) to the average: the plain mean at first, then an exponential average.

    torch's `AveragedModel` does the same, but makes the host wait for the GPU twice per step.
    """
    average, weights = (
        [value for value in network.state_dict().values() if value.is_floating_point()]
        for network in (ema_model, model)
    )
    torch._foreach_lerp_(average, weights, max(1 - decay, 1 / (step + 1)))


def learning_rate(config: Config, step: float, total_steps: float) -> float:
    """Learning rate of a step: constant in the tutorial recipe, otherwise one cycle, up and down again.

    The rise and the fall are straight with Muon, and cosine arcs with AdamW. Step and total may be shares of the run,
    such as 0.5 and 1.

    Source: Smith and Topin 2018, Super-Convergence (arXiv:1708.07120).
    """
    if config.recipe == "tutorial":
        return config.learning_rate
    peak, warm_up = PEAK * config.learning_rate, WARM_UP * total_steps
    linear = config.optimizer == "muon"
    if step < warm_up:
        rise = step / warm_up if linear else (1 - math.cos(math.pi * step / warm_up)) / 2
        return config.learning_rate + (peak - config.learning_rate) * rise
    since, steps = step - warm_up, total_steps - warm_up
    return peak * (1 - since / steps if linear else (1 + math.cos(math.pi * since / steps)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_FACTOR, 1.0)


def drop_frozen_gradients(config: Config, model: nn.Module, step: int) -> None:
    """Drop the encoder's gradients in the first `freeze_encoder` steps: the optimizer passes over it.

    The gradients are computed all the same, so that the network stays one graph for DDP and CUDA graphs.
    """
    if step < config.freeze_encoder:
        for parameter in encoder_parameters(model):
            parameter.grad = None


def small_share(config: Config) -> float:
    """Share of the steps, the first, that see small images."""
    return 0.0 if config.recipe == "tutorial" else config.progressive_resizing


def training_size(config: Config, step: float, total_steps: float) -> tuple[int, int]:
    """Height and width of the images that a step sees: about half in the first `progressive_resizing` of the steps.

    Such a step costs a quarter, and the shapes it learns hold at full size; the remaining steps learn the outline.
    Both sides are divisible by `config.cell`, and the UNet's innermost level has at least 2 x 2 cells.

    Source: Howard et al. 2018, DAWNBench entry of fast.ai (progressive resizing).
    """
    height, width = config.image_height, config.image_width
    if step >= small_share(config) * total_steps:
        return height, width
    cell = config.cell
    half = [max(math.ceil(size / (2 * cell)), 2) * cell for size in (height, width)]
    if half[0] >= height:  # which tells the sizes of epochs apart
        return height, width
    return half[0], min(half[1], width)
