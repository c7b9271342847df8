"""A trained network with its preprocessing inside: pixels in, probabilities out.

    segmenter = fastseg.load("runs/carvana/best.pt")
    probabilities = segmenter(images)  # uint8 (B, 160, 240, 3) to float32 (B, 160, 240)

With classes, the probabilities are (B, C, H, W), and `probabilities.argmax(1)` is the mask.

`fastseg.load` returns it and `fastseg.export` writes it, so that callers need not normalise anything.
"""

import os

import torch
from torch import Tensor, nn

from fastseg.config import Config
from fastseg.network.checkpoint import load_model
from fastseg.network.normalise import normalise
from fastseg.runtime.device import choose_device

__all__ = ["Segmenter", "load"]


class Segmenter(nn.Module):
    """A network with its preprocessing: takes decoded photos, returns probabilities.

    Args:
        unet: the network, fastseg's UNet or another; one logit per pixel, or one per class.
        config: the configuration of its training; `image_height` and `image_width` are its training size.
    """

    def __init__(self, unet: nn.Module, config: Config) -> None:
        super().__init__()
        self.unet = unet
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """Probability of foreground, or of each class, for each pixel.

        Args:
            images: (B, H, W, 3) uint8 RGB; H and W are divisible by `config.cell`. Accuracy is best at the training
                size, with photos resized to it by area average.

        Returns:
            (B, H, W) float32 in [0, 1]; with classes (B, C, H, W), which sum to 1 over C.

        Raises:
            ValueError: wrong dtype or shape.
        """
        config = self.config
        one_size = config.network != "unet" and not config.size_multiple
        rows, columns = (config.image_height, config.image_width) if one_size else (config.cell, config.cell)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (B, H, W, 3); got {images.dtype} {tuple(images.shape)}.")
        if images.shape[1] % rows or images.shape[2] % columns:
            size = f"{images.shape[1]} x {images.shape[2]}"
            needed = f"of {rows} and {columns} pixels" if one_size else f"divisible by {rows}"
            raise ValueError(f"images must have a height and a width {needed}; got {size}.")
        logits = self.unet(normalise(images))
        return logits.float().softmax(1) if self.config.classes else logits[:, 0].float().sigmoid()


def load(
    checkpoint: str | os.PathLike[str], *, device: str | torch.device = "cpu", network: nn.Module | None = None
) -> Segmenter:
    """Load a trained network, in evaluation mode and with frozen weights.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run, or a `.safetensors` file from `fastseg export`.
        device: as in `Config`.
        network: if the checkpoint's network is a module of your own, an instance of its class; it is copied.

    Returns:
        The network with its preprocessing; its attribute `config` is the configuration of its training.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg; or `network` is missing.
        ConfigError: this machine lacks the device, or the package of the network.
    """
    torch_device = choose_device(Config(device=str(device)).device)
    unet, config = load_model(checkpoint, network)
    return Segmenter(unet, config).requires_grad_(False).eval().to(torch_device)
