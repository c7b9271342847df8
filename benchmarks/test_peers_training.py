"""The scorer of peers_training.py against torchmetrics, its summary, and the whole script with fastseg alone."""

import json
import sys
from pathlib import Path

import numpy as np
import peers_training
import pytest
import score_masks
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

import fastseg


def write_masks(folder: Path, seed: int, shape: tuple[int, int] = (20, 30)) -> torch.Tensor:
    """Two masks of classes 0 to 3; (2, H, W)."""
    folder.mkdir()
    masks = np.random.default_rng(seed).integers(0, 4, (2, *shape)).astype(np.uint8)
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"car_{number:02d}_mask.png")
    return torch.from_numpy(masks)


def test_scores_equal_torchmetrics(tmp_path: Path) -> None:
    true, predicted = write_masks(tmp_path / "true", 0), write_masks(tmp_path / "predicted", 1)
    found = score_masks.score_folders(tmp_path / "true", tmp_path / "predicted", 5)
    expected = multiclass_jaccard_index(predicted, true, num_classes=5, average="none")
    assert found["full"] == [*(pytest.approx(iou, abs=1e-6) for iou in expected[:4].tolist()), None]
    assert score_masks.mean_iou(found["full"]) == pytest.approx(expected[:4].mean().item(), abs=1e-6)
    same = score_masks.score_folders(tmp_path / "true", tmp_path / "true", 4)
    assert same == {"full": [1.0] * 4, "cells": [1.0] * 4}


def test_a_cell_has_the_class_of_most_of_its_pixels() -> None:
    mask = np.zeros((16, 14), np.uint8)
    mask[:8, :5] = 1  # 40 of 64 pixels
    mask[8:, :3] = 1  # 24 of 64
    mask[8:, 13] = 2  # the last column, which is repeated: 24 of 64
    assert score_masks.vote(mask, 3).tolist() == [[1, 0], [0, 0]]
    mask[8:, 11:] = 2
    assert score_masks.vote(mask, 3).tolist() == [[1, 0], [0, 2]]


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    write_masks(tmp_path / "true", 0)
    write_masks(tmp_path / "small", 0, (10, 30))
    (tmp_path / "none").mkdir()
    for folder, words in (("small", "predicted at"), ("none", "no mask"), ("true", "classes above 2")):
        with pytest.raises(ValueError, match=words):
            score_masks.score_folders(tmp_path / "true", tmp_path / folder, 3)


def test_gain_stops_within_a_tolerance_of_the_best() -> None:
    stop = peers_training.stop_of_gain([10, 20, 30, 40], [0.5, 0.896, 0.9, 0.899])
    assert stop == {"gain_seconds": 20, "gain_epoch": 2, "still_gained": False}
    assert peers_training.stop_of_gain([10, 20], [0.5, 0.9])["still_gained"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script in one process, with a small fastseg; then its runs merged with themselves."""
    data = tmp_path / "data"
    fastseg.generate(data, cars=2, views=1, width=96, height=64, parts=True, progress=False)
    small = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "num_epochs": 1, "device": "cpu"}
    train = fastseg.train
    monkeypatch.setattr(fastseg, "train", lambda settings: train({**settings, **small}))
    monkeypatch.setattr(peers_training, "in_fresh_process", lambda function, *arguments: function(*arguments))
    command = ["peers_training.py", "--data", str(data), "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, f"{tmp_path}/one.json", "--rows", "fastseg"])
    peers_training.main()
    one = json.loads((tmp_path / "one.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == one
    (row,) = one["rows"]
    assert (row["row"], row["epochs"], len(row["runs"])) == ("fastseg", 1, 1)
    assert 0 <= row["mean_iou"] <= 1
    merge = ",".join([f"{tmp_path}/one.json"] * 2)
    monkeypatch.setattr(sys, "argv", [*command, f"{tmp_path}/two.json", "--rows", "", "--merge", merge])
    peers_training.main()
    (row,) = json.loads((tmp_path / "two.json").read_text())["rows"]
    origin = {"commit": one["commit"], "others_cpu_share": one["machine"]["others_cpu_share"]}
    assert row["runs"] == [{**origin, **one["rows"][0]["runs"][0]}] * 2
