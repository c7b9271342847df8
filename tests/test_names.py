"""Names of files that are not UTF-8, hold signs of mathematics, or are as long as a file system allows."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastseg
from fastseg.masks.submission import write_submission
from tests.conftest import ROOT, fields, write_checkpoint, write_pair

ODD = [os.fsdecode(b"car\xff_01"), "車_01", "$x_{$_01", "a\nb_01"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Pairs with odd names."""
    try:
        for seed, name in enumerate(ODD):
            write_pair(tmp_path, "pair", seed=seed)
            (tmp_path / "images" / "pair.jpg").rename(tmp_path / "images" / f"{name}.jpg")
            (tmp_path / "masks" / "pair_mask.gif").rename(tmp_path / "masks" / f"{name}_mask.gif")
    except OSError as error:
        pytest.skip(f"this file system refuses such names: {error}")
    return tmp_path


@pytest.mark.usefixtures("pictures")
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no Chinese
def test_a_run_ends_with_its_pictures_and_a_cache(odd):
    for _ in range(2):  # the second reads the cache
        result = fastseg.train(fields(odd, odd, cache="disk", cache_dir=str(odd / "cache"), load_model=False))
    assert (result.run_dir / "overlay.png").exists()
    assert len(list((odd / "cache").glob("*.fastseg"))) == 1


@pytest.mark.usefixtures("pictures")
@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_of_classes_take_such_names(odd):
    """Of files and of classes."""
    classes = {"$x_{$ ground": 0, "車 $": 255}
    result = fastseg.train(fields(odd, odd, classes=classes))
    best, out = result.run_dir / "best.pt", odd / "scores"
    fastseg.evaluate(best, odd / "images", odd / "masks", device="cpu", out=out)
    fastseg.predict(best, odd / "images", odd / "predicted", device="cpu", overlays=True)
    pictures = [result.run_dir / "overlay.png", result.run_dir / "curves.png", out / "worst.png", out / "confusion.png"]
    assert all(path.exists() for path in pictures)
    assert len(list((odd / "predicted").glob("*_overlay.jpg"))) == len(ODD)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_scores_and_submission_name_the_files(odd):
    checkpoint = write_checkpoint(odd / "best.pt")
    out = odd / "scores"
    scores = fastseg.evaluate(checkpoint, odd / "images", odd / "masks", device="cpu", out=out)
    assert set(json.loads((out / "summary.json").read_text())["worst"]) == set(scores["worst"])
    write_submission(odd / "masks", odd / "submission.csv")
    for table, column in ((out / "scores.csv", "image"), (odd / "submission.csv", "img")):
        with open(table, newline="", errors="surrogateescape") as file:
            assert {row[column] for row in csv.DictReader(file)} == {f"{name}.jpg" for name in ODD}


def test_commands_print_such_names(odd):
    checkpoint = write_checkpoint(odd / "best.pt")
    folders = ["--img-dir", odd / "images", "--mask-dir", odd / "masks"]
    strict = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (["evaluate", "--checkpoint", checkpoint, *folders], ["check", odd / "images", odd / "masks"]):
        command = [sys.executable, "-m", "fastseg", *map(str, arguments)]
        done = subprocess.run(command, cwd=odd, env=strict, capture_output=True, timeout=600)
        assert b"Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 1)


def test_one_long_name_does_not_end_a_prediction(tmp_path):
    """The mask of a name of 250 bytes cannot be written, because its own name is too long."""
    write_pair(tmp_path, "a")
    data = (tmp_path / "images" / "a.jpg").read_bytes()
    long, too_long = "b" * 240, "c" * 250
    for name in (long, too_long):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(data)
    result = fastseg.predict(
        write_checkpoint(tmp_path / "best.pt"), tmp_path / "images", tmp_path / "out", device="cpu"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".fastseg.json", "a_mask.png", f"{long}_mask.png"}
    ((broken, reason),) = result.broken
    assert too_long in broken
    assert "too long" in reason


def test_a_runs_name_is_short_enough_for_a_folder():
    with pytest.raises(fastseg.ConfigError, match=r"^name: .*255 bytes"):
        fastseg.Config(name="ä" * 128)
    fastseg.Config(name="a" * 255)
