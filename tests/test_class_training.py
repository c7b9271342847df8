"""Training, resuming, scoring and drawing with masks of three classes and ignored pixels."""

import csv
import json
import math
import signal
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

import fastseg
from fastseg.classes import IGNORED
from fastseg.data.host import load_photo
from fastseg.data.loader import make_loader
from fastseg.network.checkpoint import load_model
from fastseg.network.metrics import boundary_iou
from fastseg.network.normalise import normalise
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.device import choose_runtime
from fastseg.training.recipe import make_class_weights
from tests.conftest import TINY, flags, with_pictures
from tests.test_distributed import run_two
from tests.test_resume import assert_kill_changes_nothing, send_signal
from tests.test_training import same, weights

CLASSES = {"wall": 0, "disc": 7, "box": 3}
VALUES = list(CLASSES.values())
SMALL = {**TINY, "num_epochs": 2, "val_img_dir": "", "val_fraction": 0.34, "classes": CLASSES}


def write_class_pair(folder: Path, name: str, width: int = 96, height: int = 64, seed: int = 0, ignored: str = "rim"):
    """A red disc and a blue box on a grey wall; the disc's rim, or all of the mask, is ignored."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre_x, centre_y = width * rng.uniform(0.2, 0.45), height * rng.uniform(0.35, 0.65)
    distance = np.hypot((x - centre_x) / (0.16 * width), (y - centre_y) / (0.24 * height))
    left, top = width * rng.uniform(0.62, 0.7), height * rng.uniform(0.2, 0.5)
    box = (x >= left) & (x < left + 0.25 * width) & (y >= top) & (y < top + 0.4 * height)
    mask = np.select([distance < 1, box], [VALUES[1], VALUES[2]], VALUES[0]).astype(np.uint8)
    colours = np.array([[150, 150, 140], [40, 60, 190], [0, 0, 0], [190, 50, 40]])
    image = colours[np.select([distance < 1, box], [3, 1], 0)] + rng.normal(0, 8, (height, width, 3))
    mask[np.full(mask.shape, ignored == "all") | (np.abs(distance - 1) < 0.06)] = 255
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.jpg", quality=95)
    picture = Image.fromarray(mask)
    picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    picture.save(folder / "masks" / f"{name}_mask.png")


@pytest.fixture(scope="module")
def class_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of 3 groups x 4 views."""
    folder = tmp_path_factory.mktemp("classes")
    for group in range(3):
        for view in range(4):
            write_class_pair(folder, f"thing{group}_{view + 1:02d}", seed=10 * group + view)
    return folder


def class_config(data: Path, out: Path, **changes: object) -> fastseg.Config:
    folders = {"train_img_dir": str(data / "images"), "train_mask_dir": str(data / "masks")}
    return fastseg.Config(**{**SMALL, **folders, "out_dir": str(out), **changes})


@pytest.fixture(scope="module")
def trained(class_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> fastseg.TrainResult:
    out = tmp_path_factory.mktemp("runs")
    changes = {"base_channels": 8, "num_epochs": 40, "learning_rate": 3e-4}
    with with_pictures():
        return fastseg.train(class_config(class_pairs, out, **changes))


def test_three_classes_are_learned(trained, class_pairs):
    """On pairs that the network has not seen."""
    assert trained.val_iou > 0.9
    assert trained.val_dice > trained.val_iou
    summary = json.loads((trained.run_dir / "summary.json").read_text())
    assert list(summary["classes"]) == list(CLASSES)
    ious = [scores["iou"] for scores in summary["classes"].values()]
    assert np.mean(ious) == pytest.approx(trained.val_iou, abs=1e-9)
    assert summary["val_pixel_accuracy"] > 0.97
    best = trained.history[trained.best_epoch - 1]
    assert (best["val_iou"], best["val_class_iou"]) == (trained.val_iou, ious)


def test_the_pictures_have_the_classes_colours(trained):
    config = fastseg.Config.from_json(trained.run_dir / "config.json")
    assert [(item.name, item.value) for item in config.classes] == list(CLASSES.items())
    for name in ("curves.png", "overlay.png"):
        shown = np.asarray(Image.open(trained.run_dir / name).convert("RGB")).reshape(-1, 3).astype(int)
        for item in config.classes[1:]:
            assert (np.abs(shown - item.colour).max(1) < 12).sum() > 20, (name, item.name)


def reference_scores(checkpoint: Path, data: Path, refine: str) -> dict[str, float]:
    """Scores at full size by Pillow, torch and torchmetrics."""
    model, config = load_model(checkpoint)
    arguments = {"num_classes": 3, "average": "macro", "ignore_index": IGNORED}
    iou, dice = MulticlassJaccardIndex(**arguments), MulticlassF1Score(**arguments)
    bands: list[list[float]] = [[], [], []]
    pairs = fastseg.find_pairs(data / "images", data / "masks")
    loader = fastseg.Loader(pairs, height=32, width=48, batch_size=1, shuffle=False, classes=config.classes)
    for images, _, (index,) in loader:
        with Image.open(pairs.mask_path(index)) as file:
            values = np.asarray(file)
        true = np.select([values == value for value in VALUES], range(3), IGNORED)
        with torch.no_grad():
            logits = model(normalise(images))
            if refine == "crf":
                photo = load_photo(pairs.image_path(index), guide_size(32, 48))
                logits = refine_with_crf(logits, torch.from_numpy(photo)[None], true.shape)
            predicted = upsample_logits(logits, *true.shape)[0].argmax(0)
        true = torch.from_numpy(true)
        iou.update(predicted[None], true[None])
        dice.update(predicted[None], true[None])
        predicted = torch.where(true == IGNORED, IGNORED, predicted)
        for number, found in enumerate(bands):
            found.append(boundary_iou((predicted == number)[None], (true == number)[None]).item())
    return {
        "full_iou": iou.compute().item(),
        "full_dice": dice.compute().item(),
        "full_boundary_iou": float(np.mean([np.mean(found) for found in bands])),
    }


@pytest.mark.parametrize("refine", ["none", "crf"])
def test_evaluate_scores_each_class(refine, trained, class_pairs, tmp_path):
    best = trained.run_dir / "best.pt"
    folders = class_pairs / "images", class_pairs / "masks"
    scores = fastseg.evaluate(best, *folders, out=tmp_path, refine=refine, device="cpu", precision="fp32")
    for name, expected in reference_scores(best, class_pairs, refine).items():
        assert scores[name] == pytest.approx(expected, abs=2e-4), name  # ties fall either way
    for kind in ("iou", "dice"):
        for size in ("", "full_"):
            each = scores[f"{size}class_{kind}"]
            assert list(each) == list(CLASSES)
            assert np.mean(list(each.values())) == pytest.approx(scores[f"{size}{kind}"], abs=1e-9)
    assert np.mean(list(scores["full_class_boundary_iou"].values())) == pytest.approx(scores["full_boundary_iou"])
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "summary.json", "worst.png", "confusion.png"}
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert all(0.5 < float(row["full_dice"]) <= 1 for row in rows)
    assert json.loads((tmp_path / "summary.json").read_text())["refine"] == refine
    for name in ("worst.png", "confusion.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10


def test_evaluate_repeats_the_scores_of_training(class_pairs, tmp_path):
    folders = {"val_img_dir": str(class_pairs / "images"), "val_mask_dir": str(class_pairs / "masks")}
    result = fastseg.train(class_config(class_pairs, tmp_path, num_epochs=1, **folders))
    arguments = (result.run_dir / "best.pt", class_pairs / "images", class_pairs / "masks")
    scores = fastseg.evaluate(*arguments, full_size=False, device="cpu", precision="fp32", batch_size=5)
    for name in ("loss", "dice", "iou", "pixel_accuracy"):
        assert scores[name] == pytest.approx(result.history[0][f"val_{name}"], abs=1e-5)


def test_predicted_masks_are_masks_to_train_on(trained, class_pairs, tmp_path):
    """Their values are those of the classes, so that they read back."""
    fastseg.predict(trained.run_dir / "best.pt", class_pairs / "images", tmp_path / "masks", device="cpu")
    scores = fastseg.evaluate(trained.run_dir / "best.pt", class_pairs / "images", tmp_path / "masks", device="cpu")
    assert scores["full_iou"] == 1.0


@pytest.mark.parametrize("changes", [{}, {"class_weights": "none", "ema_decay": 0.9}])
@pytest.mark.parametrize("batch", [2, 3])
def test_resume_equals_uninterrupted(class_pairs, tmp_path, changes, batch, monkeypatch):
    whole = fastseg.train(class_config(class_pairs, tmp_path, name="whole", **changes))
    counted = 0 if changes else 2  # batches, before the first step
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGTERM, batch + counted)
        stopped = fastseg.train(class_config(class_pairs, tmp_path, name="stopped", **changes))
    assert stopped.interrupted
    assert math.isnan(stopped.val_dice) == (batch == 2)
    resumed = fastseg.train(class_config(class_pairs, tmp_path, name="stopped", **changes))
    for name in ("last.pt", "best.pt"):
        assert same(weights(whole.run_dir / name), weights(resumed.run_dir / name))
    assert [entry["train_loss"] for entry in resumed.history] == [entry["train_loss"] for entry in whole.history]
    assert [entry["val_class_iou"] for entry in resumed.history] == [entry["val_class_iou"] for entry in whole.history]


@pytest.mark.parametrize(("changes", "counted"), [({}, 2), ({"loss": "focal", "class_weights": "none"}, 0)])
def test_kill_nine_does_not_change_the_result(class_pairs, tmp_path, changes, counted):
    """`counted` batches are read before the first step, for the weights of the classes."""
    assert_kill_changes_nothing(class_config(class_pairs, tmp_path, num_epochs=3, **changes), tmp_path, counted + 4)


@pytest.mark.parametrize("changes", [{}, {"loss": "lovasz", "class_weights": "none"}])
def test_two_processes_compute_what_one_does(class_pairs, tmp_path, changes):
    config = class_config(class_pairs, tmp_path, name="one", **changes)
    one = fastseg.train(config)
    finished = run_two(config.replace(name="two"), tmp_path)
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line, entry in zip(lines, one.history, strict=True):
        for score in ("train_loss", "val_loss", "val_dice", "val_iou", "val_pixel_accuracy", "val_class_iou"):
            assert line[score] == pytest.approx(entry[score], abs=1e-4), score


@pytest.mark.parametrize(
    ("loss", "recipe"),
    [("auto", "tutorial"), *((loss, "fast") for loss in ("auto", "focal", "tversky", "lovasz"))],
)
def test_every_loss_trains(class_pairs, tmp_path, loss, recipe):
    changes = {"loss": loss, "recipe": recipe, "learning_rate": 1e-3, "num_epochs": 4}
    history = fastseg.train(class_config(class_pairs, tmp_path, **changes)).history
    assert history[-1]["train_loss"] < 0.97 * history[0]["train_loss"]


@pytest.mark.usefixtures("pictures")
def test_tensorboard_shows_each_class(class_pairs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fastseg.train(class_config(class_pairs, tmp_path, tensorboard=True))
    events = EventAccumulator(str(result.run_dir))
    events.Reload()
    for number, name in enumerate(CLASSES):
        shown = [event.value for event in events.Scalars(f"class_iou/{name}")]
        assert shown == pytest.approx([entry["val_class_iou"][number] for entry in result.history], rel=1e-6)


def test_weights_come_from_the_pixels_of_the_training_masks(class_pairs, tmp_path):
    config = class_config(class_pairs, tmp_path, class_weights="auto", classes={**CLASSES, "tree": 9})
    runtime = choose_runtime(config)
    pairs = fastseg.find_pairs(config.train_img_dir, config.train_mask_dir)
    loader = make_loader(pairs, config, runtime, training=True)
    position = loader.state_dict()
    found = make_class_weights(config, loader, runtime)
    assert loader.state_dict() == position
    masks = torch.cat([masks for _, masks, _ in make_loader(pairs, config, runtime, training=False)])
    counts = np.array([(masks == number).sum().item() for number in range(4)])
    share = counts / counts.sum()
    expected = np.where(share > 0, 1 / np.sqrt(np.where(share > 0, share, 1)) / np.sqrt(share).sum(), 1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert (share * found.numpy()).sum() == pytest.approx(1, rel=1e-6)  # the mean over pixels
    for plain in ({"class_weights": "none"}, {"recipe": "tutorial"}, {"classes": ""}):
        assert make_class_weights(config.replace(**plain), loader, runtime) is None
    given = make_class_weights(config.replace(class_weights="1,2,0.5,0"), loader, runtime)
    assert given.tolist() == [1, 2, 0.5, 0]


def test_a_class_that_never_occurs_and_an_image_that_is_ignored_change_no_score(class_pairs, tmp_path):
    data = tmp_path / "data"
    for seed in range(4):
        write_class_pair(data, f"thing{seed}_01", seed=seed, ignored="all" if seed == 3 else "rim")
    folders = {"val_img_dir": str(data / "images"), "val_mask_dir": str(data / "masks"), "batch_size": 2}
    result = fastseg.train(class_config(data, tmp_path, classes={**CLASSES, "tree": 9}, num_epochs=20, **folders))
    classes = json.loads((result.run_dir / "summary.json").read_text())["classes"]
    assert classes["tree"]["iou"] in (None, 0.0)  # 0 where it is predicted
    ious = [scores["iou"] for scores in classes.values() if scores["iou"] is not None]
    assert result.val_iou == pytest.approx(np.mean(ious))
    assert all(math.isfinite(entry["train_loss"]) for entry in result.history)


def test_validation_masks_that_are_all_ignored_are_reported(tmp_path):
    for seed in range(2):
        write_class_pair(tmp_path, f"thing{seed}_01", seed=seed, ignored="all")
    folders = {"val_img_dir": str(tmp_path / "images"), "val_mask_dir": str(tmp_path / "masks"), "batch_size": 2}
    with pytest.raises(fastseg.DataError, match=r"every pixel.*ignored.*ignore_value"):
        fastseg.train(class_config(tmp_path, tmp_path / "runs", num_epochs=1, **folders))


@pytest.mark.parametrize("num_classes", [2, 12, 150])
def test_any_number_of_classes(num_classes, tmp_path):
    rng = np.random.default_rng(num_classes)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for view in range(4):
        labels = rng.integers(0, num_classes, (8, 12)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(labels).save(tmp_path / f"masks/thing{view}_01_mask.png")
        image = np.stack([labels, 255 - labels, labels // 2], -1)
        Image.fromarray(image).save(tmp_path / f"images/thing{view}_01.png")
    names = [f"class {number}" for number in range(num_classes)]
    result = fastseg.train(class_config(tmp_path, tmp_path / "runs", classes=names, num_epochs=1, batch_size=2))
    assert len(result.history[0]["val_class_iou"]) == num_classes
    images, masks = tmp_path / "images", tmp_path / "masks"
    scores = fastseg.evaluate(result.run_dir / "best.pt", images, masks, out=tmp_path / "scores", device="cpu")
    assert 0 <= scores["full_iou"] <= 1
    assert (tmp_path / "scores/confusion.png").exists()


def test_a_checkpoint_of_other_classes_is_refused(trained, class_pairs, tmp_path):
    best = str(trained.run_dir / "best.pt")
    for classes in ("", "a,b", "a,b,c,d"):
        with pytest.raises(fastseg.CheckpointError, match=r"classes.*3"):
            fastseg.train(class_config(class_pairs, tmp_path, base_channels=8, checkpoint=best, classes=classes))


def test_a_run_of_the_same_number_of_other_classes_is_not_resumed(class_pairs, tmp_path):
    fastseg.train(class_config(class_pairs, tmp_path, num_epochs=1))
    swapped = {"wall": 0, "box": 7, "disc": 3}
    with pytest.raises(
        fastseg.CheckpointError, match=r"last\.pt: .*wall, box, disc.*wall, disc, box.*load_model=false"
    ):
        fastseg.train(class_config(class_pairs, tmp_path, classes=swapped))


def test_commands_name_the_classes(cli, class_pairs, tmp_path):
    folders = {"train_img_dir": class_pairs / "images", "train_mask_dir": class_pairs / "masks", "out_dir": tmp_path}
    given = {**SMALL, **folders, "num_epochs": 1, "classes": tmp_path / "classes.json"}
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    done = cli("train", *flags(given))
    assert done.status == 0, done.err
    assert "(means over classes, epoch 1)" in done.out
    best = tmp_path / "carvana/best.pt"
    folders = ("--img-dir", class_pairs / "images", "--mask-dir", class_pairs / "masks", "--device", "cpu")
    done = cli("evaluate", "--checkpoint", best, *folders, "--out", tmp_path / "scores")
    small, full, _, where, last = done.out.splitlines()
    scores = json.loads(last)
    for line, size in ((small, ""), (full, "full_")):
        assert f"pixel accuracy {scores[f'{size}pixel_accuracy']:.4f}; IoU of wall " in line
    assert "(refine crf)" in full
    assert where.startswith("scores.csv, summary.json, confusion.png and worst.png are in ")


def test_settings_of_classes_are_checked():
    for changes, words in (
        ({"loss": "focal"}, r"^loss: .*two values.*focal.*classes"),
        ({"class_weights": [1, 2]}, r"^class_weights: .*one number per class, 0.*2"),
        ({"class_weights": "1,2", "classes": "a,b,c"}, r"^class_weights: .*3.*2"),
        ({"class_weights": "some", "classes": "a,b"}, r"^class_weights: .*none, auto"),
        ({"class_weights": [0, 0], "classes": "a,b"}, r"^class_weights: .*not all 0"),
        ({"class_weights": [-1, 1], "classes": "a,b"}, r"^class_weights: .*at least 0"),
    ):
        with pytest.raises(fastseg.ConfigError, match=words):
            fastseg.Config(**changes)


def test_an_own_network_augmentation_and_loss_of_classes(class_pairs, tmp_path):
    """One logit per class; kornia's pipeline keeps the numbers of the classes."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, 2, 2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 3, 1, 1)
    )
    flip = K.AugmentationSequential(K.RandomHorizontalFlip(), data_keys=["input", "mask"])

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, targets[:, 0].long(), ignore_index=IGNORED)

    settings = class_config(class_pairs, tmp_path, num_epochs=20, learning_rate=1e-3)
    result = fastseg.train(settings, network=module, augmentation=flip, loss=loss)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    segmenter = fastseg.load(result.run_dir / "best.pt", network=module)
    assert segmenter(torch.zeros(1, 32, 48, 3, dtype=torch.uint8)).shape == (1, 3, 32, 48)
    wrong = torch.nn.Conv2d(3, 1, 1)
    with pytest.raises(fastseg.ConfigError, match=r"^network: .*\(B, 3, H, W\)"):
        fastseg.train(settings.replace(name="wrong"), network=wrong)
