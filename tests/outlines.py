"""An outline refiner with random weights, and its result without tiles."""

import numpy as np
import torch
from torch.nn.functional import pad

from fastseg.network.outline.refiner import REACH, Refiner
from fastseg.network.outline.upsample import upsample_logits


def random_refiner(num_outputs: int, scale: int, seed: int = 0) -> Refiner:
    generator = torch.Generator().manual_seed(seed)
    refiner = Refiner(num_outputs, scale)
    refiner.reset(generator)
    for module in refiner.body:
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.05, 0.2, generator=generator)
    torch.nn.init.normal_(refiner.head.weight, std=0.5, generator=generator)
    return refiner.requires_grad_(False).eval()


def near_outline(logits: torch.Tensor) -> np.ndarray:
    """(h, w) bool: cells with another label within REACH cells; logits (C, h, w)."""
    labels = (logits[0] > 0).numpy() if len(logits) == 1 else logits.argmax(0).numpy()
    height, width = labels.shape
    near = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            window = labels[max(y - REACH, 0) : y + REACH + 1, max(x - REACH, 0) : x + REACH + 1]
            near[y, x] = (window != labels[y, x]).any()
    return near


def dense_refinement(
    refiner: Refiner, logits: torch.Tensor, photo: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """(C, H, W), the refiner's result computed for the whole photo (H, W, 3) at once; logits (C, h, w)."""
    scale, border = int(refiner.scale), (refiner.halo,) * 4
    fine = upsample_logits(logits[None].float(), *size, onto=(photo.shape[0], photo.shape[1]))
    pixels = (photo.permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    refined = refiner(pad(pixels, border, "replicate"), pad(fine, border, "replicate"))
    near = np.repeat(np.repeat(near_outline(logits), scale, 0), scale, 1)
    return torch.where(torch.from_numpy(near), refined, fine)[0]
