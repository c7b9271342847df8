"""Augmentation against kornia's own classes and functions, given the same parameters."""

from dataclasses import fields

import kornia
import numpy as np
import pytest
import torch

import fastseg.training.step.augment
from fastseg.config import Config
from fastseg.network.normalise import normalise, to_targets
from fastseg.training.step.augment import AugmentParams, augment, resize, sample_params

OFF = dict.fromkeys(("flip", "rotation", "scale", "translation", "brightness", "contrast", "saturation", "hue"), 0)


def smooth_batch(count: int = 6, height: int = 48, width: int = 72):
    """Images without values near black or white, so that no colour step clips."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (4 + i)[:, None, None] + y / (7 - i)[:, None, None]) for i in rng.uniform(0, 3, (3, count))]
    images = (127 + 45 * np.stack(waves, -1) + rng.normal(0, 4, (count, height, width, 3))).clip(50, 200)
    masks = 255 * (np.hypot(x - width / 2, y - height / 2) < 15) * np.ones((count, 1, 1))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(masks.astype(np.uint8))


def params(count: int = 6, **changes) -> AugmentParams:
    sampled = sample_params(Config(image_height=48, image_width=80), count, torch.Generator().manual_seed(1))
    neutral = sample_params(Config(**OFF), count, torch.Generator())
    values = {f.name: getattr(sampled if changes.get(f.name) else neutral, f.name) for f in fields(AugmentParams)}
    return AugmentParams(**values)


def pixels(tensor: torch.Tensor) -> torch.Tensor:
    """From the network's input to [0, 1]."""
    return (tensor + 2) / 4


def as_unit(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def test_normalise_is_a_view_of_channels_last_and_exact():
    images, masks = smooth_batch()
    inputs, targets = normalise(images), to_targets(masks)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    expected = (images.numpy().astype(np.float64).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-6)
    assert targets.unique().tolist() == [0.0, 1.0]


def test_strengths_of_zero_change_nothing():
    images, masks = smooth_batch()
    neutral = sample_params(Config(**OFF), len(images), torch.Generator())
    for got, expected in zip(augment(images, masks, neutral), (normalise(images), to_targets(masks)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_geometry_equals_kornia_for_image_and_mask():
    images, masks = smooth_batch()
    sampled = params(flip=1, angle=1, scale=1, shift=1)
    assert 0 < sampled.flip.sum() < len(images)
    flip = kornia.geometry.transform.Hflip()
    count, height, width = masks.shape
    stacked = torch.cat([as_unit(images), masks[:, None] / 255], dim=1)
    flipped = torch.where(sampled.flip.bool()[:, None, None, None], flip(stacked), stacked)
    matrix = kornia.geometry.transform.get_affine_matrix2d(
        sampled.shift,
        torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(count, 2),
        sampled.scale[:, None].expand(count, 2),
        sampled.angle,
    )
    expected = kornia.geometry.warp_affine(flipped, matrix[:, :2], (height, width), padding_mode="border")
    inputs, targets = augment(images, masks, sampled)
    assert (pixels(inputs) - expected[:, :3]).abs().max() < 1 / 255
    assert (targets - expected[:, 3:]).abs().max() < 1 / 255


def test_colour_equals_kornias_colour_jitter():
    images, masks = smooth_batch()
    sampled = params(brightness=1, contrast=1, saturation=1)
    jitter = kornia.augmentation.ColorJitter(0.1, 0.1, 0.1, 0.0, p=1.0)
    expected = jitter(
        as_unit(images),
        params={
            "brightness_factor": sampled.brightness,
            "contrast_factor": sampled.contrast,
            "saturation_factor": sampled.saturation,
            "hue_factor": torch.zeros(len(images)),
            "order": torch.arange(4),
            "batch_prob": torch.ones(len(images)),
            "forward_input_shape": torch.tensor(as_unit(images).shape),
        },
    )
    inputs, _ = augment(images, masks, sampled)
    assert (pixels(inputs) - as_unit(images)).abs().max() > 5 / 255  # the colours did change
    assert (pixels(inputs) - expected).abs().max() < 1 / 255


def test_hue_rotates_about_grey_and_keeps_luma():
    images, masks = smooth_batch()
    grey = images[..., :1].expand_as(images)
    sampled = params(hue=1)
    torch.testing.assert_close(augment(grey, masks, sampled)[0], normalise(grey), atol=1e-4, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114])
    rotated = torch.einsum("bchw,c->bhw", pixels(augment(images, masks, sampled)[0]), luma)
    torch.testing.assert_close(rotated, torch.einsum("bchw,c->bhw", as_unit(images), luma), atol=1e-4, rtol=0)
    assert (pixels(augment(images, masks, sampled)[0]) - as_unit(images)).abs().max() > 2 / 255


def test_parameters_are_within_the_strengths_and_reproducible():
    config = Config(rotation=7, scale=0.2, flip=0.25)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    sampled = sample_params(config, 4000, generator)
    assert 6.9 < sampled.angle.abs().max() <= 7
    assert 0.79 < sampled.scale.min() < 0.81 < 1.19 < sampled.scale.max() < 1.21
    assert sampled.flip.mean().item() == pytest.approx(0.25, abs=0.03)
    assert sampled.shift.abs().amax(0).tolist() == pytest.approx([12, 8], abs=0.1)  # 5 % of 240 x 160
    generator.set_state(state)
    again = sample_params(config, 4000, generator)
    assert all(torch.equal(getattr(sampled, f.name), getattr(again, f.name)) for f in fields(AugmentParams))


def test_the_compiled_pass_equals_torch(monkeypatch):
    images, masks = smooth_batch()
    sampled = sample_params(Config(image_height=48, image_width=80), len(images), torch.Generator().manual_seed(1))
    compiled = augment(images, masks, sampled)
    monkeypatch.setattr(fastseg.training.step.augment, "augment_cpu", fastseg.training.step.augment.augment_torch)
    for got, expected in zip(compiled, augment(images, masks, sampled), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert compiled[0].is_contiguous(memory_format=torch.channels_last)


def test_resizing_keeps_image_and_mask_together():
    """A disc has the same place in both, and its mean stays the same, because each cell is an average."""
    y, x = np.mgrid[:160, :240]
    disc = torch.from_numpy(np.hypot(x - 150, y - 70) < 50).float()[None, None]
    image = disc.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    small_image, small_disc = resize(image, disc, 80, 128)
    assert small_disc.shape == (1, 1, 80, 128)
    assert small_image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small_image[:, :1], small_disc, atol=1e-6, rtol=0)
    assert small_disc.mean().item() == pytest.approx(disc.mean().item(), abs=2e-3)
    centre = (small_disc[0, 0] * torch.arange(128)).sum() / small_disc.sum()
    assert centre.item() == pytest.approx((150.5 * 128 / 240) - 0.5, abs=0.1)


def class_batch():
    """Images whose green is 10 times the class, and their masks of classes 3, 7, 11 and 255, in blocks of 12 pixels."""
    blocks = np.random.default_rng(2).choice([3, 7, 11, 255], (6, 4, 6)).astype(np.uint8)
    masks = torch.from_numpy(blocks.repeat(12, 1).repeat(12, 2))
    return masks.unsqueeze(3).expand(-1, -1, -1, 3).contiguous(), masks


@pytest.mark.parametrize("path", ["augment_cpu", "augment_torch"])
def test_classes_are_warped_like_the_image_but_to_the_nearest(path, monkeypatch):
    """No new class appears, and where the image is of one value all around, the mask has that value."""
    monkeypatch.setattr(fastseg.training.step.augment, "augment_cpu", getattr(fastseg.training.step.augment, path))
    images, masks = class_batch()
    sampled = params(flip=1, angle=1, scale=1, shift=1)
    inputs, targets = augment(images, masks, sampled, classes=True)
    assert (targets.shape, targets.dtype) == ((6, 1, 48, 72), torch.uint8)
    assert set(targets.unique().tolist()) == {3, 7, 11, 255}
    values = 255 * pixels(inputs)[:, 1]
    pure = torch.stack([(values - value).abs() < 1e-2 for value in (3, 7, 11, 255)]).any(0)
    assert pure.float().mean() > 0.7
    assert torch.equal(targets[:, 0][pure], values[pure].round().to(torch.uint8))


def test_images_do_not_depend_on_the_kind_of_mask():
    images, masks = class_batch()
    sampled = sample_params(Config(image_height=48, image_width=80), 6, torch.Generator().manual_seed(1))
    of_classes, of_coverage = (augment(images, masks, sampled, classes=classes)[0] for classes in (True, False))
    torch.testing.assert_close(of_classes, of_coverage, atol=1e-5, rtol=0)


def test_both_paths_give_the_same_classes(monkeypatch):
    images, masks = class_batch()
    sampled = sample_params(Config(image_height=48, image_width=80), 6, torch.Generator().manual_seed(1))
    compiled = augment(images, masks, sampled, classes=True)[1]
    monkeypatch.setattr(fastseg.training.step.augment, "augment_cpu", fastseg.training.step.augment.augment_torch)
    assert (augment(images, masks, sampled, classes=True)[1] == compiled).float().mean() > 0.999  # ties may differ


def test_without_augmentation_classes_stay():
    images, masks = class_batch()
    neutral = sample_params(Config(**OFF), len(images), torch.Generator())
    assert torch.equal(augment(images, masks, neutral, classes=True)[1][:, 0], masks)


def test_resizing_takes_the_nearest_class():
    _, masks = class_batch()
    inputs = torch.zeros(6, 3, 48, 72)
    _, half = resize(inputs, masks.unsqueeze(1), 24, 36)
    assert torch.equal(half[:, 0], masks[:, 1::2, 1::2])  # blocks of 12 become blocks of 6
    _, odd = resize(inputs, masks.unsqueeze(1), 32, 40)
    assert set(odd.unique().tolist()) <= {3, 7, 11, 255}
