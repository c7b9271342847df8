"""IoU and Dice against torchmetrics; boundary IoU against erosion by brute force, scipy, and known cases."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

from fastseg.network.metrics import Scores, boundary_band, boundary_iou


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    blobs = torch.rand(13, 20, 30, generator=generator)
    return blobs > 0.6, (blobs + 0.3 * torch.rand(13, 20, 30, generator=generator)) > 0.7


def test_scores_equal_torchmetrics(masks):
    predicted, target = masks
    scores = Scores()
    for part in (slice(0, 5), slice(5, 13)):
        scores.update(predicted[part], target[part])
    found = scores.compute()
    f1, jaccard = BinaryF1Score(multidim_average="samplewise"), BinaryJaccardIndex()
    per_image_iou = [jaccard(p.int(), t.int()).item() for p, t in zip(predicted, target, strict=True)]
    assert found["dice"] == pytest.approx(f1(predicted.int(), target.int()).mean().item(), abs=1e-6)
    assert found["iou"] == pytest.approx(sum(per_image_iou) / 13, abs=1e-6)
    assert found["dice_pixels"] == pytest.approx(BinaryF1Score()(predicted.int(), target.int()).item(), abs=1e-6)
    assert found["iou_pixels"] == pytest.approx(jaccard(predicted.int(), target.int()).item(), abs=1e-6)


def test_batches_of_any_size_give_the_same(masks):
    whole, parts = Scores(), Scores()
    whole.update(*masks)
    for predicted, target in zip(*masks, strict=True):
        parts.update(predicted[None], target[None])
    assert whole.compute() == pytest.approx(parts.compute(), abs=1e-12)


def test_empty_and_wrong_masks():
    empty, full = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert Scores().update(empty, empty).tolist() == [1.0]
    assert Scores().update(full, empty).tolist() == [0.0]
    assert Scores().update(empty, full).tolist() == [0.0]
    assert Scores().update(full, full).tolist() == [1.0]


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        Scores().compute()


def eroded_by_hand(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask after `pixels` steps of 3x3 erosion; everything outside the image is background."""
    for _ in range(pixels):
        framed = np.pad(mask, 1)
        shifted = [framed[y : y + mask.shape[0], x : x + mask.shape[1]] for y, x in np.ndindex(3, 3)]
        mask = np.logical_and.reduce(shifted)
    return mask


def blobs(seed: int, share: float) -> np.ndarray:
    """(3, 37, 53) bool: smooth noise above a threshold; some blobs touch the edge of the image."""
    noise = torch.rand(3, 1, 37, 53, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4, count_include_pad=False)[:, 0]
    return (smooth > smooth.flatten(1).quantile(1 - share, dim=1)[:, None, None]).numpy()


@pytest.mark.parametrize("pixels", [1, 2, 5, 30])
def test_band_is_the_difference_to_the_eroded_mask(pixels):
    masks = blobs(seed=0, share=0.6)
    expected = np.stack([mask & ~eroded_by_hand(mask, pixels) for mask in masks])
    assert np.array_equal(boundary_band(torch.from_numpy(masks), pixels).numpy(), expected)
    assert pixels > 2 or (masks & ~expected).any()  # the inside is not all band


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


def test_a_shift_lowers_boundary_iou_more_than_dice():
    """A square of 400 pixels, shifted by 2: its bands of 8 pixels share 6 on two sides, nearly all on the others."""
    true, moved = torch.zeros(2, 1, 500, 500, dtype=torch.bool)
    true[0, 50:450, 50:450], moved[0, 50:450, 52:452] = True, True
    dice = 2 * (true & moved).sum() / (true.sum() + moved.sum())
    assert dice == pytest.approx(0.995)
    assert 0.7 < boundary_iou(moved, true, 8).item() < 0.8
    assert boundary_iou(true, true, 8).item() == 1.0


def test_empty_and_full_masks():
    empty, full = torch.zeros(1, 20, 30, dtype=torch.bool), torch.ones(1, 20, 30, dtype=torch.bool)
    assert boundary_iou(empty, empty, 2).tolist() == [1.0]
    assert boundary_iou(full, empty, 2).tolist() == [0.0]
    assert boundary_band(full, 2).sum() == 20 * 30 - 16 * 26  # the image's edge counts as an outline
