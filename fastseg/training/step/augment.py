"""Augmentation on the training device: one warp of image and mask, one colour matrix for the image.

Flip, rotation, scale and shift are composed into one matrix and sampled once; brightness, contrast, saturation, hue and
the normalisation are composed into another. The result equals kornia's `RandomHorizontalFlip`, `RandomAffine` and
`ColorJitter` in that order, with two differences: nothing is clipped between the colour steps, and hue is a rotation
about the grey axis (a linear operation) instead of a shift in HSV.

On the CPU, one compiled pass turns uint8 pixels into the network's input, with one image per thread; torch needs a
dozen passes over float32 copies. benchmarks/augment.py measures both.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from fastseg.config import Config
from fastseg.network.normalise import GAIN, OFFSET
from fastseg.runtime.kernels import njit

__all__ = ["AugmentParams", "augment", "augment_cpu", "augment_torch", "resize", "sample_params"]

LUMA_WEIGHTS = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as kornia's rgb_to_grayscale


@dataclass(frozen=True)
class AugmentParams:
    """One row of parameters per image; float32 tensors on the CPU."""

    flip: Tensor  # (B,) 0 or 1
    angle: Tensor  # (B,) degrees, counter-clockwise
    scale: Tensor  # (B,) factor
    shift: Tensor  # (B, 2) pixels, x and y
    brightness: Tensor  # (B,) factor
    contrast: Tensor  # (B,) factor about the image's mean grey
    saturation: Tensor  # (B,) factor about each pixel's grey
    hue: Tensor  # (B,) rotation about the grey axis, 1 for a full turn

    def __post_init__(self) -> None:
        for field in fields(self):
            if len(getattr(self, field.name)) != len(self.flip):
                raise ValueError(f"{field.name} must have one row per image, {len(self.flip)}")

    def take(self, rows: slice) -> "AugmentParams":
        """The parameters of a slice of the images."""
        return AugmentParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def sample_params(config: Config, batch_size: int, generator: torch.Generator) -> AugmentParams:
    """Draw parameters uniformly within the strengths of `config`.

    Args:
        generator: on the CPU. It draws 9 numbers per image, whatever the strengths.
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
    )


def augment(images: Tensor, masks: Tensor, params: AugmentParams, *, classes: bool = False) -> tuple[Tensor, Tensor]:
    """Augment and normalise a batch on its device.

    Args:
        images: (B, H, W, 3) uint8.
        masks: (B, H, W) uint8, coverage 0..255.
        classes: the masks hold numbers of classes: each pixel takes that of the nearest pixel.

    Returns:
        (B, 3, H, W) float32 in [-2, 2], channels last, and targets (B, 1, H, W), float32 in [0, 1] or uint8 classes.
    """
    height, width = masks.shape[1:]
    geometry, colour = geometry_matrix(params, height, width), GAIN * colour_matrix(params)
    source = np.linalg.inv(geometry.double().numpy())[:, :2].astype(np.float32)  # from the result to the source
    # Contrast scales about the mean grey of the warped image, which only the device knows.
    share = LUMA_WEIGHTS * (GAIN * (1 - params.contrast) * params.brightness)[:, None]
    apply = augment_cpu if images.device.type == "cpu" else augment_torch
    return apply(images, masks, source, colour.numpy(), share.numpy(), OFFSET, OFFSET + 255 * GAIN, classes=classes)


def resize(inputs: Tensor, targets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Resize a batch to `height` x `width` with an antialiased filter; a batch of that size is returned as it is.

    Args:
        inputs: (B, C, H, W), channels last.
        targets: (B, 1, H, W): coverage in any float dtype, or uint8 classes, of which the nearest are taken.
    """
    size = (height, width)
    if inputs.shape[2:] == size:
        return inputs, targets
    inputs = interpolate(inputs, size, mode="bilinear", antialias=True)
    if targets.dtype == torch.uint8:
        return inputs, interpolate(targets, size, mode="nearest-exact")
    return inputs, interpolate(targets, size, mode="bilinear", antialias=True)


def augment_cpu(
    images: Tensor,
    masks: Tensor,
    source: NDArray[np.float32],
    colour: NDArray[np.float32],
    share: NDArray[np.float32],
    low: float,
    high: float,
    *,
    classes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Warp, colour and normalise a batch.

    Args:
        images: (B, H, W, 3) uint8.
        masks: (B, H, W) uint8.
        source: (B, 2, 3) from pixels (x, y, 1) of the result to pixels of the source, whose edge pixels repeat outside.
        colour: (B, 3, 3) from uint8 values to the network's input.
        share: (B, 3) factors of the warped image's mean red, green and blue; their sum is added to every channel.
        low, high: bounds of the network's input; `low` is added to every channel.
        classes: take the nearest pixel of the masks.

    Returns:
        (B, 3, H, W) float32, channels last, and (B, 1, H, W) float32 in [0, 1], or uint8 classes.
    """
    batch, height, width = masks.shape
    inputs = torch.empty((batch, height, width, 3))
    targets = torch.empty((batch, height, width), dtype=torch.uint8 if classes else torch.float32)
    nearest = True if classes else None  # None, and not False, selects the code when it is compiled
    arrays = (images.numpy(), masks.numpy(), source, colour, share, inputs.numpy(), targets.numpy())

    def augment_one(index: int) -> None:
        _augment_image(*[array[index] for array in arrays], low, high, nearest)  # type: ignore[call-arg]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(augment_one, range(batch)))
    return inputs.permute(0, 3, 1, 2), targets.unsqueeze(1)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _augment_image(
    image: Any,
    mask: Any,
    source: Any,
    colour: Any,
    share: Any,
    out: Any,
    out_mask: Any,
    low: Any,
    high: Any,
    nearest: Any,
) -> None:
    height, width = mask.shape
    red_sum, green_sum, blue_sum = np.float32(0), np.float32(0), np.float32(0)
    last_x, last_y = np.float32(width - 1), np.float32(height - 1)
    a, b, c = source[0, 0], source[0, 1], source[0, 2]
    d, e, f = source[1, 0], source[1, 1], source[1, 2]
    for y in range(height):
        row_x, row_y = b * np.float32(y) + c, e * np.float32(y) + f
        red_row, green_row, blue_row = np.float32(0), np.float32(0), np.float32(0)
        for x in range(width):
            at_x = min(max(a * np.float32(x) + row_x, np.float32(0)), last_x)
            at_y = min(max(d * np.float32(x) + row_y, np.float32(0)), last_y)
            x0, y0 = int(at_x), int(at_y)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            right, below = at_x - np.float32(x0), at_y - np.float32(y0)
            w11 = right * below
            w10, w01 = below - w11, right - w11
            w00 = np.float32(1) - right - w10
            red = w00 * image[y0, x0, 0] + w01 * image[y0, x1, 0] + w10 * image[y1, x0, 0] + w11 * image[y1, x1, 0]
            green = w00 * image[y0, x0, 1] + w01 * image[y0, x1, 1] + w10 * image[y1, x0, 1] + w11 * image[y1, x1, 1]
            blue = w00 * image[y0, x0, 2] + w01 * image[y0, x1, 2] + w10 * image[y1, x0, 2] + w11 * image[y1, x1, 2]
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = red, green, blue
            if nearest is None:
                cover = w00 * mask[y0, x0] + w01 * mask[y0, x1] + w10 * mask[y1, x0] + w11 * mask[y1, x1]
                out_mask[y, x] = cover * np.float32(1 / 255)
            else:
                out_mask[y, x] = mask[int(at_y + np.float32(0.5)), int(at_x + np.float32(0.5))]
            red_row, green_row, blue_row = red_row + red, green_row + green, blue_row + blue
        red_sum, green_sum, blue_sum = red_sum + red_row, green_sum + green_row, blue_sum + blue_row
    pixels = np.float32(height * width)
    offset = np.float32(low) + (share[0] * red_sum + share[1] * green_sum + share[2] * blue_sum) / pixels
    low, high = np.float32(low), np.float32(high)
    rr, rg, rb = colour[0, 0], colour[0, 1], colour[0, 2]
    gr, gg, gb = colour[1, 0], colour[1, 1], colour[1, 2]
    br, bg, bb = colour[2, 0], colour[2, 1], colour[2, 2]
    for y in range(height):
        for x in range(width):
            red, green, blue = out[y, x, 0], out[y, x, 1], out[y, x, 2]
            out[y, x, 0] = min(max(rr * red + rg * green + rb * blue + offset, low), high)
            out[y, x, 1] = min(max(gr * red + gg * green + gb * blue + offset, low), high)
            out[y, x, 2] = min(max(br * red + bg * green + bb * blue + offset, low), high)


def augment_torch(
    images: Tensor,
    masks: Tensor,
    source: NDArray[np.float32],
    colour: NDArray[np.float32],
    share: NDArray[np.float32],
    low: float,
    high: float,
    *,
    classes: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same as `augment_cpu`, with torch's operations, on any device."""
    batch, height, width = masks.shape
    grid = sampling_points(source, height, width, images.device)
    pixels = torch.empty((batch, 4, height, width), device=images.device)  # the mask is a fourth channel
    pixels[:, :3] = images.permute(0, 3, 1, 2)
    pixels[:, 3] = masks
    pixels = grid_sample(pixels, grid, padding_mode="border", align_corners=True)
    matrix = np.zeros((batch, 4, 4), np.float32)
    matrix[:, :3, :3], matrix[:, 3, 3] = colour, 1 / 255
    grey = (pixels[:, :3].mean(dim=(2, 3)) * _to(share, pixels.device)).sum(dim=1, keepdim=True)
    offset = torch.cat([(grey + low).expand(-1, 3), torch.zeros_like(grey)], dim=1)
    pixels = torch.baddbmm(offset[:, :, None], _to(matrix, pixels.device), pixels.flatten(2)).unflatten(
        2, (height, width)
    )
    inputs = pixels[:, :3].clamp_(low, high).contiguous(memory_format=torch.channels_last)
    if not classes:
        return inputs, pixels[:, 3:].contiguous()
    numbers = masks.unsqueeze(1).float()
    return inputs, grid_sample(numbers, grid, "nearest", padding_mode="border", align_corners=True).to(torch.uint8)


def geometry_matrix(params: AugmentParams, height: int, width: int) -> Tensor:
    """(B, 3, 3) on the CPU, from pixels of the source to pixels of the result: flip, scale, rotation, shift."""
    from kornia.geometry.transform import get_affine_matrix2d  # here, because only training needs kornia

    batch = len(params.flip)
    flip = torch.eye(3).repeat(batch, 1, 1)
    flip[:, 0, 0] = 1 - 2 * params.flip
    flip[:, 0, 2] = params.flip * (width - 1)
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(batch, 2)
    scale = params.scale[:, None].expand(batch, 2)
    return get_affine_matrix2d(params.shift, center, scale, params.angle) @ flip


def sampling_points(source: NDArray[np.float32], height: int, width: int, device: torch.device) -> Tensor:
    """(B, H, W, 2) on the device, for `grid_sample` with `align_corners=True`: the points of `source` (B, 2, 3).

    Sampling there, with edge pixels that repeat, equals `kornia.geometry.warp_affine` with `padding_mode="border"`,
    where making the grid takes as long as sampling.
    """
    # Pixel x is at 2x / (width - 1) - 1 in grid_sample's coordinates.
    unit = np.array([[2 / max(width - 1, 1)], [2 / max(height - 1, 1)]], np.float32)
    to_unit = _to(source * unit - np.array([0, 0, 1], np.float32), device)[:, None, None]
    along_x = torch.arange(width, device=device)[:, None] * to_unit[..., 0]
    along_y = torch.arange(height, device=device)[:, None, None] * to_unit[..., 1]
    return along_x + (along_y + to_unit[..., 2])


def colour_matrix(params: AugmentParams) -> Tensor:
    """(B, 3, 3) on the CPU: brightness, contrast, saturation, hue, without the grey that contrast adds.

    Saturation and hue do not change greys, so that this grey can be added at the end.
    """
    luma = LUMA_WEIGHTS.expand(3, 3)
    saturation = params.saturation[:, None, None]
    saturate = saturation * torch.eye(3) + (1 - saturation) * luma
    # Rodrigues' rotation about the grey axis, then the luma is restored: greys and brightness do not change.
    angle = (2 * math.pi * params.hue)[:, None, None]
    k = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = torch.eye(3) + angle.sin() * k + (1 - angle.cos()) * (k @ k)
    turn = turn + luma @ (torch.eye(3) - turn)
    return (params.brightness * params.contrast)[:, None, None] * (turn @ saturate)


def _to(array: NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy an array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
