"""Masks at each photo's own size, against a path of NumPy and Pillow; and what becomes of broken files and kills."""

import csv
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

import fastseg
from fastseg.cli import main
from fastseg.data.decode import decode_image
from fastseg.data.gif import encode_gif
from fastseg.data.host import load_photo
from fastseg.masks.encode import encode_overlay, encode_png
from fastseg.network.checkpoint import build_model, load_model, save_checkpoint
from fastseg.network.outline.crf import refine_with_crf
from fastseg.network.outline.upsample import threshold_logits, upsample_logits
from tests.conftest import write_pair
from tests.processes import Started, run

ROOT = Path(__file__).parents[1]
FIELDS = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "batch_size": 4, "device": "cpu"}
CPU = {"device": "cpu", "precision": "fp32", "num_workers": 2, "refine": "none"}
SETTINGS = ".fastseg.json"  # what the masks of a folder were made with
NEAR_ZERO = 1e-4  # logits whose sign is left to rounding


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights whose logits are above and below 0 in about as many cells."""
    config = fastseg.Config(**FIELDS)
    torch.manual_seed(0)
    model = build_model(config).eval()
    *_, last = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 8, 12).repeat_interleave(4, 2).repeat_interleave(4, 3))
        last.bias.sub_(logits.mean()).div_(logits.std() / 3)
        last.weight.div_(logits.std() / 3)
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, {"config": config.model_dump(), "model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos of different sizes in two folders, one of them as large as Carvana's."""
    folder = tmp_path_factory.mktemp("made")
    sizes = {"a": (96, 64), "b": (101, 67), "e": (1918, 1280), "f": (383, 255), "c": (64, 200), "d": (30, 20)}
    (folder / "images/sub").mkdir(parents=True)
    for seed, (name, size) in enumerate(sizes.items()):
        write_pair(folder, name, *size, seed)
    for name in "cd":
        os.rename(folder / f"images/{name}.jpg", folder / f"images/sub/{name}.jpg")
    with Image.open(folder / "images/b.jpg") as photo:
        photo.rotate(90, expand=True).save(folder / "images/sub/g.png")
    return folder / "images"


@pytest.fixture
def photos(made: Path, tmp_path: Path) -> Path:
    """The photos, for a test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "photos"))


def reference_logits(checkpoint: Path, photo: Path, flip: bool = False) -> NDArray[np.float64]:
    """Logits at the photo's size: cells by `decode_image`, the network in float32, then NumPy in float64.

    Each pixel's mean over a triangle about its centre, as wide as a cell or, if it is wider, as the pixel.
    """
    model, config = load_model(checkpoint)
    cells = np.empty((config.image_height, config.image_width, 3), np.uint8)
    size = decode_image(photo.read_bytes(), cells)
    inputs = torch.from_numpy((cells / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits = model(inputs)
        if flip:
            logits = (logits + model(inputs.flip(3)).flip(3)) / 2
    full = logits[0, 0].double().numpy()
    scale = 8
    while scale > 1 and any(-(-own // scale) < target for own, target in zip(size, cells.shape, strict=False)):
        scale //= 2
    for axis, (own, target) in enumerate(zip(size, cells.shape, strict=False)):
        extent = -(-own // scale) * scale
        centres = (np.arange(own) + 0.5) * target / extent - 0.5
        distance = np.abs(centres[:, None] - np.arange(target)) / max(1, target / extent)
        weights = np.clip(1 - distance, 0, None)
        full = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), full, (1, axis)), 0, axis)
    return full


def read_mask(path: Path) -> NDArray[np.bool_]:
    with Image.open(path) as image:
        image.load()
        assert set(np.unique(np.asarray(image.convert("L")))) <= {0, 255}
        return np.asarray(image.convert("L")) > 0


def assert_is_mask(mask: NDArray[np.bool_], logits: NDArray[np.float64]) -> None:
    assert mask.shape == logits.shape
    sure = np.abs(logits) > NEAR_ZERO
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(mask[sure], logits[sure] > 0)


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SETTINGS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


# Pixels


@pytest.mark.parametrize("mask_format", ["png", "gif"])
def test_masks_are_those_of_an_independent_path(mask_format, checkpoint, photos, tmp_path):
    result = fastseg.predict(checkpoint, photos, tmp_path / "out", mask_format=mask_format, **CPU)
    assert (result.images, result.masks, result.skipped, result.broken) == (7, 7, 0, ())
    shares = []
    for photo in sorted(photos.rglob("*.*")):
        name = photo.relative_to(photos).with_suffix("")
        mask = read_mask(tmp_path / "out" / f"{name}_mask.{mask_format}")
        assert_is_mask(mask, reference_logits(checkpoint, photo))
        shares.append(mask.mean())
    assert min(shares) < 0.9
    assert max(shares) > 0.1
    assert len(digests(tmp_path / "out")) == 7  # and nothing else


def test_tta_flip_is_the_mean_of_the_logits(checkpoint, photos, tmp_path):
    plain, flipped = tmp_path / "plain", tmp_path / "flipped"
    fastseg.predict(checkpoint, photos, plain, **CPU)
    fastseg.predict(checkpoint, photos, flipped, tta="flip", **CPU)
    for name in ("a", "b", "e"):
        mask = read_mask(flipped / f"{name}_mask.png")
        assert_is_mask(mask, reference_logits(checkpoint, photos / f"{name}.jpg", flip=True))
        assert (mask != read_mask(plain / f"{name}_mask.png")).any()


def test_refined_masks_are_those_that_evaluate_scores(checkpoint, photos, tmp_path):
    """Also of a photo that EXIF turns, of CMYK ones, and of very small ones."""
    spoil(photos)
    Image.new("RGB", (7, 5), "blue").save(photos / "small.bmp")
    result = fastseg.predict(checkpoint, photos, tmp_path, **{**CPU, "refine": "crf", "probabilities": True})
    assert (result.masks, len(result.broken)) == (12, 4)
    model, _ = load_model(checkpoint)
    changed = 0
    for path in tmp_path.rglob("*_mask.png"):
        name = path.relative_to(tmp_path).with_name(path.name.removesuffix("_mask.png"))
        (photo,) = photos.glob(f"{name}.*")
        cells, guide, mask = load_photo(photo, (32, 48)), load_photo(photo, (320, 480)), read_mask(path)
        with torch.inference_mode():
            logits = model(torch.from_numpy((cells / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None])
            refined = refine_with_crf(logits, torch.from_numpy(guide)[None], mask.shape)
            full = upsample_logits(refined, *mask.shape)[0, 0].double().numpy()
        assert (mask != (full > 0)).mean() < 2e-4  # the network rounds otherwise in a batch, which refinement enlarges
        with Image.open(str(path).replace("_mask.png", "_probability.png")) as image:
            assert (np.abs(np.asarray(image) - 255 / (1 + np.exp(-full))) < 1).mean() > 0.999
        changed += (mask != (reference_logits(checkpoint, photo) > 0)).mean() > 2e-3
    assert changed >= 8


def test_probabilities_overlays_and_table(checkpoint, photos, tmp_path):
    out, table = tmp_path / "out", tmp_path / "table.csv"
    fastseg.predict(checkpoint, photos, out, probabilities=True, overlays=True, csv=table, **CPU)
    rows = read_table(table)
    assert [row["image"] for row in rows] == [str(path) for path in sorted(photos.rglob("*.*"))]
    for row in rows:
        photo, path = Path(row["image"]), Path(row["mask"])
        mask, logits = read_mask(path), reference_logits(checkpoint, photo)
        assert_is_mask(mask, logits)
        assert (int(row["height"]), int(row["width"]), row["error"]) == (*mask.shape, "")
        assert float(row["foreground"]) == pytest.approx(mask.mean(), abs=1e-6)
        with Image.open(str(path).replace("_mask.png", "_probability.png")) as image:
            assert image.mode == "L"
            np.testing.assert_allclose(np.asarray(image), 255 / (1 + np.exp(-logits)), atol=0.51)
            assert ((np.asarray(image) >= 128) == mask).mean() > 0.9999
        with Image.open(str(path).replace("_mask.png", "_overlay.jpg")) as overlay, Image.open(photo) as image:
            assert overlay.size == (min(1280, image.width), round(image.height * min(1, 1280 / image.width)))


def test_overlay_marks_the_mask_and_nothing_else():
    photo = np.full((60, 80, 3), 100, np.uint8)
    coverage = np.zeros((60, 80), np.uint8)
    coverage[20:40, 30:60] = 255
    with Image.open(io.BytesIO(encode_overlay(photo.copy(), coverage))) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown[:12] - 100).max() < 12
    assert np.abs(shown[30, 45] - [138, 86, 109]).max() < 12  # a quarter of the way to the colour
    assert np.abs(shown[20, 34:56] - [255, 46, 136]).max() < 60  # the outline


@pytest.mark.parametrize(
    ("height", "width"), [(1280, 1918), (160, 240), (161, 241), (163, 5), (20, 30), (1, 1), (700, 2000)]
)
def test_threshold_logits_is_upsampling_and_thresholding(height, width):
    coarse = torch.nn.functional.avg_pool2d(torch.randn(1, 1, 170, 250, generator=torch.manual_seed(1)), 11, 1)
    for logits in (coarse, torch.randn(1, 1, 160, 240), torch.full((1, 1, 160, 240), 0.5), -coarse.abs()):
        full = upsample_logits(logits.double(), height, width)[0, 0].numpy()
        mask = threshold_logits(logits[0, 0].numpy(), height, width)
        assert mask.shape == (height, width)
        sure = np.abs(full) > 1e-6
        np.testing.assert_array_equal(mask[sure], full[sure] > 0)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (8, 1), (33, 65), (211, 300)])
def test_masks_read_back_as_they_were_written(shape, share):
    """Noise at one half fills the GIF's table of codes many times over."""
    mask = np.random.default_rng(0).random(shape) < share
    for encode, mode in ((encode_png, "1"), (encode_gif, "P")):
        with Image.open(io.BytesIO(encode(mask))) as image:
            image.load()
            assert image.mode == mode
            assert getattr(image, "n_frames", 1) == 1
            assert not image.info.get("interlace")
            np.testing.assert_array_equal(np.asarray(image.convert("L")), 255 * mask)
    grey = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    with Image.open(io.BytesIO(encode_png(grey))) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), grey)


@pytest.mark.gpu
def test_gpu_writes_the_masks_that_the_cpu_does(checkpoint, photos, tmp_path):
    on_cpu = {**CPU, "tta": "flip"}
    on_gpu = {**on_cpu, "device": "cuda"}
    fastseg.predict(checkpoint, photos, tmp_path / "cpu", **on_cpu)
    fastseg.predict(checkpoint, photos, tmp_path / "gpu", probabilities=True, **on_gpu)
    fastseg.predict(checkpoint, photos, tmp_path / "bare", **on_gpu)
    for path in (tmp_path / "cpu").rglob("*_mask.png"):
        name = path.relative_to(tmp_path / "cpu")
        probable, bare = (read_mask(tmp_path / run / name) for run in ("gpu", "bare"))
        assert (read_mask(path) != probable).mean() < 1e-2  # TF32 convolutions
        assert (probable != bare).mean() < 1e-4  # cuDNN sums in no fixed order


def test_gif_sides_have_a_limit():
    with pytest.raises(fastseg.DataError, match="65535"):
        encode_gif(np.zeros((1, 65536), bool))


# Files


def spoil(photos: Path) -> dict[str, str]:
    """Put odd files among the photos; returns the reasons of the broken ones by name."""
    data = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("no picture")
    (photos / "sub/notes.txt").write_text("bring sun cream")
    (photos / ".DS_Store").touch()
    Image.new("RGB", (1, 1), "red").save(photos / "one.png")
    with Image.open(photos / "b.jpg") as photo:
        photo.load()
    photo.convert("CMYK").save(photos / "cmyk.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(photos / "sub/turned.jpg", exif=exif, quality=95)
    with Image.open(photos / "e.jpg") as photo:
        photo.resize((3000, 2000)).save(photos / "large.jpg")
    return {
        "cut.jpg": "is a damaged or truncated JPEG",
        "empty.jpg": "is empty",
        "text.jpg": "is no image that can be read",
        "sub/notes.txt": "does not have the name of an image",
    }


def test_broken_files_are_listed_and_stop_nothing(checkpoint, photos, tmp_path, capsys, caplog):
    reasons = spoil(photos)
    out, table = tmp_path / "out", tmp_path / "table.csv"
    arguments = ["--checkpoint", checkpoint, "--images", photos, "--out", out, "--csv", table, *flags(CPU)]
    assert status_of("predict", *arguments) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^11 masks in {out}/, broken: 4 images: .* images/s, .* s \(.*network", printed)
    rows = {os.path.relpath(row["image"], photos): row for row in read_table(table)}
    assert list(rows) == sorted(rows)
    assert {name for name, row in rows.items() if row["error"]} == reasons.keys()
    for name, row in rows.items():
        if name in reasons:
            assert row["error"].startswith(reasons[name])
            assert f"no mask: {photos / name}: {reasons[name]}" in caplog.text
            assert not row["mask"]
        else:
            assert_is_mask(read_mask(Path(row["mask"])), reference_logits(checkpoint, photos / name))
    assert len(list(out.rglob("*_mask.png"))) == 11
    assert read_mask(out / "sub/turned_mask.png").shape == (101, 67)  # of 101x67 stored pixels
    assert read_mask(out / "one_mask.png").shape == (1, 1)
    assert read_mask(out / "large_mask.png").shape == (2000, 3000)


def test_broken_files_are_in_the_result(checkpoint, photos, tmp_path):
    reasons = spoil(photos)
    result = fastseg.predict(checkpoint, [photos / "sub", photos / "cut.jpg", photos / "a.jpg"], tmp_path, **CPU)
    assert [Path(path).name for path, _ in result.broken] == ["notes.txt", "cut.jpg"]
    assert all(reason.startswith((reasons["sub/notes.txt"], reasons["cut.jpg"])) for _, reason in result.broken)
    assert (result.images, result.masks) == (7, 5)
    assert (tmp_path / "c_mask.png").exists()
    assert (tmp_path / "a_mask.png").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint": "no.pt"}, "no.pt: "),
        ({"images": "nowhere"}, "nowhere: "),
        ({"images": "bare"}, "bare: "),
        ({"out": "photos/a.jpg"}, "photos/a.jpg: "),
        ({"csv": "photos/a.jpg"}, "photos/a.jpg: "),
        ({"csv": "photos"}, "csv: "),
        ({"csv": "photos/a.jpg/b.csv"}, "photos/a.jpg: "),
        ({"mask_format": "bmp"}, "mask_format: "),
        ({"refine": "dense"}, "refine: "),
        ({"tta": "turn"}, "tta: "),
        ({"batch_size": "-1"}, "batch_size: "),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refusal_comes_before_any_mask(changes, named, checkpoint, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    Path("bare").mkdir()
    options = {"checkpoint": checkpoint, "images": "photos", "out": "out", "device": "cpu", **changes}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert status_of("predict", *words) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"fastseg: {named}")
    assert "Traceback" not in printed.err
    assert not list(Path().rglob("*_mask.*g"))


def test_fields_that_predict_does_not_use_are_refused(checkpoint, photos, tmp_path):
    for field in ("learning_rate", "image_height", "mask_resize", "devise"):
        with pytest.raises(fastseg.ConfigError, match=rf"^{field}: .*device, precision, batch_size, num_workers"):
            fastseg.predict(checkpoint, photos, tmp_path / "out", **{field: 1})
    assert not (tmp_path / "out").exists()


def test_two_photos_of_one_name_are_refused(checkpoint, photos, tmp_path):
    (photos / "sub/c.png").write_bytes((photos / "sub/g.png").read_bytes())
    with pytest.raises(fastseg.DataError, match=r"sub/c\.jpg and .*sub/c\.png .*Rename"):
        fastseg.predict(checkpoint, photos, tmp_path / "out", **CPU)
    assert not (tmp_path / "out").exists()


def test_results_among_the_photos_are_neither_input_nor_written_over(checkpoint, photos, capsys):
    """Masks beside their photos: the second run takes none for a photo, and writes over none that it did not make."""
    (photos / "a_mask.png").write_bytes(encode_png(np.ones((64, 96), bool)))
    with pytest.raises(fastseg.DataError, match=r"a_mask\.png: .*--resume"):
        fastseg.predict(checkpoint, photos, photos, **CPU)
    result = fastseg.predict(checkpoint, photos, photos, csv=photos / "table.csv", resume=True, **CPU)
    assert (result.images, result.masks, result.skipped) == (7, 6, 1)
    assert read_mask(photos / "a_mask.png").all()
    before = digests(photos)
    result = fastseg.predict(checkpoint, photos, photos, csv=photos / "table.csv", resume=True, **CPU)
    assert (result.images, result.masks, result.skipped, result.broken) == (7, 0, 7, ())
    assert digests(photos) == before


def test_resume_does_what_is_missing(checkpoint, photos, tmp_path):
    """Also where one of two files is there; the table is that of one run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options: dict[str, Any] = {**CPU, "probabilities": True, "refine": "crf"}
    fastseg.predict(checkpoint, photos, whole, csv=tmp_path / "whole.csv", **options)
    fastseg.predict(checkpoint, photos, parts, **options)
    (parts / "b_probability.png").unlink()
    (parts / "e_mask.png").unlink()
    (parts / ".f_mask.png.1234.tmp").touch()
    (parts / ".foreign.png.1234.tmp").touch()
    result = fastseg.predict(checkpoint, photos, parts, csv=tmp_path / "parts.csv", resume=True, **options)
    assert (result.masks, result.skipped) == (2, 5)
    assert re.match(rf"2 masks in {parts}/, 5 existed: ", result.message)
    assert digests(parts).keys() - digests(whole).keys() == {".foreign.png.1234.tmp"}
    assert digests(parts).items() >= digests(whole).items()
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text().replace("whole/", "parts/")


def test_full_disk_is_an_output_error_and_keeps_earlier_masks(checkpoint, photos, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # less than e_mask.png, the last
    names = [photos / f"{name}.jpg" for name in "abe"]
    try:
        with pytest.raises(fastseg.OutputError, match=r"e_mask\.png: .*Make room"):
            fastseg.predict(checkpoint, names, tmp_path, **{**CPU, "batch_size": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert written == [SETTINGS, "a_mask.png", "b_mask.png"]


def test_ctrl_c_ends_with_status_130(checkpoint, photos, tmp_path, monkeypatch):
    calls = []

    def interrupt(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.ones(1, 1, 32, 48)

    monkeypatch.setattr(fastseg.UNet, "forward", interrupt)
    arguments = ["--checkpoint", checkpoint, "--images", photos, "--out", tmp_path / "out", "--batch-size", "1"]
    assert status_of("predict", *arguments, "--device", "cpu") == 130
    assert len(digests(tmp_path / "out")) <= 2
    assert all(read_mask(path).all() for path in (tmp_path / "out").glob("*.png"))


# Processes of their own

KILLED_AT_THE_40TH_MASK = """
import itertools, os, signal, sys
replace, calls = os.replace, itertools.count(0)  # the first file is that of the settings
def replace_or_die(*names):
    if next(calls) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = replace_or_die
from fastseg.cli import main
main(sys.argv[1:])
"""


def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)


def test_killed_run_leaves_complete_files_and_resume_completes_it(checkpoint, tmp_path):
    for index in range(60):
        write_pair(tmp_path, f"car_{index:02d}", 96 + index, 64, seed=index)
    images, out, whole = tmp_path / "images", tmp_path / "out", tmp_path / "whole"
    common = ["predict", "--checkpoint", checkpoint, "--images", images, "--probabilities", "--csv"]
    done = run("-c", KILLED_AT_THE_40TH_MASK, *common, tmp_path / "out.csv", "--out", out, *flags(CPU))
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = sorted(path.name for path in out.iterdir())
    assert any(name.endswith(".tmp") for name in killed)  # at least the one that was to be renamed
    finished = [name for name in killed if not name.startswith(".")]
    assert 39 <= len(finished) <= 41  # the other thread may have renamed one more
    for name in finished:
        with Image.open(out / name) as image:
            image.load()
    assert not (tmp_path / "out.csv").exists()

    assert status_of(*common, tmp_path / "whole.csv", "--out", whole, *flags(CPU)) == 0
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert status_of(*common, tmp_path / "out.csv", "--out", out, *flags(CPU), "--resume") == 0
    assert len(digests(whole)) == 120
    assert digests(out) == digests(whole)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "whole.csv").read_text().replace("whole/", "out/")
    untouched = sum((out / name).stat().st_mtime_ns == written for name, written in before.items())
    assert untouched >= len(finished) - 2  # a photo with one of its two files is predicted again


def test_two_processes_do_what_one_does(checkpoint, photos, tmp_path):
    reasons = spoil(photos)
    common = ["predict", "--checkpoint", checkpoint, "--images", photos, *flags(CPU)]
    assert status_of(*common, "--out", tmp_path / "one", "--csv", tmp_path / "one.csv") == 1
    done = torchrun("-m", "fastseg", *common, "--out", tmp_path / "two", "--csv", tmp_path / "two.csv")
    out, err = done.stdout, done.stderr
    assert done.returncode == 1, err
    assert out.count("11 masks in") == 1
    for name in reasons:
        assert err.count(f"no mask: {photos / name}: ") == 1
    assert len(re.findall(r"exitcode *: *1\b", err)) >= 1
    assert digests(tmp_path / "two").keys() == digests(tmp_path / "one").keys()
    for path in (tmp_path / "one").rglob("*.png"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert (read_mask(path) != read_mask(other)).mean() < 1e-3  # of other batches
    one, two = (read_table(tmp_path / f"{name}.csv") for name in ("one", "two"))
    assert [(row["image"], row["error"]) for row in one] == [(row["image"], row["error"]) for row in two]


HANGS_AT_THE_6TH_MASK = """
import itertools, os, signal, sys
replace, calls = os.replace, itertools.count(0)
def replace_or_hang(*names):
    if next(calls) == 6:
        signal.pause()
    replace(*names)
os.replace = replace_or_hang
from fastseg.cli import main
main(sys.argv[1:])
"""


def wait_for(condition: Callable[[], bool], *processes: Started) -> None:
    """Wait while the processes run; if it takes too long, end them."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline or any(process.returncode is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(str([process.wait() for process in processes]))
        time.sleep(0.1)


def test_another_process_does_the_work_of_a_killed_one(checkpoint, tmp_path):
    """Two processes without torchrun resume into one folder. One is killed in the middle of a batch."""
    for index in range(30):
        write_pair(tmp_path, f"car_{index:02d}", 96 + index, 64, seed=index)
    out, whole = tmp_path / "out", tmp_path / "whole"
    common = ["predict", "--checkpoint", checkpoint, "--images", tmp_path / "images", *flags(CPU), "--batch-size", 1]
    assert status_of(*common, "--out", whole) == 0
    common += ["--out", out, "--resume", "--num-workers", 1]

    def count() -> int:
        return len(list(out.glob("*_mask.png")))

    first = Started("-c", HANGS_AT_THE_6TH_MASK, *common)
    wait_for(lambda: count() == 5, first)
    second = Started("-m", "fastseg", *common, "--csv", tmp_path / "table.csv")
    wait_for(lambda: count() >= 22, first, second)  # the first one decodes a few photos ahead
    time.sleep(2)
    assert second.returncode is None  # it waits for the photos of the first one
    assert count() < 30
    assert any(path.name.endswith(".tmp") for path in out.iterdir())
    first.kill()
    code, printed, err = second.wait()
    assert code == 0, err
    assert re.search(r"^25 masks in .*, 5 existed", printed)
    assert len(digests(out)) == 30  # no temporary file, no lock
    assert digests(out) == digests(whole)
    assert len(read_table(tmp_path / "table.csv")) == 30


def test_processes_that_resume_into_one_folder_share_the_photos(checkpoint, tmp_path):
    for index in range(48):
        write_pair(tmp_path, f"car_{index:02d}", 96 + index, 64, seed=index)
    (tmp_path / "images/car_07.jpg").write_bytes(b"broken")
    out, whole = tmp_path / "out", tmp_path / "whole"
    common = ["predict", "--checkpoint", checkpoint, "--images", tmp_path / "images", *flags(CPU), "--batch-size", 2]
    assert status_of(*common, "--out", whole) == 1
    processes = [Started("-m", "fastseg", *common, "--out", out, "--resume") for _ in range(2)]
    ended = [process.wait() for process in processes]
    assert [one.returncode for one in ended] == [1, 1]  # both name the broken photo
    written = [int(re.search(r"^(\d+) masks in", one.stdout)[1]) for one in ended]
    assert sum(written) == 47
    assert digests(out) == digests(whole)


SECOND_RANK_IS_KILLED = """
import itertools, os, signal, sys, time
replace, calls = os.replace, itertools.count(1)
def replace_or_die(*names):
    if next(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == "0":
        time.sleep(0.2)  # so that the other rank certainly gets five photos
    replace(*names)
os.replace = replace_or_die
from fastseg.cli import main
main(sys.argv[1:])
"""


def test_resume_completes_what_torchrun_stopped_at_a_kill(checkpoint, tmp_path):
    for index in range(40):
        write_pair(tmp_path, f"car_{index:02d}", 96 + index, 64, seed=index)
    out, whole, program = tmp_path / "out", tmp_path / "whole", tmp_path / "program.py"
    program.write_text(SECOND_RANK_IS_KILLED)
    common = ["predict", "--checkpoint", checkpoint, "--images", tmp_path / "images", *flags(CPU), "--batch-size", 1]
    assert status_of(*common, "--out", whole) == 0
    assert torchrun(program, *common, "--out", out).returncode != 0
    existed = len(list(out.glob("*_mask.png")))
    assert 4 <= existed < 40
    result = fastseg.predict(checkpoint, tmp_path / "images", out, resume=True, batch_size=1, **CPU)
    assert (result.masks, result.skipped) == (40 - existed, existed)
    assert digests(out) == digests(whole)


def test_overlays_of_very_tall_photos_fit_into_a_jpeg(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 66000), "grey").save(tmp_path / "photos" / "tall.png")
    result = fastseg.predict(checkpoint, tmp_path / "photos", tmp_path / "out", overlays=True, **CPU)
    assert result.masks == 1
    assert not result.broken
    with (
        Image.open(tmp_path / "out" / "tall_mask.png") as mask,
        Image.open(tmp_path / "out" / "tall_overlay.jpg") as shown,
    ):
        assert mask.size == (4, 66000)
        assert shown.height <= 65500
