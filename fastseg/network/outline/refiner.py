"""The outline refiner: a small convolutional network that corrects logits along the outline by the photo.

    segmenter, refiner = fastseg.load("best.pt"), fastseg.load_refiner("best.pt")
    probabilities = segmenter(images)  # uint8 (B, 160, 240, 3) to float32 (B, 160, 240)
    refined = refiner(photos, probabilities)  # with uint8 (B, 640, 960, 3) to float32 (B, 640, 960)

The network sees 8x8 pixels of a Carvana photo as one cell, and its upsampled logits say roughly where an outline runs.
The refiner sees the photo on a grid that is finer, 4x4 points per cell, and adds a correction to the upsampled logits.
It changes only points near an outline, so only tiles along the outline are computed: a tenth of the photo.

Of the ideas that others have published, a head that starts at zero and adds to coarse logits is that of residual
refinement (Deng et al. 2018, R3Net); computing only where the outline is uncertain is PointRend's (Kirillov et al.
2020, arXiv:1912.08193). The sizes were chosen by measurement: `python benchmarks/refiner.py`.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, pad

from fastseg.config import Config
from fastseg.data.decode import Size
from fastseg.errors import CheckpointError
from fastseg.network.checkpoint import load_checkpoint, saved_config
from fastseg.network.normalise import normalise
from fastseg.network.outline.upsample import upsample_logits
from fastseg.network.unet import init_weights
from fastseg.runtime.device import choose_device

__all__ = [
    "MAX_CLASSES",
    "MAX_SCALE",
    "Refiner",
    "choose_scale",
    "find_outline",
    "OutlineRefiner",
    "load_refiner",
    "read_refiner",
    "refine_outline",
]

CHANNELS = 16
DILATIONS = (1, 1, 2, 4, 1)  # of the 3x3 convolutions
GRID = 960  # points on the longer side of the grid, if the photos have as many pixels
MAX_SCALE = 8
MAX_CLASSES = 32  # above it, the logits of a photo on the grid take too much memory
REACH = 2  # cells: points further from an outline keep their logits
MAX_LOGIT, LOGIT_GAIN = 10.0, 0.25  # logits are clamped and scaled to the range of the photo's values
MIN_SHARE = 1e-6  # probabilities are clamped to it
TILE = 8  # cells on each side of a tile
MAX_POINTS = 2**21  # refined at once, with those around the tiles, so that large networks do not fill the memory


class Refiner(nn.Module):
    """Five 3x3 convolutions with batch normalisation and ReLU, and a 1x1 head that starts at zero.

    The convolutions have no padding, so that a tile gives the same values as the whole photo.

    Args:
        num_outputs: logits per pixel, C: 1 for two values, else the number of classes.
        scale: points of the grid along each side of a cell.
    """

    halo = sum(DILATIONS)  #: points around a tile on which its values depend
    scale: Tensor

    def __init__(self, num_outputs: int, scale: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        layers: list[nn.Module] = []
        channels = 3 + num_outputs
        for dilation in DILATIONS:
            layers += [
                nn.Conv2d(channels, CHANNELS, 3, dilation=dilation, bias=False),
                nn.BatchNorm2d(CHANNELS),
                nn.ReLU(inplace=True),
            ]
            channels = CHANNELS
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(CHANNELS, num_outputs, 1)

    def reset(self, generator: torch.Generator) -> None:
        """Initialise the weights; refined logits then equal the upsampled ones."""
        init_weights(self, generator)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, photos: Tensor, logits: Tensor) -> Tensor:
        """Refine logits.

        Args:
            photos: (B, 3, H + 2 halo, W + 2 halo), normalised.
            logits: (B, C, H + 2 halo, W + 2 halo), upsampled to the same grid; any float dtype.

        Returns:
            (B, C, H, W) float32.
        """
        logits = logits.float()
        if logits.shape[1] > 1:  # logits of classes are defined up to a constant
            logits = logits.log_softmax(1)
        inputs = torch.cat([photos, logits.clamp(-MAX_LOGIT, MAX_LOGIT) * LOGIT_GAIN], 1)
        inside = slice(self.halo, -self.halo)
        correction: Tensor = self.head(self.body(inputs.contiguous(memory_format=torch.channels_last)))
        return logits[..., inside, inside] + correction.float()


def choose_scale(cells: Size, photo: Size) -> int:
    """Points of the grid along each side of a cell: as many as give 960 on the longer side, or all pixels of the photo.

    >>> choose_scale((160, 240), (1280, 1918))
    4
    """
    most = max(cells)
    return max(1, min(GRID // most, -(-max(photo) // most), MAX_SCALE))


def find_outline(logits: Tensor) -> Tensor:
    """The cells at most two cells away from one of another sign, or of another class.

    Args:
        logits: (B, C, h, w).

    Returns:
        (B, h, w) bool.
    """
    labels = logits > 0 if logits.shape[1] == 1 else logits.argmax(1, keepdim=True)
    labels = labels.float()
    size = 2 * REACH + 1
    return (max_pool2d(labels, size, 1, REACH) != -max_pool2d(-labels, size, 1, REACH))[:, 0]


@torch.inference_mode()
def refine_outline(refiner: Refiner, logits: Tensor, photo: Tensor, size: Size) -> Tensor:
    """Refine the logits of one photo; the threshold stays 0, or the largest logit.

    Args:
        refiner: in evaluation mode.
        logits: (C, h, w), any float dtype, on any device.
        photo: (H, W, 3) uint8, decoded onto the grid of `refiner.scale` times as many points by `decode_image`.
        size: height and width of the photo itself, which determine what both grids cover.

    Returns:
        (C, H, W) float32 on the CPU, for `upsample_logits`, `threshold_logits` or `label_logits`. Points that are not
        near an outline have the upsampled logits.
    """
    device, scale = refiner.head.weight.device, int(refiner.scale)
    height, width = photo.shape[:2]
    outline = find_outline(logits[None])
    fine = upsample_logits(logits[None].float(), *size, onto=(height, width))
    if not outline.any():
        return fine[0].cpu()
    tile, halo = TILE * scale, refiner.halo
    below, right = -height % tile, -width % tile
    wanted = pad(outline[0], (0, right // scale, 0, below // scale)).unfold(0, TILE, TILE).unfold(1, TILE, TILE)
    chosen = wanted.any(3).any(2).nonzero()  # (N, 2) rows and columns of tiles
    all_logits = _tiles(pad(fine, (halo, halo + right, halo, halo + below), "replicate")[0], tile, halo)
    border = ((halo, halo + below), (halo, halo + right), (0, 0))
    pixels = torch.from_numpy(np.pad(photo.numpy(), border, "edge"))
    all_photos = _tiles(pixels.permute(2, 0, 1), tile, halo)
    result = pad(fine, (0, right, 0, below))[0].cpu()
    tiles_down, tiles_across = wanted.shape[:2]
    blocks = result.view(len(result), tiles_down, tile, tiles_across, tile).permute(1, 3, 0, 2, 4)
    inside = slice(halo, -halo)
    for places in chosen.split(max(MAX_POINTS // (tile + 2 * halo) ** 2, 1)):
        rows, columns = places.unbind(1)
        coarse = all_logits[rows, columns].to(device)
        photos = all_photos[rows.cpu(), columns.cpu()].permute(0, 2, 3, 1)
        refined = refiner(normalise(photos.to(device)), coarse)
        # Within a tile, the points far from the outline keep their logits: a result does not depend on the tiles.
        near = interpolate(wanted[rows, columns][:, None].float(), scale_factor=float(scale)).to(device) > 0
        blocks[rows.cpu(), columns.cpu()] = torch.where(near, refined, coarse[..., inside, inside]).cpu()
    return result[:, :height, :width].contiguous()


def _tiles(values: Tensor, tile: int, halo: int) -> Tensor:
    """(C, H, W) cut into (rows, columns, C, tile + 2 halo, tile + 2 halo), without a copy."""
    size = tile + 2 * halo
    return values.unfold(1, size, tile).unfold(2, size, tile).permute(1, 2, 0, 3, 4)


def read_refiner(path: str | os.PathLike[str]) -> Refiner | None:
    """The outline refiner of a checkpoint, in evaluation mode on the CPU; None if it has none.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg.
    """
    return _restore_refiner(load_checkpoint(path), path)


def _restore_refiner(state: dict[str, Any], path: str | os.PathLike[str]) -> Refiner | None:
    weights = state.get("refiner")
    if weights is None:
        return None
    refiner = Refiner(saved_config(state, path).num_outputs, 1)
    try:
        refiner.load_state_dict(weights)
        fits = 1 <= int(refiner.scale) <= MAX_SCALE
    except (AttributeError, RuntimeError, TypeError):  # other keys, other shapes, or no tensors
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: the weights of its outline refiner do not fit. Use another checkpoint.")
    return refiner.requires_grad_(False).eval()


class OutlineRefiner(nn.Module):
    """A refiner with its preprocessing: takes decoded photos and the network's probabilities for the whole photo.

    `fastseg.predict` computes the same, but only near outlines.

    Args:
        refiner: of a checkpoint.
        config: the configuration of its training.

    Attributes:
        scale: points of the grid along each side of a cell of the network.
    """

    def __init__(self, refiner: Refiner, config: Config) -> None:
        super().__init__()
        self.refiner = refiner
        self.config = config
        self.scale = int(refiner.scale)

    def forward(self, images: Tensor, probabilities: Tensor) -> Tensor:
        """Refined probabilities on the grid.

        Args:
            images: (B, H, W, 3) uint8 RGB, the photos by area average; H and W are `scale` times h and w.
            probabilities: (B, h, w) float32 of `fastseg.load`'s network; with classes (B, C, h, w).

        Returns:
            (B, H, W) float32 in [0, 1]; with classes (B, C, H, W), which sum to 1 over C.

        Raises:
            ValueError: the shapes do not fit.
        """
        expected = tuple(self.scale * side for side in probabilities.shape[-2:])
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (*expected, 3):
            raise ValueError(
                f"images must be uint8 (B, {expected[0]}, {expected[1]}, 3); got {images.dtype} {tuple(images.shape)}."
            )
        classes = bool(self.config.classes)
        limited = probabilities.clamp(MIN_SHARE, 1 - MIN_SHARE)
        logits = limited.log() if classes else limited.logit()[:, None]
        fine = interpolate(logits, scale_factor=float(self.scale), mode="bilinear")
        border = (self.refiner.halo,) * 4
        refined = self.refiner(pad(normalise(images), border, "replicate"), pad(fine, border, "replicate"))
        near = interpolate(find_outline(logits)[:, None].float(), scale_factor=float(self.scale)) > 0
        result = torch.where(near, refined, fine)
        return result.softmax(1) if classes else result[:, 0].sigmoid()


def load_refiner(checkpoint: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> OutlineRefiner | None:
    """Load the outline refiner of a checkpoint, in evaluation mode and with frozen weights; None if it has none.

    Args:
        checkpoint: `best.pt` of a run, or a `.safetensors` file from `fastseg export`.
        device: as in `Config`.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint of fastseg.
        ConfigError: this machine lacks the device.
    """
    torch_device = choose_device(Config(device=str(device)).device)
    state = load_checkpoint(checkpoint)
    refiner = _restore_refiner(state, checkpoint)
    return None if refiner is None else OutlineRefiner(refiner, saved_config(state, checkpoint)).eval().to(torch_device)
