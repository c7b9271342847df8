"""Networks of other packages and of users: their input, output and sizes, as training and prediction need them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastseg.errors import ConfigError
from fastseg.network.normalise import GAIN, OFFSET

__all__ = ["Adapter", "find_size_multiple"]

MIN_PROBE = 64  # pixels per side of the inputs that show what a network's sizes must be divisible by
MAX_PROBE = 1024
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 7, 14, 28)  # tried if the network fails at the configured size


class Adapter(nn.Module):
    """A network from fastseg's normalised images to logits of the images' size.

    Args:
        network: from images (B, 3, H, W) to logits (B, C, H, W), or smaller by a whole factor.
        mean, std: of red, green and blue in [0, 1], by which the network expects its input to be normalised. They are
            saved with the weights. Without them its input is fastseg's, in [-2, 2].
    """

    def __init__(
        self, network: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.gain: Tensor | None
        self.offset: Tensor | None
        gain = offset = None
        if mean is not None and std is not None:
            # fastseg's input is x = 255 * GAIN * value + OFFSET for a value in [0, 1]; the network's is
            # (value - mean) / std.
            centre, scale = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
            gain = (1 / (255 * GAIN * scale)).float()
            offset = ((-OFFSET / (255 * GAIN) - centre) / scale).float()
        self.register_buffer("gain", gain)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: (B, 3, H, W) normalised images.

        Returns:
            (B, C, H, W); smaller logits are upsampled bilinearly.
        """
        size = x.shape[2:]
        if self.gain is not None and self.offset is not None:
            x = x * self.gain + self.offset
        logits = self.network(x)
        return logits if logits.shape[2:] == size else interpolate(logits, size, mode="bilinear")


def find_size_multiple(network: nn.Module, height: int, width: int, num_outputs: int) -> int:
    """The number by which both sides of a network's input must be divisible, found by trial; 0 if no other size fits.

    A network that needs multiples of m fails on sides of n * k pixels, where k has no factor in common with m, unless m
    divides n. If it fails at the given size, the result is a number that does not divide both sides of it.

    Args:
        network: takes normalised images (B, 3, H, W); on any device. Its weights and statistics do not change.
        height, width: of the images that it will see.
        num_outputs: logits per pixel.

    Raises:
        ConfigError: it fails on images of that size, and not because of the size; or its output is not a tensor
            (B, num_outputs, H, W), or that divided by a whole factor.
    """
    training = network.training
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))

    def compute(height: int, width: int) -> Any:
        return network(torch.zeros(1, 3, height, width, device=device))

    def fits(multiple: int, factors: int) -> bool:
        k = next(k for k in range(-(-MIN_PROBE // multiple), MAX_PROBE) if math.gcd(k, factors) == 1)
        try:
            return not _find_fault(compute(multiple * k, multiple * k), multiple * k, multiple * k, num_outputs)
        except Exception:  # a network may raise anything at a size that it does not take
            return False

    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                fault = _find_fault(compute(height, width), height, width, num_outputs)
            except Exception as error:
                multiple = next((m for m in MULTIPLES if fits(m, math.prod(MULTIPLES))), 1)
                if height % multiple or width % multiple:
                    return multiple
                raise ConfigError(
                    f"network: must take images of {height}x{width} pixels, (1, 3, {height}, {width}); it raised "
                    f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}. Correct its forward, or "
                    "choose another image_height and image_width."
                ) from error
            if fault:
                raise ConfigError(
                    f"network: must return logits (B, {num_outputs}, H, W), or smaller by a whole factor; for images "
                    f"(1, 3, {height}, {width}) it returned {fault}. Correct its forward."
                )
            common = math.gcd(height, width)
            divisors = (m for m in range(1, common + 1) if common % m == 0)
            return next((m for m in divisors if fits(m, common)), 0)
    finally:
        network.train(training)


def _find_fault(logits: Any, height: int, width: int, num_outputs: int) -> str:
    """What is wrong with the logits of one image; empty if nothing is."""
    if not isinstance(logits, Tensor):
        return f"a {type(logits).__name__}"
    shape = tuple(logits.shape)
    if not logits.is_floating_point():
        return f"{logits.dtype} {shape}"
    if len(shape) != 4 or shape[:2] != (1, num_outputs) or 0 in shape:
        return str(shape)
    factor = height // shape[2]
    return "" if (shape[2] * factor, shape[3] * factor) == (height, width) else str(shape)
