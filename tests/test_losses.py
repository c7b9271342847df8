"""Losses against a float64 reference."""

import numpy as np
import pytest
import torch

from fastseg.network.losses import bce_dice_loss, bce_loss, dice_loss


def reference(logits: np.ndarray, target: np.ndarray, eps: float = 1.0) -> tuple[float, float]:
    """BCE and Dice loss in float64, from their definitions."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    dice = [1 - (2 * (a * b).sum() + eps) / (a.sum() + b.sum() + eps) for a, b in zip(p, target, strict=True)]
    return bce, float(np.mean(dice))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_equal_a_float64_reference(dtype):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (3, 1, 9, 7))).to(dtype)
    target = torch.from_numpy(rng.uniform(0, 1, (3, 1, 9, 7))).float()
    bce, dice = reference(logits.double().numpy(), target.double().numpy())
    assert bce_loss(logits, target).item() == pytest.approx(bce, rel=1e-5)
    assert dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-5)
    assert bce_dice_loss(logits, target).item() == pytest.approx(bce + dice, rel=1e-5)
    assert bce_dice_loss(logits, target).dtype == torch.float32


def test_an_empty_mask_predicted_empty_has_loss_zero_and_a_gradient():
    logits = torch.full((1, 1, 8, 8), -30.0, requires_grad=True)
    loss = dice_loss(logits, torch.zeros(1, 1, 8, 8))
    loss.backward()
    assert loss.item() < 1e-6
    assert logits.grad.isfinite().all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\) and \(1, 4, 4\)"):
        dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
