"""Boundary IoU against erosion by brute force, and against cases whose answer is known."""

import numpy as np
import pytest
import torch

from fastseg.network.metrics import boundary_band, boundary_iou


def eroded_by_hand(mask: np.ndarray, pixels: int) -> np.ndarray:
    """What is left of a mask that loses `pixels` steps of a 3x3 erosion; beyond the picture is background."""
    for _ in range(pixels):
        framed = np.pad(mask, 1)
        shifted = [framed[y : y + mask.shape[0], x : x + mask.shape[1]] for y, x in np.ndindex(3, 3)]
        mask = np.logical_and.reduce(shifted)
    return mask


def blobs(seed: int, share: float) -> np.ndarray:
    """(3, 37, 53) bool: smooth noise above a threshold, so that blobs touch the frame here and there."""
    noise = torch.rand(3, 1, 37, 53, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4, count_include_pad=False)[:, 0]
    return (smooth > smooth.flatten(1).quantile(1 - share, dim=1)[:, None, None]).numpy()


@pytest.mark.parametrize("pixels", [1, 2, 5, 30])
def test_band_is_what_erosion_takes_away(pixels):
    masks = blobs(seed=0, share=0.6)
    expected = np.stack([mask & ~eroded_by_hand(mask, pixels) for mask in masks])
    assert np.array_equal(boundary_band(torch.from_numpy(masks), pixels).numpy(), expected)
    assert pixels > 2 or (masks & ~expected).any()  # not all of it is band


@pytest.mark.parametrize("pixels", [1, 3])
def test_iou_of_the_bands(pixels):
    predicted, true = blobs(seed=1, share=0.5), blobs(seed=1, share=0.6)
    expected = []
    for a, b in zip(predicted, true, strict=True):
        a, b = a & ~eroded_by_hand(a, pixels), b & ~eroded_by_hand(b, pixels)
        expected.append((a & b).sum() / (a | b).sum())
    found = boundary_iou(torch.from_numpy(predicted), torch.from_numpy(true), pixels)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert 0 < min(expected) <= max(expected) < 1


def test_scipy_agrees_at_full_size():
    ndimage = pytest.importorskip("scipy.ndimage")
    y, x = np.mgrid[:1280, :1918]
    mask = np.hypot((x - 900) / 700, (y - 640) / 400) < 1
    expected = mask & ~ndimage.minimum_filter(mask, size=17, mode="constant", cval=0)
    assert np.array_equal(boundary_band(torch.from_numpy(mask)[None], 8)[0].numpy(), expected)


def test_a_shift_that_dice_forgives_costs_boundary_iou():
    """A square of 400 pixels, moved by 2: bands of 8 pixels share 6 on two sides and nearly all on the other two."""
    true, moved = torch.zeros(2, 1, 500, 500, dtype=torch.bool)
    true[0, 50:450, 50:450], moved[0, 50:450, 52:452] = True, True
    dice = 2 * (true & moved).sum() / (true.sum() + moved.sum())
    assert dice == pytest.approx(0.995)
    assert 0.7 < boundary_iou(moved, true, 8).item() < 0.8
    assert boundary_iou(true, true, 8).item() == 1.0


def test_empty_and_full():
    empty, full = torch.zeros(1, 20, 30, dtype=torch.bool), torch.ones(1, 20, 30, dtype=torch.bool)
    assert boundary_iou(empty, empty, 2).tolist() == [1.0]
    assert boundary_iou(full, empty, 2).tolist() == [0.0]
    assert boundary_band(full, 2).sum() == 20 * 30 - 16 * 26  # the frame counts as an outline
