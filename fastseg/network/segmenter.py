"""A trained network with its preprocessing inside: pixels in, probabilities out.

    segmenter = fastseg.load("runs/carvana/best.pt")
    probabilities = segmenter(images)  # uint8 (B, 160, 240, 3) to float32 (B, 160, 240)

`fastseg.load` returns it and `fastseg.export` writes it, so that callers need not normalise anything.
"""

import os

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.network.checkpoint import load_model
from fastseg.network.normalise import normalise
from fastseg.network.unet import UNet
from fastseg.runtime.device import choose_device

__all__ = ["Segmenter", "load"]


class Segmenter(nn.Module):
    """A UNet with its preprocessing: takes decoded photos, returns probabilities.

    Args:
        unet: one logit per pixel.
        config: the configuration of its training; `image_height` and `image_width` are its training size.
    """

    def __init__(self, unet: UNet, config: Config) -> None:
        super().__init__()
        self.unet = unet
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """Probability of foreground for each pixel.

        Args:
            images: (B, H, W, 3) uint8 RGB; H and W are divisible by 2**depth. Accuracy is best at the training size,
                with photos resized to it by area average.

        Returns:
            (B, H, W) float32 in [0, 1].

        Raises:
            ValueError: wrong dtype or shape.
        """
        step = 2**self.config.depth
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (B, H, W, 3); got {images.dtype} {tuple(images.shape)}.")
        if images.shape[1] % step or images.shape[2] % step:
            size = f"{images.shape[1]} x {images.shape[2]}"
            raise ValueError(f"images must have a height and a width divisible by {step}; got {size}.")
        return self.unet(normalise(images))[:, 0].float().sigmoid()


def load(checkpoint: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Segmenter:
    """Load a trained network, in evaluation mode and with frozen weights.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run, or a `.safetensors` file from `fastseg export`.
        device: as in `Config`.

    Returns:
        The network with its preprocessing; its attribute `config` is the configuration of its training.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg.
        ConfigError: this machine lacks the device.
    """
    torch_device = choose_device(Config(device=str(device)).device)
    unet, config = load_model(checkpoint)
    return Segmenter(unet, config).requires_grad_(False).eval().to(torch_device)
