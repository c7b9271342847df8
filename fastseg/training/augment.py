"""Augmentation on the training device: one warp for image and mask, one colour matrix for the image.

kornia's classes run each operation on its own and in turn; here its functions make the matrices, flip, rotation,
scale and shift are composed into one of them and sampled once, and brightness, contrast, saturation and hue into
another together with the normalisation. The pictures are those of kornia's `RandomHorizontalFlip`, `RandomAffine`
and `ColorJitter` in that order, but that nothing is clipped between the colour steps and that hue turns about the grey
axis (a linear operation) rather than in HSV. An elastic distortion and a blur, by default none, come after.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_affine_matrix2d
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from fastseg.config import Config
from fastseg.training.augment_host import augment_on_host

__all__ = ["AugmentParams", "augment", "augment_on_device", "normalise", "sample_params", "shrink"]

# The network sees (value / 255 - 0.5) / 0.25: about zero mean and unit variance for photographs, in [-2, 2].
GAIN, OFFSET = 4 / 255, -2.0
ELASTIC_POINTS = 3  # along each side, which an elastic distortion shifts
LEAST_SIGMA = 1e-2  # of a blur, in pixels: changes nothing, and nothing is divided by zero
LUMA_WEIGHTS = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as kornia's rgb_to_grayscale


@dataclass(frozen=True)
class AugmentParams:
    """One set of parameters an image; float32 tensors on the CPU."""

    flip: Tensor  # (B,) 0 or 1
    angle: Tensor  # (B,) degrees, counter-clockwise
    scale: Tensor  # (B,) factor
    shift: Tensor  # (B, 2) pixels, x and y
    brightness: Tensor  # (B,) factor
    contrast: Tensor  # (B,) factor about the image's mean grey
    saturation: Tensor  # (B,) factor about each pixel's grey
    hue: Tensor  # (B,) share of a full turn
    blur: Tensor | None = None  # (B,) sigma in pixels
    elastic: Tensor | None = None  # (B, 2, 3, 3) shifts of points in x and y, where the image is 2 wide and high

    def __post_init__(self) -> None:
        for name, values in self._given():
            if len(values) != len(self.flip):
                raise ValueError(f"{name} must have one row an image, {len(self.flip)}")

    def _given(self) -> list[tuple[str, Tensor]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in values if value is not None]

    def take(self, rows: slice) -> "AugmentParams":
        """The parameters of some of the images."""
        return AugmentParams(**{name: values[rows] for name, values in self._given()})


def sample_params(config: Config, batch_size: int, generator: torch.Generator) -> AugmentParams:
    """Draw parameters uniformly within the strengths of `config`.

    Args:
        generator: on the CPU; a strength of 0 draws as many numbers as any other, but for blur and elastic.
    """
    u = 2 * torch.rand(batch_size, 9, generator=generator) - 1  # in [-1, 1)
    size = torch.tensor([config.image_width, config.image_height])
    return AugmentParams(
        flip=(u[:, 0] < 2 * config.flip - 1).float(),
        angle=config.rotation * u[:, 1],
        scale=1 + config.scale * u[:, 2],
        shift=config.translation * u[:, 3:5] * size,
        brightness=1 + config.brightness * u[:, 5],
        contrast=1 + config.contrast * u[:, 6],
        saturation=1 + config.saturation * u[:, 7],
        hue=config.hue * u[:, 8],
        blur=config.blur * torch.rand(batch_size, generator=generator) if config.blur else None,
        elastic=2 * config.elastic * torch.randn(batch_size, 2, ELASTIC_POINTS, ELASTIC_POINTS, generator=generator)
        if config.elastic
        else None,
    )


def normalise(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees, without augmentation.

    Args:
        images: (B, H, W, 3) uint8.
        masks: (B, H, W) uint8, coverage 0..255.

    Returns:
        Images (B, 3, H, W) float32 in [-2, 2], channels last without a copy, and targets (B, 1, H, W) in [0, 1].
    """
    return images.permute(0, 3, 1, 2).float().mul_(GAIN).add_(OFFSET), masks.unsqueeze(1).float().div_(255)


def augment(images: Tensor, masks: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
    """Augment and normalise a batch on its device; arguments and results as for `normalise`."""
    height, width = masks.shape[1:]
    geometry, colour = geometry_matrix(params, height, width), GAIN * colour_matrix(params)
    source = np.linalg.inv(geometry.double().numpy())[:, :2].astype(np.float32)  # from the result to the source
    # Contrast turns about the mean grey of the picture at that point, which only the device knows.
    share = LUMA_WEIGHTS * (GAIN * (1 - params.contrast) * params.brightness)[:, None]
    apply = augment_on_host if images.device.type == "cpu" else augment_on_device
    inputs, targets = apply(images, masks, source, colour.numpy(), share.numpy(), OFFSET, OFFSET + 255 * GAIN)
    if params.elastic is not None:
        inputs, targets = distort(inputs, targets, params.elastic)
    if params.blur is not None:
        inputs = blur(inputs, params.blur)
    return inputs, targets


def shrink(inputs: Tensor, targets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), channels last, and targets (B, 1, H, W) at `height` x `width`; unchanged if of that size."""
    size = (height, width)
    if inputs.shape[2:] == size:
        return inputs, targets
    small = interpolate(inputs, size, mode="bilinear", antialias=True)
    return small, interpolate(targets, size, mode="bilinear", antialias=True)


def distort(inputs: Tensor, targets: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Shift the pixels of images (B, C, H, W) and targets (B, 1, H, W) alike, smoothly between a few given shifts.

    Args:
        shifts: (B, 2, rows, columns), along x and y, of points spread evenly over the image, which is 2 wide and high.

    Source: Ronneberger et al. 2015 (arXiv:1505.04597), section 3.1: a grid of 3 x 3 points, bicubic between them.
    """
    height, width = inputs.shape[2:]
    moved = interpolate(_to(shifts.numpy(), inputs), (height, width), mode="bicubic", align_corners=True)
    along_x = torch.linspace(-1, 1, width, device=inputs.device) + moved[:, 0]
    along_y = torch.linspace(-1, 1, height, device=inputs.device)[:, None] + moved[:, 1]
    grid = torch.stack([along_x, along_y], dim=-1)
    inputs, targets = (grid_sample(t, grid, padding_mode="border", align_corners=True) for t in (inputs, targets))
    return inputs.contiguous(memory_format=torch.channels_last), targets


def blur(inputs: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B, C, H, W), each with its `sigma` (B,) in pixels."""
    size = 2 * math.ceil(2.5 * float(sigma.max())) + 1  # sigma is on the CPU
    sigmas = _to(sigma.clamp(min=LEAST_SIGMA)[:, None].expand(-1, 2).contiguous().numpy(), inputs)
    return gaussian_blur2d(inputs, size, sigmas, border_type="replicate").contiguous(memory_format=torch.channels_last)


def augment_on_device(
    images: Tensor,
    masks: Tensor,
    source: NDArray[np.float32],
    colour: NDArray[np.float32],
    share: NDArray[np.float32],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """`augment_on_host`, which documents the arguments, in torch's operations for any device."""
    batch, height, width = masks.shape
    pixels = torch.empty((batch, 4, height, width), device=images.device)  # the mask travels as a fourth channel
    pixels[:, :3] = images.permute(0, 3, 1, 2)
    pixels[:, 3] = masks
    pixels = warp(pixels, source)
    matrix = np.zeros((batch, 4, 4), np.float32)
    matrix[:, :3, :3], matrix[:, 3, 3] = colour, 1 / 255
    grey = (pixels[:, :3].mean(dim=(2, 3)) * _to(share, pixels)).sum(dim=1, keepdim=True)
    offset = torch.cat([(grey + low).expand(-1, 3), torch.zeros_like(grey)], dim=1)
    pixels = torch.baddbmm(offset[:, :, None], _to(matrix, pixels), pixels.flatten(2)).unflatten(2, (height, width))
    return (
        pixels[:, :3].clamp_(low, high).contiguous(memory_format=torch.channels_last),
        pixels[:, 3:].contiguous(),
    )


def geometry_matrix(params: AugmentParams, height: int, width: int) -> Tensor:
    """(B, 3, 3) on the CPU, from pixels of the source to pixels of the result: flip, then scale, rotate, shift."""
    batch = len(params.flip)
    flip = torch.eye(3).repeat(batch, 1, 1)
    flip[:, 0, 0] = 1 - 2 * params.flip
    flip[:, 0, 2] = params.flip * (width - 1)
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(batch, 2)
    scale = params.scale[:, None].expand(batch, 2)
    return get_affine_matrix2d(params.shift, center, scale, params.angle) @ flip


def warp(pixels: Tensor, source: NDArray[np.float32]) -> Tensor:
    """Sample (B, C, H, W) bilinearly where `source` (B, 2, 3) points; beyond the edge the edge repeats.

    Equals `kornia.geometry.warp_affine` with `padding_mode="border"`, whose grid costs as much as the sampling.
    """
    height, width = pixels.shape[2:]
    # Pixel x is at 2x / (width - 1) - 1 in grid_sample's coordinates (align_corners=True).
    unit = np.array([[2 / max(width - 1, 1)], [2 / max(height - 1, 1)]], np.float32)
    to_unit = _to(source * unit - np.array([0, 0, 1], np.float32), pixels)[:, None, None]
    along_x = torch.arange(width, device=pixels.device)[:, None] * to_unit[..., 0]
    along_y = torch.arange(height, device=pixels.device)[:, None, None] * to_unit[..., 1]
    grid = along_x + (along_y + to_unit[..., 2])  # (B, H, W, 2)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=True)


def colour_matrix(params: AugmentParams) -> Tensor:
    """(B, 3, 3) on the CPU: brightness, contrast, saturation, hue, but for the grey that contrast adds.

    Saturation and hue leave greys alone, so that grey passes through them unchanged.
    """
    luma = LUMA_WEIGHTS.expand(3, 3)
    saturation = params.saturation[:, None, None]
    saturate = saturation * torch.eye(3) + (1 - saturation) * luma
    # Rodrigues' rotation about the grey axis, then luma restored: greys and brightness stay.
    angle = (2 * math.pi * params.hue)[:, None, None]
    k = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = torch.eye(3) + angle.sin() * k + (1 - angle.cos()) * (k @ k)
    turn = turn + luma @ (torch.eye(3) - turn)
    return (params.brightness * params.contrast)[:, None, None] * (turn @ saturate)


def _to(array: NDArray[np.float32], like: Tensor) -> Tensor:
    """Onto `like`'s device without waiting for it."""
    tensor = torch.from_numpy(array)
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
