"""The command line as its user meets it: flags, results, refusals; and that a refusal writes nothing."""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.network.checkpoint import save_checkpoint
from fastseg.synthetic import generate as generate_module
from tests.conftest import write_pair

ROOT = Path(__file__).parents[1]
TINY = {
    "image_height": 32,
    "image_width": 48,
    "base_channels": 4,
    "depth": 2,
    "batch_size": 4,
    "num_epochs": 1,
    "device": "cpu",
    "precision": "fp32",
}


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The sentence of a command that was refused: the only one, and the last line of standard error."""
        assert self.status == 2, self
        assert "Traceback" not in self.err
        assert self.out == ""
        said = [line.removeprefix("fastseg: ") for line in self.err.splitlines() if line.startswith("fastseg: ")]
        assert len(said) == 1
        assert self.err.endswith(f"fastseg: {said[0]}\n")
        return said[0]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run the command line here and now, with its log on standard error as in a process of its own."""
    root = logging.getLogger()

    def call(*arguments: object, run: Callable[[], object] | None = None) -> Outcome:
        monkeypatch.setattr(root, "handlers", [])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run() if run else main([str(argument) for argument in arguments])
        return Outcome(ended.value.code, *capsys.readouterr())

    level = root.level
    yield call
    root.setLevel(level)


def run_process(*command: object, cwd: Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def flags(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def fields(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run on data/images and data/masks, which it also validates on."""
    images, masks = str(data / "images"), str(data / "masks")
    folders = {"train_img_dir": images, "train_mask_dir": masks, "val_img_dir": images, "val_mask_dir": masks}
    return {**TINY, **folders, "out_dir": str(out / "runs"), **changes}


def epochs_of(run: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, int]:
    """What is in a folder and when it was written, to see that nothing was."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """images/ and masks/ of 2 cars x 2 views that a test may spoil."""
    for seed, name in enumerate(("car0_01", "car0_02", "car1_01", "car1_02")):
        write_pair(tmp_path, name, seed=seed)
    return tmp_path


@pytest.fixture(scope="module")
def trained(pairs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run. Not to be written to."""
    return fastseg.train(fields(pairs_dir, tmp_path_factory.mktemp("trained"))).run_dir


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as a tiny run."""
    for name in ("draw_curves", "draw_overlay"):
        monkeypatch.setattr(f"fastseg.training.summary.{name}", lambda *arguments: None)


# Help


def test_train_help_shows_every_field_with_its_description_and_choices(cli):
    status, out, err = cli("train", "--help")
    text = " ".join(out.split())
    assert (status, err) == (0, "")
    assert text.startswith("usage: fastseg train [--config FILE] [--any-config-field VALUE ...] ")
    for name, field in fastseg.Config.model_fields.items():
        takes = "|".join(get_args(field.annotation))  # of a choice; else N, X, TEXT or true|false
        assert re.search(
            rf"--{name.replace('_', '-')} {re.escape(takes) or '[^ ]+'} {re.escape(field.description)}", text
        )
    assert "--batch-size N pairs a step, over all processes (default: 16) " in text
    assert "--bad-samples raise|skip " in text
    assert "is one (default: true) --checkpoint TEXT weights that a new run starts from, " in text


def test_help_names_the_commands(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for command in ("train", "evaluate", "predict", "synth"):
        assert f"\n    {command} " in out


def test_version_is_known_in_a_source_tree_and_is_that_of_the_installed_package(cli):
    status, out, _ = cli("--version")
    assert (status, out) == (0, f"fastseg {fastseg.__version__}\n")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # in a source tree
        assert importlib.metadata.version("fastseg-dali") == fastseg.__version__


# Flags and files


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[fastseg.Config]:
    """The configurations that `fastseg train` would train, instead of training them."""
    configs = []

    def train(config: fastseg.Config) -> None:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastseg.training.loop.train", train)
    return configs


def test_flags_are_the_field_names_with_dashes(cli, configured):
    """Every field by its flag, as text, ends up in the configuration."""
    changed = {"image_height": 320, "learning_rate": 3e-4, "pin_memory": False, "cache": "off", "val_img_dir": ""}
    values = {**fastseg.Config().model_dump(), **changed}
    cli("train", *flags(values))
    assert configured[0].model_dump() == values
    assert configured[0].model_fields_set == values.keys()


def test_flags_win_over_the_file(cli, configured, tmp_path):
    (tmp_path / "config.json").write_text('{"BATCH_SIZE": 4, "SEED": 7}')
    cli("train", "--config", tmp_path / "config.json", "--batch-size", 8)
    assert configured == [fastseg.Config(batch_size=8, seed=7)]
    assert configured[0].model_fields_set == {"batch_size", "seed"}


def test_without_flags_the_defaults_are_trained(cli, configured):
    cli("train")
    assert configured == [fastseg.Config()]


def test_ctrl_c_ends_with_status_130(cli, configured):
    assert cli("train") == (130, "", "fastseg: interrupted\n")


def test_run_stopped_by_a_signal_says_how_to_go_on(cli, monkeypatch, tmp_path):
    stopped = fastseg.TrainResult(tmp_path, 0.5, 0.4, 1, 10.0, 1.0, interrupted=True, history=[])
    monkeypatch.setattr("fastseg.training.loop.train", lambda config: stopped)
    sentence = f"Interrupted. Run the same command again to go on from {tmp_path / 'last.pt'}.\n"
    assert cli("train") == (130, "", sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--lr", "1"], "--lr: is no flag of `fastseg train`. Did you mean --learning-rate?"),
        (["train", "--batch_size", "1"], "--batch_size: is no flag of `fastseg train`. Did you mean --batch-size?"),
        (["train", "--batchsize=1"], "--batchsize: is no flag of `fastseg train`. Did you mean --batch-size?"),
        (["train", "--BATCH-SIZE", "1"], "--BATCH-SIZE: is no flag of `fastseg train`. Did you mean --batch-size?"),
        (["train", "--confg", "f"], "--confg: is no flag of `fastseg train`. Did you mean --config?"),
        (["train", "--batch", "1"], "--batch: is no flag of `fastseg train`. Did you mean --batch-size?"),
        (["train", "a.json"], "a.json: is no argument of `fastseg train`. See `fastseg train --help`."),
        (["train", "-b"], "-b: is no argument of `fastseg train`. See `fastseg train --help`."),
        (["train", "--name"], "argument --name: expected one argument. See `fastseg train --help`."),
        (["train", "--batch-size", "0"], "batch_size: must be at least 1; got '0'. The default is 16."),
        (["train", "--learning-rate", "-1"], "learning_rate: must be above 0; got '-1'. The default is 0.0001."),
        (["train", "--pin-memory", "2"], "pin_memory: must be true or false; got '2'. The default is true."),
        (
            ["train", "--image-height", "170"],
            "image_height: must be divisible by 16 (the UNet halves it 4 times); got 170. Use 160 or 176.",
        ),
        (
            ["train", "--config", "no.json"],
            "no.json: cannot be read (No such file or directory). Name an existing JSON file.",
        ),
        (["train", "--config", ""], ".: cannot be read (Is a directory). Name an existing JSON file."),
        (
            ["evaluate"],
            "the following arguments are required: --checkpoint, --img-dir, --mask-dir. See `fastseg evaluate --help`.",
        ),
        (
            ["evaluate", "--checkpoint=a", "--img-dir=b", "--mask-dir=c", "--batchsize=1"],
            "--batchsize: is no flag of `fastseg evaluate`. Did you mean --batch-size?",
        ),
        (["synth", "--carz", "2"], "--carz: is no flag of `fastseg synth`. Did you mean --cars?"),
        (["synth", "--cars", "x"], "argument --cars: invalid int value: 'x'. See `fastseg synth --help`."),
        ([], "the following arguments are required: COMMAND. See `fastseg --help`."),
    ],
)
def test_wrong_argument_is_one_sentence_that_helps(arguments, sentence, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli(*arguments)
    assert outcome.refusal == sentence
    assert outcome.err.count("\n") == 1
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"BATCH_SIZE": 16,}', "does not parse as JSON ("),
        ('{"BATCHSIZE": 16}', "BATCHSIZE: is no known field. Did you mean batch_size?"),
        ('{"DEVICE": "gpu"}', "device: must be auto, cpu, cuda or cuda:N; got 'gpu'. The default is auto."),
    ],
)
def test_bad_config_file_is_named(content, sentence, cli, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert cli("train", "--config", file).refusal.startswith(f"{file}: {sentence}")


# Runs


def test_train_writes_a_run_and_evaluate_repeats_its_scores(cli, data):
    outcome = cli("train", *flags(fields(data, data)))
    run = data / "runs" / "carvana"
    assert outcome.status == 0
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "curves.png", "overlay.png", "best.pt", "last.pt"),
    }
    summary = json.loads((run / "summary.json").read_text())
    assert outcome.out.startswith(f"IoU {summary['val_iou']:.4f}, Dice {summary['val_dice']:.4f} (means over ")
    assert outcome.out.endswith(f"; everything is in {run}/\n")
    assert summary["bad_samples"] == {"count": 0, "images": []}

    folders = ("--img-dir", data / "images", "--mask-dir", data / "masks")
    status, out, _ = cli("evaluate", "--checkpoint", run / "best.pt", *folders, "--device=cpu", "--precision=fp32")
    sentence, *_, scores = out.splitlines()
    scores = json.loads(scores)
    assert status == 0
    assert scores["images"] == 4
    assert [scores["dice"], scores["iou"]] == pytest.approx([summary["val_dice"], summary["val_iou"]], abs=1e-5)
    assert sentence.startswith(f"4 images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); ")


@pytest.mark.usefixtures("without_pictures")
def test_load_model_says_whether_it_goes_on(cli, data):
    last = data / "runs" / "carvana" / "last.pt"
    run = fields(data, data)
    assert "a new run from random weights (no last.pt yet)\n" in cli("train", *flags(run)).err
    again = cli("train", *flags({**run, "num_epochs": 2}))
    assert f"going on from {last} at epoch 2, step 0\n" in again.err
    assert epochs_of(last.parent) == [1, 2]
    anew = cli("train", *flags({**run, "load_model": False}))
    assert "a new run from random weights (load_model is false)\n" in anew.err
    assert epochs_of(last.parent) == [1]


@pytest.mark.usefixtures("without_pictures")
def test_named_checkpoint_is_where_a_new_run_starts(cli, data, trained):
    best = trained / "best.pt"
    outcome = cli("train", *flags(fields(data, data, checkpoint=best)))
    assert outcome.status == 0
    assert f"weights from {best} " in outcome.err


@pytest.mark.usefixtures("without_pictures")
def test_png_named_jpg_is_decoded(cli, data):
    path = data / "images" / "car0_02.jpg"
    with Image.open(path) as image:
        image.save(data / "photo.png")
    (data / "photo.png").rename(path)
    outcome = cli("train", *flags(fields(data, data)))
    summary = json.loads((data / "runs" / "carvana" / "summary.json").read_text())
    assert (outcome.status, summary["train_pairs"], summary["bad_samples"]["count"]) == (0, 4, 0)


@pytest.mark.usefixtures("without_pictures")
def test_skip_names_and_counts_what_it_leaves_out_and_trains(cli, data):
    for seed in range(4):
        write_pair(data, f"car{2 + seed}_01", seed=seed)
    (data / "masks" / "car0_01_mask.gif").unlink()
    photo, mask = data / "images" / "car1_02.jpg", data / "masks" / "car2_01_mask.gif"
    spoil("images/car1_02.jpg")(data)
    Image.new("1", (5, 7)).save(mask)
    outcome = cli("train", *flags(fields(data, data, bad_samples="skip", val_img_dir="", val_fraction=0.3)))
    assert outcome.status == 0
    assert f"left out: 1 of 8 images have no mask in {data / 'masks'}: car0_01.jpg\n" in outcome.err
    assert f"left out: {photo}: is a truncated JPEG (" in outcome.err
    assert f"left out: {mask}: must have its image's size, 96x64; it has 5x7\n" in outcome.err
    summary = json.loads((data / "runs" / "carvana" / "summary.json").read_text())
    assert summary["bad_samples"]["count"] == 3
    assert sorted(summary["bad_samples"]["images"]) == ["car0_01.jpg", "car1_02.jpg", "car2_01.jpg"]
    assert summary["train_pairs"] + summary["val_pairs"] == 5


@pytest.mark.usefixtures("without_pictures")
def test_without_validation_folders_whole_cars_are_held_out(cli, data, monkeypatch):
    monkeypatch.chdir(data)  # where ./data/val_images/ does not exist
    run = fields(data, data)
    del run["val_img_dir"], run["val_mask_dir"]
    outcome = cli("train", *flags(run))
    assert outcome.status == 0
    assert "no validation folders: 2 pairs held out, whole cars at a time\n" in outcome.err


def test_synth_makes_the_four_folders(cli, tmp_path, monkeypatch):
    out = tmp_path / "data"
    small = functools.partial(generate_module.generate, width=192, height=128)
    monkeypatch.setattr(generate_module, "generate", small)
    status, printed, _ = cli("synth", "--out", out, "--cars", 2, "--views", 1)
    assert (status, printed) == (0, f"1 training and 1 validation pairs in {out}/\n")
    for split in ("train", "val"):
        assert len(fastseg.find_pairs(out / f"{split}_images", out / f"{split}_masks")) == 1


# Bad input: one sentence, status 2, nothing written


def spoil(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Replace a file's bytes, or cut it in the middle."""

    def spoil_file(data: Path) -> None:
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) // 2] if content is None else content)

    return spoil_file


def shrink_mask(data: Path) -> None:
    Image.new("1", (48, 32)).save(data / "masks" / "car0_02_mask.gif")


@pytest.mark.parametrize("check_data", [True, False])
@pytest.mark.parametrize(
    ("damage", "name", "fault"),
    [
        (spoil("images/car0_02.jpg"), "images/car0_02.jpg", "truncated JPEG ("),
        (spoil("images/car0_02.jpg", b""), "images/car0_02.jpg", ": is empty (0 bytes). "),
        (spoil("masks/car0_02_mask.gif"), "masks/car0_02_mask.gif", "; it is truncated. "),
        (spoil("masks/car0_02_mask.gif", b""), "masks/car0_02_mask.gif", ": is empty (0 bytes). "),
        (shrink_mask, "masks/car0_02_mask.gif", ": must have its image's size, 96x64; it has 48x32. "),
    ],
    ids=["truncated JPEG", "empty JPEG", "truncated GIF", "empty GIF", "size"],
)
def test_bad_file_is_refused_before_and_during_training(damage, name, fault, check_data, cli, data):
    damage(data)
    sentence = cli("train", *flags(fields(data, data, check_data=check_data))).refusal
    assert f"{data / name}: " in sentence
    assert fault in sentence
    assert sentence.endswith(', or pass bad_samples="skip" to leave ' + ("them out." if check_data else "it out."))
    assert not list(data.rglob("*.pt"))
    if check_data:
        assert not (data / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_img_dir": "no"}, "no: no such folder of images. Give the folder that holds them, or "),
        ({"train_mask_dir": "no"}, "no: no such folder of masks. Give the folder that holds them, or "),
        ({"val_img_dir": "no"}, "no: no such folder of images. Give the folder that holds them, or "),
        ({"train_img_dir": "empty"}, "empty: must hold images (.jpg, .jpeg, .png, .bmp, .webp); found nothing. "),
        ({"train_mask_dir": "empty"}, "empty: must hold masks (.gif, .png, .bmp); found nothing. "),
        ({"train_mask_dir": "one"}, "3 of 4 images have no mask in one; first: car0_02.jpg (looked for "),
        ({"precision": "fp16"}, "precision: fp16 needs a GPU; the device is cpu. "),
        ({"checkpoint": "no.pt"}, "no.pt: cannot be read (No such file or directory). Name an existing checkpoint."),
        ({"checkpoint": "empty"}, "empty: cannot be read (Is a directory). Name an existing checkpoint."),
        ({"checkpoint": "notes.txt"}, "notes.txt: is damaged or no checkpoint. Use another, or remove it."),
        (
            {"out_dir": "notes.txt"},
            "out_dir: notes.txt/carvana cannot be written (Not a directory). Give another folder.",
        ),
        (
            {"name": "notes.txt", "out_dir": "."},
            "out_dir: notes.txt cannot be written (Not a directory). Give another folder.",
        ),
        (
            {"out_dir": "/proc"},
            "out_dir: /proc/carvana cannot be written (No such file or directory). Give another folder.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refusal_says_why_and_writes_nothing(changes, sentence, cli, data, monkeypatch):
    monkeypatch.chdir(data)
    (data / "empty").mkdir()
    (data / "one").mkdir()
    shutil.copy(data / "masks" / "car0_01_mask.gif", data / "one")
    (data / "notes.txt").write_text("no checkpoint, no folder")
    before = files(data)
    assert cli("train", *flags(fields(data, data, **changes))).refusal.startswith(sentence)
    assert files(data) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_says_auto(device, cli, data):
    outcome = cli("train", *flags(fields(data, data, device=device)))
    assert outcome.refusal == (f"device: {device} needs an NVIDIA GPU, and torch finds none here. Use auto (or cpu).")
    assert not (data / "runs").exists()


def test_named_checkpoint_of_other_channels(cli, data, trained):
    best = trained / "best.pt"
    for field, value in (("base_channels", 8), ("depth", 3)):
        run = fields(data, data, checkpoint=best, **{field: value})
        assert cli("train", *flags(run)).refusal == (
            f"{best}: holds a network with {field} {TINY[field]}; the configuration asks for {value}. "
            f"Set {field} to {TINY[field]}, or give another checkpoint."
        )
    assert not (data / "runs").exists()


def test_last_checkpoint_of_other_channels(cli, data, trained):
    shutil.copytree(trained, data / "runs" / "carvana")
    before = files(data)
    assert cli("train", *flags(fields(data, data, base_channels=8))).refusal == (
        f"{data}/runs/carvana/last.pt: holds a network with base_channels 4; the configuration asks for 8. "
        "Set base_channels to 4, or give another name, or pass load_model=false."
    )
    assert files(data) == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is damaged or no checkpoint. Use another, or remove it."),
        (b"", "is damaged or no checkpoint. Use another, or remove it."),
        (b"weights", "is damaged or no checkpoint. Use another, or remove it."),
        ([1, 2], "is no checkpoint of this version of fastseg (format 1). Use one that it wrote."),
        ({}, "is no checkpoint of this version of fastseg (format 1). Use one that it wrote."),
        ({"format": 2}, "is no checkpoint of this version of fastseg (format 1). Use one that it wrote."),
        ({"config": {}}, "is no checkpoint of this version of fastseg (format 1). Use one that it wrote."),
        ({"model": []}, "is no checkpoint of this version of fastseg (format 1). Use one that it wrote."),
        (
            {"config": {"base_channels": 4, "depth": 2, "batch_size": 0, "image_height": 32, "image_width": 48}},
            "holds a configuration that cannot be used (batch_size: must be at least 1; got 0. The default is 16.). "
            "Use another.",
        ),
        (
            {"model": {"head.weight": torch.zeros(1)}},
            "must hold the weights of a network with base_channels 4 and depth 2, as its configuration says; it holds "
            "others. Use another checkpoint.",
        ),
    ],
    ids=["cut", "empty", "text", "list", "bare", "format", "config", "model", "field", "weights"],
)
def test_checkpoint_that_cannot_be_used_is_named(content, sentence, cli, data, trained):
    """Cut in the middle (None), other bytes, other values, or a whole one with parts replaced."""
    path = data / "some.pt"
    whole = torch.load(trained / "best.pt", weights_only=True)
    if content is None:
        path.write_bytes((trained / "best.pt").read_bytes()[:2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({**whole, **content} if content and isinstance(content, dict) else content, path)
    outcome = cli("evaluate", "--checkpoint", path, "--img-dir", data / "images", "--mask-dir", data / "masks")
    assert outcome.refusal == f"{path}: {sentence}"


def test_checkpoint_runs_no_code(cli, data):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (data / "trapped",)

    torch.save({"format": 1, "model": Trap()}, data / "some.pt")
    outcome = cli("evaluate", "--checkpoint", data / "some.pt", "--img-dir", data, "--mask-dir", data)
    assert outcome.refusal == f"{data}/some.pt: is damaged or no checkpoint. Use another, or remove it."
    assert not (data / "trapped").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint": "no.pt"}, "no.pt: cannot be read (No such file or directory). Name an existing checkpoint."),
        ({"img_dir": "no"}, "no: no such folder of images. Give the folder that holds them, or "),
        ({"mask_dir": "images"}, "images: must hold masks (.gif, .png, .bmp); found only other files (.jpg). "),
        ({"batch_size": "0"}, "batch_size: must be at least 1; got '0'. The default is 16."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_evaluate_refuses_in_one_sentence(changes, sentence, cli, data, trained, monkeypatch):
    monkeypatch.chdir(data)
    options = {"checkpoint": trained / "best.pt", "img_dir": "images", "mask_dir": "masks", "device": "cpu"}
    assert cli("evaluate", *flags({**options, **changes})).refusal.startswith(sentence)


def test_synth_refuses_too_few_cars(cli, tmp_path):
    error = cli("synth", "--out", tmp_path / "data", "--cars", 1).refusal
    assert error.startswith("cars: ")
    assert error.endswith("Use 2.")
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
        with pytest.raises(fastseg.CheckpointError) as error:
            save_checkpoint(path, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert str(error.value) == (
        f"{path}: cannot be written (File too large); what was there before is intact. Make room and run again."
    )
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


# The script, and processes of their own


@pytest.fixture
def script(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run scripts/train.py here and now."""
    path = ROOT / "scripts" / "train.py"

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        return cli(run=lambda: runpy.run_path(str(path), run_name="__main__"))

    return run


@pytest.mark.usefixtures("without_pictures")
def test_script_trains_from_a_file_in_any_case(script, data, monkeypatch):
    config = {name.upper(): value for name, value in fields(data, data).items()}
    (data / "hyperparams.json").write_text(json.dumps(config))
    monkeypatch.chdir(data)
    outcome = script("hyperparams.json")
    assert outcome.status == 0
    assert outcome.out.endswith(f"; everything is in {data}/runs/carvana/\n")
    assert (data / "runs" / "carvana" / "summary.json").exists()


@pytest.mark.parametrize("gpu", [True, False])
def test_script_without_arguments_reads_the_file_beside_it(script, configured, gpu, monkeypatch):
    """The old project's file says cuda; its users without a GPU train all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    outcome = script()
    assert outcome.status == 130
    file = fastseg.Config.from_json(ROOT / "scripts" / "hyperparams.json")
    assert file.device == "cuda"
    assert configured == [file if gpu else file.replace(device="cpu")]
    assert ("says device cuda, and there is no GPU here: training on the CPU" in outcome.err) is not gpu
    assert script("--device", "cuda:1").status == 130
    assert configured[1].device == "cuda:1"


def test_python_m_fastseg_refuses_bad_data_in_one_sentence(data):
    spoil("images/car0_02.jpg")(data)
    before = files(data)
    outcome = run_process("-m", "fastseg", "train", *flags(fields(data, data)), cwd=data)
    assert f"{data}/images/car0_02.jpg: is a truncated JPEG (" in outcome.refusal
    assert files(data) == before


def test_script_refuses_a_bad_file_in_one_sentence(tmp_path):
    (tmp_path / "hyperparams.json").write_text('{"LERNING_RATE": 0.0001}')
    outcome = run_process(ROOT / "scripts" / "train.py", "hyperparams.json", cwd=tmp_path)
    assert outcome.refusal == "hyperparams.json: LERNING_RATE: is no known field. Did you mean learning_rate?"
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hyperparams.json"]
