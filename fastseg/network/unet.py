"""The network: the UNet of Ronneberger et al. 2015 (arXiv:1505.04597) with padding and batch normalisation."""

import math

import torch
from torch import Tensor, nn

__all__ = ["UNet", "init_weights"]


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalisation (which makes a bias useless) and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Encoder and decoder with skips; 31,037,633 parameters at 64 channels and depth 4.

    Args:
        base_channels: channels at full resolution; each level below has twice as many.
        depth: number of times the image is halved.
        in_channels: 3 for RGB.
        out_channels: number of logits per pixel; 1 separates foreground from background.
    """

    def __init__(self, base_channels: int = 64, depth: int = 4, in_channels: int = 3, out_channels: int = 1) -> None:
        super().__init__()
        channels = [base_channels * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            double_conv(before, after) for before, after in zip([in_channels, *channels], channels[:-1], strict=False)
        )
        self.bottleneck = double_conv(channels[-2], channels[-1])
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(2 * level, level, kernel_size=2, stride=2) for level in reversed(channels[:-1])
        )
        self.decoder = nn.ModuleList(double_conv(2 * level, level) for level in reversed(channels[:-1]))
        self.head = nn.Conv2d(base_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: (B, in_channels, H, W) normalised images; H and W are divisible by 2**depth.

        Returns:
            (B, out_channels, H, W).
        """
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for upsample, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        return self.head(x)


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Initialise a network in place: the same values as torch's modules draw from a global generator of that seed.

    The global generator belongs to the whole process: runs in two threads would draw from each other's.

    Args:
        model: of convolutions and batch norms; their present values are not used.
        generator: of the CPU.

    Source: `reset_parameters` of torch's convolutions (He et al. 2015, arXiv:1502.01852).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
