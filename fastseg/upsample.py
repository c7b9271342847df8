"""From the network's cells back to the photo's pixels, on the sampling grid that the network was trained on."""

from torch import Tensor
from torch.nn.functional import interpolate

from fastseg.data.resample import sampling_grid

__all__ = ["upsample_logits"]


def upsample_logits(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits at a photo's own size; threshold them afterwards, at 0.

    The cells cover the grid's extent, which may reach some columns and rows beyond the photo (1920 columns of 1918):
    what lies there is cut off. Resizing straight to the photo's size would drift by as many pixels.

    Args:
        logits: (B, C, h, w) of photos that are all `height` x `width`.

    Returns:
        (B, C, height, width), of the same dtype: linear between the centres of cells; the mean over a pixel where
        the photo is smaller than the cells.

    Raises:
        ValueError: a size is below 1.
    """
    grid = sampling_grid(width, height, logits.shape[-1], logits.shape[-2])
    size = (grid.extent_y, grid.extent_x)
    return interpolate(logits, size, mode="bilinear", antialias=True)[..., :height, :width]
