"""IoU and Dice against torchmetrics; boundary IoU against erosion by brute force, scipy, and known cases."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryJaccardIndex,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from fastseg.classes import IGNORED
from fastseg.data.batch import Batch
from fastseg.errors import DataError
from fastseg.network.losses import class_loss
from fastseg.network.metrics import ClassScores, Scores, boundary_band, boundary_iou, class_boundary_iou, score_batches
from fastseg.runtime.device import Runtime


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


NUM_CLASSES = 6


@pytest.fixture
def labels():
    """Predicted and true classes (7, 20, 30): 4 occurs in predictions only, 5 nowhere; the last image is ignored."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (7, 20, 30), generator=generator)
    wrong = torch.rand(target.shape, generator=generator) < 0.3
    predicted = torch.where(wrong, torch.randint(0, 5, target.shape, generator=generator), target)
    target[:3, :5], target[6] = IGNORED, IGNORED
    return predicted.to(torch.uint8), target.to(torch.uint8)


def test_scores_of_classes_equal_torchmetrics(labels):
    predicted, target = labels
    scores = ClassScores(NUM_CLASSES)
    per_image = [scores.update(predicted[part], target[part]) for part in (slice(0, 5), slice(5, 7))]
    found = scores.compute()
    arguments = {"num_classes": NUM_CLASSES, "ignore_index": IGNORED}
    theirs = predicted.long(), target.long()
    for name, metric in (("iou", MulticlassJaccardIndex), ("dice", MulticlassF1Score)):
        assert found[name] == pytest.approx(metric(**arguments, average="macro")(*theirs).item(), abs=1e-6)
        each = metric(**arguments, average="none")(*theirs).tolist()
        assert found[f"class_{name}"][:5] == pytest.approx(each[:5], abs=1e-6)
        assert found[f"class_{name}"][4:] == [0.0, None]
    accuracy = MulticlassAccuracy(**arguments, average="micro")(*theirs).item()
    assert found["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert torch.equal(scores.sums, MulticlassConfusionMatrix(**arguments)(*theirs))
    f1 = MulticlassF1Score(**arguments, average="macro")
    expected = [f1(p.long(), t.long()).item() for p, t in zip(predicted[:6], target[:6], strict=True)]
    assert torch.cat(per_image).tolist() == pytest.approx([*expected, 1.0], abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 12, 150])
def test_scores_of_any_number_of_classes(num_classes):
    target = torch.randint(0, num_classes, (2, 40, 50), generator=torch.Generator().manual_seed(1))
    predicted = torch.where(torch.rand(target.shape) < 0.5, target.roll(1), target)
    scores = ClassScores(num_classes)
    scores.update(predicted, target)
    expected = MulticlassJaccardIndex(num_classes, average="macro")(predicted, target).item()
    assert scores.compute()["iou"] == pytest.approx(expected, abs=1e-6)


def test_nothing_but_ignored_pixels_is_an_error():
    scores = ClassScores(3)
    ignored = torch.full((1, 4, 4), IGNORED)
    assert scores.update(torch.zeros(1, 4, 4, dtype=torch.int64), ignored).tolist() == [1.0]
    with pytest.raises(DataError, match=r"every pixel.*ignored.*ignore_value"):
        scores.compute()


def test_batches_are_scored_by_the_largest_logit(labels):
    """A network that returns fixed logits; the loss is a mean over images."""
    predicted, target = labels
    logits = torch.nn.functional.one_hot(predicted.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()
    images = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 20, 30, 3)

    def model(inputs):
        return logits[((inputs[:, 0, 0, 0] + 2) * 255 / 4).round().long()]

    runtime = Runtime(torch.device("cpu"), torch.float32)
    batches = [Batch(images[part], target[part], np.arange(7)[part]) for part in (slice(0, 4), slice(4, 7))]
    found = score_batches(model, batches, runtime, NUM_CLASSES)
    scores = ClassScores(NUM_CLASSES)
    scores.update(predicted, target)
    assert found == {"loss": pytest.approx(class_loss(logits, target).item(), rel=1e-6), **scores.compute()}


def test_boundary_iou_of_classes_is_that_of_each_alone(labels):
    predicted, target = (values[0, :, :].clone() for values in labels)
    target[:, :15], predicted[:, :15] = 1, 1  # blobs, whose insides are no outlines
    target[:6, :6] = IGNORED
    found = class_boundary_iou(predicted, target, NUM_CLASSES, 2)
    counted = torch.where(target == IGNORED, IGNORED, predicted)
    for number in range(5):
        assert found[number] == boundary_iou((counted == number)[None], (target == number)[None], 2).item()
    assert found[5] is None
    same = class_boundary_iou(torch.where(target == IGNORED, 2, target), target, NUM_CLASSES, 2)
    assert same == [1.0, 1.0, 1.0, 1.0, None, None]  # ignored pixels cost nothing
