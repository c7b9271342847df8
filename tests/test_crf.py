"""Refinement against float64 references written from the papers, and on photos whose outline is known."""

import numpy as np
import pytest
import torch

from fastseg.data.resample import mask_from_array, resize_area, sampling_grid
from fastseg.network.outline.crf import guide_size, mean_field_crf, refine_with_crf
from fastseg.network.outline.upsample import upsample_logits

CRF = {
    "radius": 3,
    "iterations": 7,
    "smoothness": 0.1,
    "smoothness_sigma": 1.5,
    "appearance": 0.4,
    "appearance_sigma": 2.5,
    "colour_sigma": 0.2,
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def dense_mean_field(
    logits: np.ndarray,
    photo: np.ndarray,
    *,
    radius: int,
    iterations: int,
    smoothness: float,
    smoothness_sigma: float,
    appearance: float,
    appearance_sigma: float,
    colour_sigma: float,
) -> np.ndarray:
    """Probabilities of the labels (C, H, W), by the paper's algorithm with all pairs of pixels and all labels.

    The logits are (C, H, W), of two labels (1, H, W) as is then the result; the photo is (H, W, 3) uint8.
    """
    labels, height, width = logits.shape
    places = np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2).astype(np.float64)
    colours = photo.reshape(-1, 3) / 255
    steps = np.abs(places[:, None] - places[None])
    squared = (steps**2).sum(-1)
    colour = ((colours[:, None] - colours[None]) ** 2).sum(-1)
    kernel = smoothness * np.exp(-squared / (2 * smoothness_sigma**2)) + appearance * np.exp(
        -squared / (2 * appearance_sigma**2) - colour / (2 * colour_sigma**2)
    )
    kernel *= (steps.max(-1) <= radius) & (squared > 0)
    unary = -logits.reshape(labels, -1).T.astype(np.float64)  # energy of each label
    if labels == 1:
        unary = np.concatenate([np.zeros_like(unary), unary], axis=1)
    compatibility = 1 - np.eye(unary.shape[1])  # Potts

    def normalised(energy: np.ndarray) -> np.ndarray:
        values = np.exp(-(energy - energy.min(1, keepdims=True)))
        return values / values.sum(1, keepdims=True)

    q = normalised(unary)
    for _ in range(iterations):
        q = normalised(unary + kernel @ q @ compatibility)
    return q.T[1 if labels == 1 else 0 :].reshape(labels, height, width)


def probabilities(refined: torch.Tensor) -> np.ndarray:
    return (refined.sigmoid() if refined.shape[1] == 1 else refined.softmax(1)).numpy()


def pixels(*shape: int, seed: int = 1) -> torch.Tensor:
    return (255 * noise(*shape, 3, seed=seed)).to(torch.uint8)


@pytest.mark.parametrize("labels", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "changes", [{}, {"radius": 1}, {"radius": 40}, {"appearance": 0.0}, {"smoothness": 0.0}, {"iterations": 0}], ids=str
)
def test_crf_equals_the_dense_one(changes, labels):
    settings = {**CRF, **changes}
    logits, photos = 4 * noise(2, labels, 13, 17) - 2, pixels(2, 13, 17) // 3
    photos[:, :, 8:] += 128  # two colours, so that the window matters and so does the colour
    found = probabilities(mean_field_crf(logits, photos, **settings))
    for i in range(2):
        expected = dense_mean_field(logits[i].numpy(), photos[i].numpy(), **settings)
        assert np.abs(found[i] - expected).max() < 1e-4
        if settings["iterations"]:  # it did something
            assert np.abs(probabilities(logits)[i] - expected).max() > (0.05 if labels < 7 else 0.02)


def test_crf_defaults_equal_the_dense_one():
    logits, photos = 4 * noise(1, 1, 11, 14) - 2, pixels(1, 11, 14) // 10
    expected = dense_mean_field(logits[0].numpy(), photos[0].numpy(), **mean_field_crf.__kwdefaults__)
    assert np.abs(mean_field_crf(logits, photos).sigmoid()[0].numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("certainty", [1.0, 3.5])
def test_crf_equals_the_dense_one_where_few_labels_change(certainty, labels):
    """Most of a picture has decided after a few steps; what goes on is along the outline and at the picture's edge."""
    y, x = np.mgrid[:26, :40]
    depth = 8 - np.hypot(y - 15, 0.7 * (x - 32))  # in a blob that the right edge cuts
    grain = np.random.default_rng(0).normal(0, 2, (26, 40, 3))
    photo = (130 - 40 * (depth / 3 + 0.5).clip(0, 1)[..., None] + grain).clip(0, 255).astype(np.uint8)
    seen = np.roll(depth > 0, (3, -2), (0, 1)).astype(np.float32)
    logits = torch.from_numpy(certainty * (2 * seen - 1))[None, None] + 0.2 * noise(1, 1, 26, 40)
    if labels == 3:  # the third is nowhere
        logits = torch.cat([-logits / 2, logits / 2, logits.abs().neg() - 12], dim=1)
    settings = mean_field_crf.__kwdefaults__
    after = {}
    for steps in (4, 5, 9, 10):
        after[steps] = dense_mean_field(logits[0].numpy(), photo, **{**settings, "iterations": steps})
    assert (2 * np.abs(after[5] - after[4]) > 1e-6).mean() < 0.19
    assert np.abs(after[10] - after[9]).max() > 0.01  # it has not come to rest
    found = probabilities(mean_field_crf(logits, torch.from_numpy(photo)[None]))[0]
    assert np.abs(found - after[10]).max() < (1e-4 if labels == 1 else 1e-3)


def test_constant_stays_constant():
    undecided = torch.zeros(1, 1, 30, 41)
    assert torch.equal(mean_field_crf(undecided, pixels(1, 30, 41)), undecided)


def test_crf_gives_the_other_label_its_mirror_image():
    logits, photos = 4 * noise(1, 1, 13, 17) - 2, pixels(1, 13, 17)
    assert torch.allclose(mean_field_crf(-logits, photos, **CRF), -mean_field_crf(logits, photos, **CRF), atol=1e-5)


def test_two_labels_are_the_binary_case():
    logits, photos = 4 * noise(2, 1, 13, 17) - 2, pixels(2, 13, 17)
    both = mean_field_crf(torch.cat([torch.zeros_like(logits), logits], dim=1), photos, **CRF)
    assert torch.allclose(both[:, 1:] - both[:, :1], mean_field_crf(logits, photos, **CRF), atol=1e-3)


def test_the_order_of_labels_does_not_matter():
    logits, photos, order = 4 * noise(1, 4, 13, 17) - 2, pixels(1, 13, 17), [2, 0, 3, 1]
    refined = mean_field_crf(logits, photos, **CRF)
    assert torch.allclose(mean_field_crf(logits[:, order], photos, **CRF), refined[:, order], atol=1e-3)


def car(width: int, height: int, centre: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy photo (1, H, W, 3) of a coloured shape with corners, and its mask (1, H, W)."""
    y, x = np.mgrid[:height, :width] / height
    shape = (abs(x - centre) < 0.35) & (abs(y - 0.5) < 0.22) | (np.hypot(x - centre, y - 0.3) < 0.16)
    colours = np.where(shape[..., None], (150, 60, 50), (110, 120, 130))
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    photo = (colours + grain).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(photo)[None], torch.from_numpy(shape)[None]


def coarse_logits(mask: torch.Tensor, height: int, width: int, sharpness: float = 6) -> torch.Tensor:
    """What a perfect network of height x width cells would say, (1, 1, height, width)."""
    cells = mask_from_array(mask[0].numpy().astype(np.uint8), height, width, "area")
    return sharpness * (torch.from_numpy(cells)[None, None].float() / 255 - 0.5)


def guides(photos: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Photos (B, H, W, 3) as `refine_with_crf` wants them for a network of height x width cells."""
    size = guide_size(height, width)
    grid = sampling_grid(photos.shape[2], photos.shape[1], size[1], size[0])
    return torch.from_numpy(np.stack([resize_area(photo.numpy(), grid, *size) for photo in photos]))


def dice(predicted: torch.Tensor, true: torch.Tensor) -> float:
    return (2 * (predicted & true).sum() / (predicted.sum() + true.sum())).item()


@pytest.mark.parametrize(
    ("cells", "size"),
    [((160, 240), (320, 480)), ((32, 48), (320, 480)), ((480, 300), (480, 300)), ((640, 960), (640, 960))],
)
def test_grid_has_whole_pixels_a_cell(cells, size):
    assert guide_size(*cells) == size


@pytest.mark.parametrize("size", [(480, 320), (1913, 1275), (250, 170)])  # the second covers more than the photo
def test_refined_outline_is_nearer_to_the_photo(size):
    photo, mask = car(*size, centre=0.75)
    logits, (height, width) = coarse_logits(mask, 20, 30), mask.shape[1:]
    refined = upsample_logits(refine_with_crf(logits, guides(photo, 20, 30), (height, width)), height, width)
    before, after = dice(upsample_logits(logits, height, width)[:, 0] > 0, mask), dice(refined[:, 0] > 0, mask)
    assert 1 - after < 0.5 * (1 - before)


def test_batch_is_refined_one_by_one():
    photos, masks = zip(*(car(300, 200, centre) for centre in (0.5, 0.75, 1.0)), strict=True)
    logits = torch.cat([coarse_logits(mask, 16, 24) for mask in masks])
    together = refine_with_crf(logits, guides(torch.cat(photos), 16, 24), (200, 300))
    for i, photo in enumerate(photos):
        alone = refine_with_crf(logits[i : i + 1], guides(photo, 16, 24), (200, 300))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-3)
    assert together.shape[2:] == guide_size(16, 24)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (1, 700), (17, 5)])
def test_photos_of_any_size(height, width):
    refined = refine_with_crf(8 * noise(2, 1, 16, 24) - 4, guides(pixels(2, height, width), 16, 24), (height, width))
    assert refined.shape == (2, 1, *guide_size(16, 24))
    assert refined.isfinite().all()
    assert upsample_logits(refined, height, width).shape == (2, 1, height, width)


def test_half_precision_logits_are_refined_in_float32():
    photo, mask = car(300, 200, 0.75)
    logits, guide = coarse_logits(mask, 16, 24).bfloat16(), guides(photo, 16, 24)
    refined = refine_with_crf(logits, guide, (200, 300))
    assert torch.equal(refined, refine_with_crf(logits.float(), guide, (200, 300)))
    assert refined.dtype == torch.float32


def test_inputs_are_left_as_they_were():
    photo, mask = car(120, 80, 0.75)
    logits, guide = coarse_logits(mask, 16, 24), guides(photo, 16, 24)
    before = logits.clone(), guide.clone()
    refine_with_crf(logits, guide, (80, 120))
    assert torch.equal(logits, before[0])
    assert torch.equal(guide, before[1])


def test_what_cannot_be_refined_is_refused():
    logits, photos = torch.zeros(1, 1, 4, 6), torch.zeros(1, 8, 12, 3, dtype=torch.uint8)
    for wrong in (photos[0], photos.permute(0, 3, 1, 2), photos.float()):
        with pytest.raises(ValueError, match="logits must be"):
            refine_with_crf(logits, wrong, (80, 120))
    for wrong in (photos[:, :3], photos[:, :, :5], torch.cat([photos, photos])):
        with pytest.raises(ValueError, match="photos must be as many"):
            refine_with_crf(logits, wrong, (80, 120))


@pytest.mark.gpu
def test_logits_of_a_gpu_are_refined_as_those_of_the_cpu():
    photo, mask = car(958, 640, centre=0.75)
    logits, guide = coarse_logits(mask, 80, 120), guides(photo, 80, 120)
    there = refine_with_crf(logits.cuda(), guide.cuda(), (640, 958))
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), refine_with_crf(logits, guide, (640, 958)))
