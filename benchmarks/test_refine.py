"""refine.py on three tiny checkpoints: the means over seeds, and the picture."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import refine as benchmark
import torch
from PIL import Image

import fastseg
from fastseg.network.checkpoint import build_model, save_checkpoint
from tests.conftest import write_pair


def test_rows_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for car in range(2):
        write_pair(tmp_path, f"car{car}_01", seed=car)
    command = ["refine.py", "--img-dir", f"{tmp_path}/images", "--mask-dir", f"{tmp_path}/masks", "--device", "cpu"]
    for mask_resize, seed in (("area", 0), ("area", 1), ("nearest", 0)):
        config = fastseg.Config(
            image_height=32, image_width=48, base_channels=4, depth=2, mask_resize=mask_resize, seed=seed
        )
        torch.manual_seed(seed)
        path = tmp_path / f"{mask_resize}-{seed}.pt"
        save_checkpoint(path, {"config": config.model_dump(), "model": build_model(config).state_dict()})
        command += ["--checkpoint", str(path)]
    monkeypatch.setattr(sys, "argv", [*command, "--json", f"{tmp_path}/refine.json"])
    benchmark.main()
    result = json.loads((tmp_path / "refine.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = {(row["targets"], row["method"]): row for row in result["rows"]}
    assert list(rows) == [(kind, method) for kind in ("area", "nearest") for method in ("none", "crf")]
    for (kind, method), row in rows.items():
        dice = [run["methods"][method]["full_dice"] for run in result["checkpoints"] if run["mask_resize"] == kind]
        assert row["seeds"] == list(range(len(dice)))
        assert row["full_dice"] == {"mean": pytest.approx(sum(dice) / len(dice)), "min": min(dice), "max": max(dice)}
    with Image.open(tmp_path / "refine.png") as picture:
        assert picture.width > 1000


def test_classes_of_two_values_score_as_their_means(tmp_path: Path) -> None:
    """The Dice of both labels, by hand, from masks that `fastseg.predict` writes."""
    write_pair(tmp_path, "car0_01", seed=0)
    classes = {"wall": 0, "car": 255}
    config = fastseg.Config(image_height=32, image_width=48, base_channels=4, depth=2, classes=classes, ignore_value=-1)
    state = {"config": config.model_dump(), "model": build_model(config).state_dict()}
    save_checkpoint(tmp_path / "best.pt", state)
    pairs = fastseg.find_pairs(tmp_path / "images", tmp_path / "masks")
    measured, _ = benchmark.measure_checkpoint(str(tmp_path / "best.pt"), pairs, torch.device("cpu"))
    for method in ("none", "crf"):
        fastseg.predict(tmp_path / "best.pt", tmp_path / "images", tmp_path, refine=method, device="cpu")
        with Image.open(tmp_path / "car0_01_mask.png") as found, Image.open(pairs.mask_path(0)) as true:
            predicted, expected = (
                np.asarray(image.convert("P") if image.mode != "P" else image) > 0 for image in (found, true)
            )
        dice = [
            2 * (predicted == side)[expected == side].sum() / ((predicted == side).sum() + (expected == side).sum())
            for side in (False, True)
        ]
        assert measured["methods"][method]["full_dice"] == pytest.approx(np.mean(dice), abs=2e-3)
