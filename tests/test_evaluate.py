"""Scores of a folder against torchmetrics and Pillow, and what `evaluate` writes and refuses."""

import csv
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

import fastseg
from fastseg.cli import main
from fastseg.data.host import HostDecoder, load_photo
from fastseg.errors import ConfigError, DataError, OutputError
from fastseg.masks.refine import METHODS
from fastseg.network.checkpoint import load_checkpoint, load_model, save_checkpoint
from fastseg.network.metrics import boundary_iou
from fastseg.network.normalise import normalise
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.refiner import read_refiner
from fastseg.network.outline.upsample import upsample_logits
from fastseg.plots import Outlined, draw_worst
from tests.conftest import write_pair
from tests.outlines import dense_refinement, random_refiner
from tests.processes import run_ranks

SIZES = ((96, 64), (150, 110), (97, 63), (96, 64), (44, 30))  # the last one is smaller than what the network sees
FULL = ("full_dice", "full_iou", "full_dice_pixels", "full_iou_pixels", "full_boundary_iou")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of photos of several sizes. Not to be written to."""
    folder = tmp_path_factory.mktemp("sizes")
    for i, (width, height) in enumerate(SIZES):
        write_pair(folder, f"car{i}_01", width, height, seed=i, mask="png" if i % 2 else "gif")
    return folder


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows roughly where the blob is."""
    out = tmp_path_factory.mktemp("runs")
    folders = {"train_img_dir": data / "images", "train_mask_dir": data / "masks"}
    folders |= {"val_img_dir": data / "images", "val_mask_dir": data / "masks"}
    sizes = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "batch_size": 2, "num_epochs": 15}
    sizes |= {"refiner_steps": 0}
    return fastseg.train({**folders, **sizes, "device": "cpu", "precision": "fp32", "out_dir": out}).run_dir / "best.pt"


@pytest.fixture(scope="module")
def refined(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an outline refiner that changes the outline at random."""
    path = tmp_path_factory.mktemp("refined") / "best.pt"
    state = load_checkpoint(checkpoint)
    save_checkpoint(path, {**state, "refiner": random_refiner(1, 2).state_dict()})
    return path


def evaluate(checkpoint: Path, data: Path, **settings: object) -> dict:
    return fastseg.evaluate(checkpoint, data / "images", data / "masks", device="cpu", precision="fp32", **settings)


def read(path: str | Path, mode: str) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert(mode)))


def logits_and_masks(checkpoint: Path, data: Path, method: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every pair the logits at full size and, by Pillow, the mask; (1, H, W)."""
    model, config = load_model(checkpoint)
    pairs = fastseg.find_pairs(data / "images", data / "masks")
    found = []
    for i, (images, _, _) in enumerate(HostDecoder(pairs, 32, 48).decode(np.arange(len(pairs))[:, None])):
        mask = read(pairs.mask_path(i), "L") > 0
        size = {"none": (32, 48), "crf": guide_size(32, 48), "learned": (64, 96)}[method]
        photo = torch.from_numpy(load_photo(pairs.image_path(i), size))
        with torch.no_grad():
            logits = model(normalise(images))
            if method == "crf":
                logits = refine_with_crf(logits, photo[None], mask.shape)
            elif method == "learned":
                logits = dense_refinement(read_refiner(checkpoint), logits[0], photo, mask.shape)[None]
            found.append((upsample_logits(logits, *mask.shape)[:, 0], mask[None]))
    assert config.mask_resize == "area"
    return found


@pytest.mark.parametrize("method", METHODS)
def test_full_size_scores_equal_torchmetrics(method, refined, data):
    checkpoint = refined
    found = evaluate(checkpoint, data, refine=method)
    assert found["refine"] == method
    dice, iou, band = [], [], []
    pooled = BinaryF1Score(), BinaryJaccardIndex()
    for logits, mask in logits_and_masks(checkpoint, data, method):
        predicted, true = (logits > 0).int(), mask.int()
        dice.append(BinaryF1Score()(predicted, true).item())
        iou.append(BinaryJaccardIndex()(predicted, true).item())
        band.append(boundary_iou(logits > 0, mask, found["boundary_pixels"]).item())
        for metric in pooled:
            metric.update(predicted.flatten(), true.flatten())
    expected = [np.mean(dice), np.mean(iou), *(metric.compute().item() for metric in pooled), np.mean(band)]
    assert [found[name] for name in FULL] == pytest.approx(expected, abs=2e-4)  # a pixel at 0 may fall either way
    assert 0.5 < found["full_dice"] < 1


def test_training_size_scores_do_not_depend_on_the_rest(checkpoint, data):
    whole, small = evaluate(checkpoint, data, batch_size=2), evaluate(checkpoint, data, full_size=False, batch_size=5)
    for name in ("dice", "iou", "dice_pixels", "iou_pixels", "loss", "images"):
        assert small[name] == pytest.approx(whole[name], abs=1e-6)
    assert small.keys() & {*FULL, "boundary_pixels"} == set()
    trained = torch.load(checkpoint, weights_only=True)["scores"]  # of the epoch, by `score_batches`
    for name in ("dice", "iou", "dice_pixels", "iou_pixels", "loss"):
        assert whole[name] == pytest.approx(trained[f"val_{name}"], abs=1e-5)


def test_what_is_written(checkpoint, data, tmp_path):
    out = tmp_path / "new" / "scores"
    scores = evaluate(checkpoint, data, out=out)
    assert {path.name for path in out.iterdir()} == {"scores.csv", "summary.json", "worst.png"}
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"car{i}_01.jpg" for i in range(len(SIZES))]
    for name in ("dice", "iou", "full_dice", "full_iou", "full_boundary_iou"):
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(scores[name], abs=1e-9)
    order = sorted(rows, key=lambda row: float(row["full_dice"]))
    assert list(scores["worst"].items()) == [(row["image"], float(row["full_dice"])) for row in order]
    summary = json.loads((out / "summary.json").read_text())
    assert scores.items() <= summary.items()
    assert (summary["refine"], summary["left_out"]) == ("crf", [])
    with Image.open(out / "worst.png") as picture:
        assert (picture.format, picture.width > 1000) == ("PNG", True)


def test_worst_eight_are_the_worst(checkpoint, data, tmp_path, monkeypatch):
    for i in range(12):
        write_pair(tmp_path, f"car{i}_01", 48, 32, seed=i)
    drawn = []
    monkeypatch.setattr("fastseg.masks.evaluate.draw_worst", lambda outlined, path: drawn.extend(outlined))
    scores = evaluate(checkpoint, tmp_path, out=tmp_path / "out", refine="none")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        dice = sorted((float(row["full_dice"]), row["image"]) for row in csv.DictReader(file))[:8]
    assert list(scores["worst"]) == [name for _, name in dice]
    assert [shown.title for shown in drawn] == [f"{name}   Dice {value:.4f}" for value, name in dice]
    for (value, name), shown in zip(dice, drawn, strict=True):
        mask = read(tmp_path / "masks" / name.replace(".jpg", "_mask.gif"), "L") > 0
        assert np.array_equal(shown.true, mask.numpy())
        again = BinaryF1Score()(torch.from_numpy(shown.predicted).int(), torch.from_numpy(shown.true).int())
        assert again.item() == pytest.approx(value, abs=1e-6)


def test_without_full_size_there_is_no_picture(checkpoint, data, tmp_path):
    scores = evaluate(checkpoint, data, full_size=False, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "summary.json"}
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["full_dice"] for row in rows} == {""}
    assert min(float(row["dice"]) for row in rows) == next(iter(scores["worst"].values()))


@pytest.fixture
def broken(data: Path, tmp_path: Path) -> Path:
    """The same pairs, and among them one photo that is cut off."""
    shutil.copytree(data, tmp_path / "data")
    photo = tmp_path / "data" / "images" / "car2_01.jpg"
    photo.write_bytes(photo.read_bytes()[:700])
    return tmp_path / "data"


@pytest.mark.parametrize("check_data", [True, False])
def test_broken_pair_is_left_out_of_all_scores(check_data, checkpoint, broken, tmp_path, monkeypatch):
    monkeypatch.setattr("fastseg.masks.evaluate.draw_worst", lambda outlined, path: None)
    out = tmp_path / "out"
    found = evaluate(checkpoint, broken, bad_samples="skip", check_data=check_data, out=out, batch_size=2)
    for part in ("images", "masks"):
        next((broken / part).glob("car2_01*")).unlink()
    clean = evaluate(checkpoint, broken)
    assert found.pop("worst") == pytest.approx(clean.pop("worst"), abs=1e-6)
    assert found == pytest.approx(clean, abs=1e-6)
    assert found["images"] == len(SIZES) - 1
    assert json.loads((out / "summary.json").read_text())["left_out"] == ["car2_01.jpg"]


@pytest.mark.parametrize("check_data", [True, False])
def test_broken_pair_stops_by_default(check_data, checkpoint, broken):
    with pytest.raises(DataError, match=r"car2_01\.jpg: .*bad_samples"):
        evaluate(checkpoint, broken, check_data=check_data)


def test_pair_that_breaks_at_full_size_only(checkpoint, data, monkeypatch):
    """Such as a file that is replaced while it is scored."""
    from fastseg.data.decode import decode_full_mask

    second = (data / "masks" / "car1_01_mask.png").read_bytes()

    def decode(file: bytes) -> np.ndarray:
        if file == second:
            raise DataError("is damaged or truncated")
        return decode_full_mask(file)

    monkeypatch.setattr("fastseg.masks.score.decode_full_mask", decode)
    scores = evaluate(checkpoint, data, bad_samples="skip")
    assert (scores["images"], "car1_01.jpg" in scores["worst"]) == (len(SIZES) - 1, False)
    with pytest.raises(DataError, match=r"car1_01_mask\.png: .*bad_samples"):
        evaluate(checkpoint, data)


def test_refusals_come_before_any_work(checkpoint, data, tmp_path):
    with pytest.raises(ConfigError, match=r"^refine: .*none, crf"):
        evaluate("no.pt", data, refine="dense")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: .*another place"):
        evaluate(checkpoint, data, out=tmp_path / "file")


def test_full_disk_leaves_the_old_results_and_logs_the_scores(checkpoint, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fastseg.masks.evaluate.draw_worst", lambda outlined, path: None)
    evaluate(checkpoint, data, out=tmp_path, refine="none")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def replace(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastseg.runtime.files.os.replace", replace)
    with pytest.raises(OutputError, match=r"scores\.csv: .*Make room"):
        evaluate(checkpoint, data, out=tmp_path, refine="none")
    assert '"full_dice": 0.' in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


PROGRAM = """
import json, sys
from pathlib import Path
import fastseg
import fastseg.masks.evaluate
from fastseg.runtime.distributed import get_rank

drawn = []
fastseg.masks.evaluate.draw_worst = lambda outlined, path: drawn.extend(outlined)
checkpoint, data, out, batch_size = sys.argv[1:]
scores = fastseg.evaluate(
    checkpoint, f"{data}/images", f"{data}/masks", out=out, bad_samples="skip", check_data=False, refine="none",
    device="cpu", precision="fp32", batch_size=int(batch_size), num_workers=1,
)
shown = [(one.title, int(one.true.sum()), int(one.predicted.sum()), one.photo.shape) for one in drawn]
Path(f"{out}.{get_rank()}.json").write_text(json.dumps([scores, shown]))
"""


@pytest.mark.parametrize("batch_size", [2, 16], ids=["both take some", "the second takes none"])
def test_two_processes_score_what_one_does(checkpoint, tmp_path, batch_size):
    for i in range(13):
        write_pair(tmp_path, f"car{i:02d}_01", 48 + i, 32, seed=i)
    (tmp_path / "images/car12_01.jpg").write_bytes(b"broken")  # a batch, and a process's share, of its own
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        finished = run_ranks(processes, "-c", PROGRAM, checkpoint, tmp_path, out, batch_size)
        assert finished.returncode == 0, finished.stderr
        ranks = [json.loads((tmp_path / f"out{processes}.{rank}.json").read_text()) for rank in range(processes)]
        summary = json.loads((out / "summary.json").read_text())
        assert summary["left_out"] == ["car12_01.jpg"]
        found.append((ranks[0], (out / "scores.csv").read_text()))
        assert all(scores == ranks[0][0] for scores, _ in ranks)
        assert not any(shown for _, shown in ranks[1:])
    ((one, drawn), rows), ((two, also_drawn), other_rows) = found
    assert two.pop("worst") == pytest.approx(one.pop("worst"), abs=1e-9)
    assert two == pytest.approx(one, abs=1e-9)
    assert one["images"] == 12
    assert other_rows == rows
    assert len(rows.splitlines()) == 13
    assert also_drawn == drawn
    assert len(drawn) == 8


def test_command_speaks_of_both_sizes(checkpoint, data, tmp_path, capsys):
    folders = ["--img-dir", str(data / "images"), "--mask-dir", str(data / "masks")]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "evaluate",
                "--checkpoint",
                str(checkpoint),
                *folders,
                "--device=cpu",
                "--refine=crf",
                f"--out={tmp_path}",
            ]
        )
    small, full, worst, where, last = capsys.readouterr().out.splitlines()
    scores = json.loads(last)
    assert ended.value.code == 0
    assert small.startswith(f"5 images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); ")
    assert small.endswith(", at the training size")
    assert full.startswith(f"At the photos' own size (refine crf): IoU {scores['full_iou']:.4f}, Dice ")
    assert full.endswith(f"boundary IoU {scores['full_boundary_iou']:.4f} (within 8 pixels of the outline)")
    names = list(scores["worst"])
    assert worst == "Lowest Dice: " + ", ".join(f"{name} ({scores['worst'][name]:.4f})" for name in names[:3])
    assert where == f"scores.csv, summary.json and worst.png are in {tmp_path}/"


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (60, 90, 64, 96), (30, 0, 40, 96), (10, 20, 50, 40), (0, 0, 0, 0)])
def test_worst_picture_shows_the_whole_of_both_outlines(box, tmp_path, monkeypatch):
    top, left, bottom, right = box
    masks = np.zeros((2, 640, 960), np.bool_)
    masks[0, 10 * top : 10 * bottom, 10 * left : 10 * right] = True
    masks[1, 10 * top : 10 * bottom, 10 * left : 10 * (left + right) // 2] = True
    photo = np.random.default_rng(0).integers(0, 256, (640, 960, 3), np.uint8)
    drawn: list[Outlined] = []
    monkeypatch.setattr("fastseg.plots.draw_outlines", lambda shown, *_, **__: drawn.extend(shown))
    draw_worst([Outlined(photo, *masks, "a.jpg"), Outlined(photo, *masks[::-1], "b.jpg")], tmp_path / "worst.png")
    for shown, order in zip(drawn, (1, -1), strict=True):
        assert [shown.true.sum(), shown.predicted.sum()] == list(masks.sum((1, 2))[::order])
        assert shown.photo.shape[:2] == shown.true.shape == shown.predicted.shape
        assert shown.true.shape[1] / shown.true.shape[0] == pytest.approx(1.5, abs=0.02)
        assert (shown.photo.size < photo.size) == (0 < right - left < 96)
