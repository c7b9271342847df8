"""A user's own augmentation and loss, in place of fastseg's.

    fastseg.train(config, augmentation=kornia.augmentation.AugmentationSequential(..., data_keys=["input", "mask"]))
    fastseg.train(config, loss=lambda logits, targets: ...)

The augmentation takes and returns images (B, 3, H, W) and masks (B, 1, H, W), float32 on the training device. Its
random numbers depend on the run's seed and the step alone.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.network.normalise import GAIN, OFFSET, to_targets
from fastseg.runtime.device import Runtime, seeded
from fastseg.training.step.augment import augment, sample_params

__all__ = [
    "Augmentation",
    "Loss",
    "augment_batch",
    "augment_with",
    "network_rng",
    "prepare_augmentation",
    "prepare_loss",
]

Augmentation = Callable[[Tensor, Tensor], Any]
Loss = Callable[[Tensor, Tensor], Tensor]

T = TypeVar("T")


def augment_batch(
    pipeline: Augmentation | None,
    images: Tensor,
    masks: Tensor,
    config: Config,
    runtime: Runtime,
    generator: torch.Generator,
    step: int,
) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Augment a batch with fastseg's augmentation or a user's; see `augment` and `augment_with`.

    Args:
        generator: of fastseg's augmentation.

    Returns:
        A function from a slice of the batch to its inputs and targets. fastseg's augmentation runs when it is called.
    """
    if pipeline is not None:
        inputs, targets = augment_with(pipeline, images, masks, config, runtime, step)
        return lambda part: (inputs[part], targets[part])
    # Drawn for the whole batch, so that several ranks augment as a single process does.
    params = sample_params(config, config.batch_size, generator).take(runtime.rank_slice)
    return lambda part: augment(images[part], masks[part], params.take(part), classes=bool(config.classes))


def augment_with(
    pipeline: Augmentation, images: Tensor, masks: Tensor, config: Config, runtime: Runtime, step: int
) -> tuple[Tensor, Tensor]:
    """Augment a batch with a user's pipeline, then normalise it.

    Every rank augments a whole batch, with zeros in place of the other ranks' images, and takes its part: so it draws
    the numbers that a single process draws. This holds for pipelines that do not mix images.

    Args:
        pipeline: see the module; it sees images in [0, 1], and coverage in [0, 1] or numbers of classes.
        images: (B, H, W, 3) uint8, this rank's slice of the batch.
        masks: (B, H, W) uint8, coverage 0..255 or numbers of classes.
        step: of the run.

    Returns:
        (B, 3, H, W) float32, channels last, in [-2, 2] for images in [0, 1]; and targets (B, 1, H, W), float32 in
        [0, 1] or uint8 classes.
    """
    batch = len(images) * runtime.world_size
    pixels = torch.zeros(batch, 3, *masks.shape[1:], device=images.device)
    pixels[runtime.rank_slice] = images.permute(0, 3, 1, 2).float() / 255
    shapes = torch.zeros(batch, 1, *masks.shape[1:], device=images.device)
    shapes[runtime.rank_slice] = masks.unsqueeze(1).float() if config.classes else to_targets(masks)
    with torch.no_grad(), seeded(runtime.device, config.seed, step):
        pixels, shapes = pipeline(pixels, shapes)
    inputs = pixels[runtime.rank_slice].float() * (255 * GAIN) + OFFSET
    targets = shapes[runtime.rank_slice]
    targets = targets.round().to(torch.uint8) if config.classes else targets.float().clamp(0, 1)
    return inputs.contiguous(memory_format=torch.channels_last), targets.contiguous()


def prepare_augmentation(pipeline: Augmentation | None, config: Config, runtime: Runtime) -> Augmentation | None:
    """Copy a user's augmentation to the device, and try it.

    Raises:
        ConfigError: it fails, or returns something else than images and masks of the shapes that it is given.
    """
    if pipeline is None:
        return None
    pipeline = _copy_to(pipeline, "augmentation", runtime)
    size = (config.image_height, config.image_width)
    given = [(2, 3, *size), (2, 1, *size)]
    try:
        with torch.no_grad(), seeded(runtime.device, config.seed):
            returned = pipeline(*(torch.zeros(shape, device=runtime.device) for shape in given))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"augmentation: must take images and masks, {given[0]} and {given[1]}; it raised {type(error).__name__}: "
            f'{reason}. Pass a kornia AugmentationSequential with data_keys=["input", "mask"].'
        ) from error
    found = [tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__ for item in _as_list(returned)]
    if found != given:
        raise ConfigError(
            f"augmentation: must return images and masks of the shapes that it is given, {given[0]} and {given[1]}; "
            f"got {', '.join(map(str, found))}. Resize within it, or leave out what crops."
        )
    return pipeline


def prepare_loss(loss: Loss | None, config: Config, runtime: Runtime) -> Loss | None:
    """Copy a user's loss to the device, and try it.

    Raises:
        ConfigError: it fails, or returns something else than a scalar with a gradient.
    """
    if loss is None:
        return None
    loss = _copy_to(loss, "loss", runtime)
    logits = torch.zeros(2, config.num_outputs, 16, 16, device=runtime.device, requires_grad=True)
    targets = torch.zeros(2, 1, 16, 16, device=runtime.device, dtype=torch.uint8 if config.classes else torch.float32)
    try:
        value = loss(logits, targets)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"loss: must take logits {tuple(logits.shape)} and targets {tuple(targets.shape)}; it raised "
            f"{type(error).__name__}: {reason}. Correct it."
        ) from error
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and not value.ndim:
            found = "a scalar without a gradient"
        raise ConfigError(f"loss: must return a scalar tensor with a gradient; got {found}. Return the batch's mean.")
    return loss


def network_rng(config: Config, runtime: Runtime, step: int) -> AbstractContextManager[None]:
    """Random numbers of the network, such as dropout's, that depend on the step alone. The UNet draws none."""
    if config.network == "unet":
        return nullcontext()
    return seeded(runtime.device, config.seed, step, runtime.rank)


def _copy_to(function: T, name: str, runtime: Runtime) -> T:
    if not callable(function):
        raise ConfigError(f"{name}: must be callable; got {type(function).__name__}. Pass a function or a module.")
    return copy.deepcopy(function).to(runtime.device) if isinstance(function, nn.Module) else function


def _as_list(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, tuple | list) else [returned]
