"""Losses against a float64 reference."""

from contextlib import nullcontext

import kornia
import numpy as np
import pytest
import torch

import fastseg
from fastseg.classes import IGNORED
from fastseg.errors import ConfigError
from fastseg.network import losses
from fastseg.network.losses import (
    bce_dice_loss,
    bce_loss,
    class_dice_loss,
    class_loss,
    cross_entropy_loss,
    dice_loss,
    lovasz_loss,
)


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


def class_reference(logits: np.ndarray, target: np.ndarray, weights=None, eps: float = 1.0) -> tuple[float, float]:
    """Cross-entropy and Dice loss in float64, from their definitions, image by image."""
    entropies, dices = [], []
    for values, classes in zip(logits.astype(np.float64), target, strict=True):
        counted = classes != IGNORED
        if not counted.any():
            entropies.append(0.0)
            dices.append(0.0)
            continue
        values, classes = values[:, counted], classes[counted]
        p = np.exp(values) / np.exp(values).sum(0)
        factor = np.ones(len(values)) if weights is None else weights
        entropies.append(np.mean([-factor[c] * np.log(p[c, i]) for i, c in enumerate(classes)]))
        of_class = [(p[c], classes == c) for c in np.unique(classes)]
        dices.append(np.mean([1 - (2 * (a * b).sum() + eps) / (a.sum() + b.sum() + eps) for a, b in of_class]))
    return float(np.mean(entropies)), float(np.mean(dices))


@pytest.fixture
def classes():
    """Logits of 4 classes and their targets: class 3 occurs in the first image only, the last is all ignored."""
    rng = np.random.default_rng(1)
    target = rng.integers(0, 3, (4, 9, 7))
    target[0, :3], target[1, 2:5, 3], target[3] = 3, IGNORED, IGNORED
    return torch.from_numpy(rng.normal(0, 3, (4, 4, 9, 7))), torch.from_numpy(target.astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0, 2.0]])
def test_losses_of_classes_equal_a_float64_reference(classes, dtype, weights):
    logits, target = classes[0].to(dtype), classes[1]
    entropy, dice = class_reference(logits.double().numpy(), target.numpy(), weights)
    factors = None if weights is None else torch.tensor(weights)
    assert cross_entropy_loss(logits, target, factors).item() == pytest.approx(entropy, rel=1e-5)
    assert class_dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-5)
    assert class_loss(logits, target, factors).item() == pytest.approx(entropy + dice, rel=1e-5)
    assert class_loss(logits, target, factors).dtype == torch.float32


@pytest.mark.parametrize("name", ["auto", "focal", "tversky", "lovasz"])
def test_ignored_pixels_change_neither_loss_nor_gradient(classes, name):
    logits, target = classes[0].float(), classes[1]
    other = torch.where((target == IGNORED).unsqueeze(1), torch.randn_like(logits), logits)
    found = []
    for values in (logits, other):
        values.requires_grad_()
        loss = class_loss(values, target, name=name)
        loss.backward()
        found.append((loss.item(), values.grad))
        assert not values.grad[(target == IGNORED).unsqueeze(1).expand_as(values)].any()
        assert values.grad[0].abs().sum() > 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["auto", "focal", "tversky", "lovasz"])
def test_the_loss_of_a_batch_is_the_mean_over_its_images(classes, name):
    """So that processes and micro-batches add up to the whole batch."""
    logits, target = classes
    parts = [class_loss(logits[i : i + 1], target[i : i + 1], name=name).item() for i in range(4)]
    assert class_loss(logits, target, name=name).item() == pytest.approx(np.mean(parts), rel=1e-5)
    assert parts[3] == pytest.approx(0, abs=1e-6)  # all ignored


def test_named_losses_are_kornias_where_nothing_is_ignored(classes):
    logits, target = classes[0][:1].float(), classes[1][:1]
    entropy, dice = cross_entropy_loss(logits, target), class_dice_loss(logits, target)
    focal = kornia.losses.focal_loss(logits, target.long(), alpha=None, gamma=2.0, reduction="sum") / target.numel()
    tversky = kornia.losses.tversky_loss(logits, target.long(), 0.3, 0.7)
    lovasz = kornia.losses.lovasz_softmax_loss(logits, target.long())
    for name, expected in (("focal", focal + dice), ("tversky", entropy + tversky), ("lovasz", entropy + lovasz)):
        torch.testing.assert_close(class_loss(logits, target, name=name), expected, msg=name)


def test_lovasz_leaves_ignored_pixels_out(classes):
    """An image without its ignored rows has the same loss."""
    logits, target = classes[0][:1].float(), classes[1][:1].clone()
    target[:, 6:] = IGNORED
    torch.testing.assert_close(lovasz_loss(logits, target), lovasz_loss(logits[:, :, :6], target[:, :6]))


@pytest.mark.parametrize(("version", "refused"), [("0.8.2", True), ("0.9.0", False), ("1.0", False)])
def test_an_old_kornia_is_refused_for_its_region_losses(version, refused, monkeypatch):
    monkeypatch.setattr(losses.metadata, "version", lambda package: version)
    losses.check_loss(fastseg.Config(loss="focal", classes=["a", "b"]))
    for name in ("tversky", "lovasz"):
        with pytest.raises(ConfigError, match=r"^loss: .*0\.9.*Use auto") if refused else nullcontext():
            losses.check_loss(fastseg.Config(loss=name, classes=["a", "b"]))
