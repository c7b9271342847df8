"""What `fastseg train` and `evaluate` refuse: one message with file or field and remedy, status 2, nothing written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastseg
from fastseg.network.checkpoint import save_checkpoint
from tests.conftest import TINY, damage, fields, files, flags


def shrink_mask(data: Path) -> None:
    Image.new("1", (48, 32)).save(data / "masks" / "car0_02_mask.gif")


@pytest.mark.parametrize("check_data", [True, False])
@pytest.mark.parametrize(
    ("damage_pair", "name", "fault"),
    [
        (damage("images/car0_02.jpg"), "images/car0_02.jpg", ["truncated"]),
        (damage("images/car0_02.jpg", b""), "images/car0_02.jpg", ["empty"]),
        (damage("masks/car0_02_mask.gif"), "masks/car0_02_mask.gif", ["truncated"]),
        (damage("masks/car0_02_mask.gif", b""), "masks/car0_02_mask.gif", ["empty"]),
        (shrink_mask, "masks/car0_02_mask.gif", ["96x64", "48x32"]),
    ],
    ids=["truncated JPEG", "empty JPEG", "truncated GIF", "empty GIF", "size"],
)
def test_bad_file_is_refused_before_and_during_training(damage_pair, name, fault, check_data, cli, data):
    damage_pair(data)
    outcome = cli("train", *flags(fields(data, data, check_data=check_data)))
    outcome.assert_refused("", f"{data / name}: ", *fault, 'bad_samples="skip"')
    assert not list(data.rglob("*.pt"))
    if check_data:
        assert not (data / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"train_img_dir": "no"}, "no: ", ["folder of images"]),
        ({"train_mask_dir": "no"}, "no: ", ["folder of masks"]),
        ({"val_img_dir": "no"}, "no: ", ["folder of images"]),
        ({"train_img_dir": "empty"}, "empty: ", [".jpg"]),
        ({"train_mask_dir": "empty"}, "empty: ", [".gif"]),
        ({"train_mask_dir": "one"}, "3 of 4 images", ["one", "car0_02.jpg"]),
        ({"precision": "fp16"}, "precision: ", ["cpu", "bf16"]),
        ({"checkpoint": "no.pt"}, "no.pt: ", ["No such file", "existing checkpoint"]),
        ({"checkpoint": "empty"}, "empty: ", ["Is a directory", "existing checkpoint"]),
        ({"checkpoint": "notes.txt"}, "notes.txt: ", ["damaged", "another"]),
        ({"out_dir": "notes.txt"}, "notes.txt/carvana: ", ["Not a directory", "another place"]),
        ({"name": "notes.txt", "out_dir": "."}, "notes.txt: ", ["Not a directory", "another place"]),
        ({"out_dir": "/proc"}, "/proc/carvana: ", ["No such file", "another place"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refusal_names_file_and_remedy_and_writes_nothing(changes, subject, words, cli, data, monkeypatch):
    monkeypatch.chdir(data)
    (data / "empty").mkdir()
    (data / "one").mkdir()
    shutil.copy(data / "masks" / "car0_01_mask.gif", data / "one")
    (data / "notes.txt").write_text("neither a checkpoint nor a folder")
    before = files(data)
    cli("train", *flags(fields(data, data, **changes))).assert_refused(subject, *words)
    assert files(data) == before


def test_an_unwritable_run_folder_is_refused_before_any_data_is_read(cli, data):
    (data / "notes.txt").write_text("not a folder")
    run = fields(data / "no such data", data, out_dir=data / "notes.txt")
    cli("train", *flags(run)).assert_refused(f"{data / 'notes.txt' / 'carvana'}: ", "Not a directory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_refused(device, cli, data):
    cli("train", *flags(fields(data, data, device=device))).assert_refused("device: ", device, "auto")
    assert not (data / "runs").exists()


def test_named_checkpoint_of_another_network(cli, data, trained):
    best = trained / "best.pt"
    for field, value in (("base_channels", 8), ("depth", 3)):
        run = fields(data, data, checkpoint=best, **{field: value})
        remedy = (f"Set {field} to {TINY[field]}", "another checkpoint")
        cli("train", *flags(run)).assert_refused(f"{best}: ", f"{field} {value}", *remedy)
    assert not (data / "runs").exists()


def test_last_checkpoint_of_another_network(cli, data, trained):
    run = data / "runs" / "carvana"
    shutil.copytree(trained, run)
    before = files(data)
    outcome = cli("train", *flags(fields(data, data, base_channels=8)))
    outcome.assert_refused(f"{run / 'last.pt'}: ", "base_channels 8", "Set base_channels to 4", "load_model=false")
    assert files(data) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["damaged"]),
        (b"", ["damaged"]),
        (b"weights", ["damaged"]),
        ([1, 2], ["version of fastseg"]),
        ({}, ["version of fastseg"]),
        ({"format": 2}, ["version of fastseg"]),
        ({"config": {}}, ["version of fastseg"]),
        ({"model": []}, ["version of fastseg"]),
        (
            {"config": {"base_channels": 4, "depth": 2, "batch_size": -1, "image_height": 32, "image_width": 48}},
            ["configuration", "batch_size: ", "at least 0", "another checkpoint"],
        ),
        ({"model": {"head.weight": torch.zeros(1)}}, ["weights", "another checkpoint"]),
    ],
    ids=["cut", "empty", "text", "list", "bare", "format", "config", "model", "field", "weights"],
)
def test_checkpoint_that_cannot_be_used_is_named(content, words, cli, data, trained):
    """Truncated (None), other bytes, other values, or a complete one with parts replaced."""
    path = data / "some.pt"
    complete = torch.load(trained / "best.pt", weights_only=True)
    if content is None:
        path.write_bytes((trained / "best.pt").read_bytes()[:2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({**complete, **content} if content and isinstance(content, dict) else content, path)
    outcome = cli("evaluate", "--checkpoint", path, "--img-dir", data / "images", "--mask-dir", data / "masks")
    outcome.assert_refused(f"{path}: ", *words)


def test_checkpoint_runs_no_code(cli, data):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (data / "trapped",)

    torch.save({"format": 1, "model": Trap()}, data / "some.pt")
    outcome = cli("evaluate", "--checkpoint", data / "some.pt", "--img-dir", data, "--mask-dir", data)
    outcome.assert_refused(f"{data}/some.pt: ", "damaged")
    assert not (data / "trapped").exists()


@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"checkpoint": "no.pt"}, "no.pt: ", ["existing checkpoint"]),
        ({"img_dir": "no"}, "no: ", ["folder of images"]),
        ({"mask_dir": "images"}, "images: ", [".gif", ".jpg"]),
        ({"batch_size": "-1"}, "batch_size: ", ["at least 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_evaluate_names_file_or_field(changes, subject, words, cli, data, trained, monkeypatch):
    monkeypatch.chdir(data)
    options = {"checkpoint": trained / "best.pt", "img_dir": "images", "mask_dir": "masks", "device": "cpu"}
    cli("evaluate", *flags({**options, **changes})).assert_refused(subject, *words)


def test_synth_names_the_number_of_cars(cli, tmp_path):
    cli("synth", "--out", tmp_path / "data", "--cars", 1).assert_refused("cars: ", "2 to 10000", "got 1", "2")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("limit", [1, 700, 5000])  # within the first write, its header, its tensors
def test_checkpoint_that_does_not_fit_the_disk_leaves_the_old_one(limit, tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(fastseg.OutputError, match=r"last\.pt: .*File too large.*room"):
            save_checkpoint(path, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
