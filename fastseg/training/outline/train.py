"""The steps that train an outline refiner: random patches, noise on their logits, and the loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from fastseg.classes import IGNORED
from fastseg.config import Config
from fastseg.network.normalise import normalise
from fastseg.network.outline.refiner import Refiner
from fastseg.runtime.progress import progress_bar
from fastseg.training.outline.patches import Patches
from fastseg.training.recipe import without_dynamo
from fastseg.training.state import Run
from fastseg.training.step.muon import MUON, MUON_FACTOR, MuonAdamW, filters_of

__all__ = ["refiner_loss", "train_refiner"]

BATCH = 16  # patches per step
LEARNING_RATE, WARM_UP = 1e-2, 0.2  # peak of the one cycle, and the share of the steps in which it rises
MAX_NORM = 1.0  # of the gradients
UNCERTAIN = 5.0  # |logit|, or the distance of the two largest, below which a point has the full weight in the loss
CERTAIN_WEIGHT = 0.05  # of the others
# The network sees the photos of its training better than new ones: smooth noise makes its outlines as bad as those.
NOISE, NOISE_POINTS = 2.0, 16
GAIN, OFFSET = 0.2, 0.3  # largest change of a patch's contrast, and of its normalised brightness


def train_refiner(refiner: Refiner, patches: Patches, run: Run, steps: int, *, shown: bool = True) -> None:
    """Train on random patches; for fewer steps if a signal interrupts the run."""
    config, runtime = run.config, run.runtime
    refiner = runtime.to_device(refiner).train()
    filters, parameters = filters_of(refiner), list(refiner.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p not in filters]},
        {"params": [p for p in parameters if p in filters], MUON: True},
    ]
    optimizer = without_dynamo(MuonAdamW)(groups, lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    generator = torch.Generator().manual_seed(config.seed)
    with progress_bar(shown=shown) as bar:
        bar_task = bar.add_task("outline refiner", total=steps, note="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _cycle(step / steps) * (MUON_FACTOR if group.get(MUON) else 1)
            chosen = torch.randint(len(patches.photos), (BATCH,), generator=generator)
            photos, logits, masks = _augment(patches, chosen, config, generator)
            photos, logits, masks = (values.to(runtime.device) for values in (photos, logits, masks))
            with runtime.autocast():
                refined = refiner(photos, logits)
            inside = slice(refiner.halo, -refiner.halo)
            loss = refiner_loss(refined, logits[..., inside, inside], masks, config)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(refiner.parameters(), MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update(bar_task, advance=1)
            if run.stop_requested:
                return


def _cycle(progress: float) -> float:
    return progress / WARM_UP if progress < WARM_UP else (1 - progress) / (1 - WARM_UP)


def _augment(
    patches: Patches, chosen: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Photos, logits and masks of a step, on the CPU: mirrored, recoloured, and with noise on the logits."""
    photos, logits, masks = normalise(patches.photos[chosen]), patches.logits[chosen].float(), patches.masks[chosen]
    count, (height, width) = len(chosen), logits.shape[2:]
    flip = torch.rand(count, generator=generator) < config.flip
    for values in (photos, logits, masks):
        values[flip] = values[flip].flip(-1)
    gain, offset = (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1).unbind()
    photos = photos * (1 + GAIN * gain) + OFFSET * offset
    points = (height // NOISE_POINTS + 2, width // NOISE_POINTS + 2)
    noise = torch.randn(count, logits.shape[1], *points, generator=generator)
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return photos, logits + strength * interpolate(noise, (height, width), mode="bicubic"), masks


def refiner_loss(refined: Tensor, logits: Tensor, masks: Tensor, config: Config) -> Tensor:
    """Cross-entropy where the network is uncertain, and a little of it elsewhere.

    Args:
        refined, logits: (B, C, H, W) after and before the refiner.
        masks: (B, H, W) uint8: coverage 0..255, or numbers of classes and IGNORED.

    Returns:
        Scalar float32.
    """
    if config.classes:
        losses = cross_entropy(refined, masks.long(), ignore_index=IGNORED, reduction="none")
        largest = logits.topk(2, 1).values
        margin, counted = largest[:, 0] - largest[:, 1], masks != IGNORED
    else:
        losses = binary_cross_entropy_with_logits(refined[:, 0], masks.float() / 255, reduction="none")
        margin, counted = logits[:, 0].abs(), torch.ones_like(masks, dtype=torch.bool)
    weights = torch.where(margin < UNCERTAIN, 1.0, CERTAIN_WEIGHT) * counted
    return (losses * weights).sum() / weights.sum().clamp(min=1)
