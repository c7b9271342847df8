"""Logits back at the photo's size, against the sampling grid itself."""

import numpy as np
import pytest
import torch

from fastseg.data.resample import mask_from_array, sampling_grid
from fastseg.network.outline.upsample import upsample_logits


def test_upsampled_ramp_stands_where_the_grid_says():
    """The mean column of each cell, upsampled, is the column itself: 1918 columns under 240 cells of 8."""
    centres = 8 * torch.arange(240.0) + 3.5
    columns = upsample_logits(centres.expand(1, 1, 160, 240), 1280, 1918)[0, 0]
    assert columns.shape == (1280, 1918)
    inside = torch.arange(4, 1916)
    torch.testing.assert_close(columns[:, inside], inside.float().expand(1280, -1), atol=2e-3, rtol=0)


def test_an_area_mask_comes_back_at_its_place():
    """A disc's coverage, upsampled and cut at one half, is the disc but for its outline, without drift."""
    y, x = np.mgrid[:1280, :1918]
    for centre in (300, 960, 1600):
        disc = ((x - centre) ** 2 + (y - 640) ** 2 < 280**2).astype(np.uint8)
        cells = torch.from_numpy(mask_from_array(disc, 160, 240, "area")).float() / 255 - 0.5
        back = (upsample_logits(cells[None, None], 1280, 1918)[0, 0] > 0).numpy()
        dice = 2 * (back & (disc > 0)).sum() / (back.sum() + disc.sum())
        assert dice > 0.997
        assert abs(x[back].mean() - x[disc > 0].mean()) < 0.1


def test_photos_smaller_than_the_cells_get_the_mean():
    logits = torch.randn(2, 1, 16, 24)
    assert torch.allclose(upsample_logits(logits, 1, 1)[:, :, 0, 0], logits.mean((2, 3)), atol=0.2)
    assert upsample_logits(logits, 5, 7).shape == (2, 1, 5, 7)


@pytest.mark.parametrize("width", [1918, 1913, 1001, 481, 240, 30, 1])
def test_a_finer_grid_stands_where_it_says(width):
    """The mean column of each cell, on the grid of twice as many, is the mean column of that grid's cells."""
    cells, fine = sampling_grid(width, 1280, 240, 160), sampling_grid(width, 1280, 480, 320)
    if width == 1913:
        assert (cells.extent_x, fine.extent_x) == (1920, 1914)  # both grids begin at the left, and end apart
    centres = (torch.arange(240.0) + 0.5) * cells.extent_x / 240
    columns = upsample_logits(centres.expand(1, 1, 160, 240), 1280, width, onto=(320, 480))[0, 0]
    expected = ((torch.arange(480.0) + 0.5) * fine.extent_x / 480).clamp(centres[0], centres[-1])
    torch.testing.assert_close(columns, expected.expand(320, 480), atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("cells", range(1, 120, 7))
def test_a_grid_has_the_size_that_was_asked_for(cells):
    for pixels in range(1, 9):
        onto = (cells * pixels, 3 * pixels)
        assert upsample_logits(torch.zeros(1, 1, cells, 3), 500, 700, onto=onto).shape[2:] == onto
