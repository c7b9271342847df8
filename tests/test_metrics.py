import pytest
import torch
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

from fastseg.network.metrics import Scores


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


def test_empty_and_wrong():
    empty, full = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert Scores().update(empty, empty).tolist() == [1.0]
    assert Scores().update(full, empty).tolist() == [0.0]
    assert Scores().update(empty, full).tolist() == [0.0]
    assert Scores().update(full, full).tolist() == [1.0]


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        Scores().compute()
