"""The command line: help, flags, output and exit status."""

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from PIL import Image

import fastseg
from fastseg.synthetic import generate as generate_module
from tests.conftest import ROOT, Cli, Outcome, damage, fields, files, flags, run_process, write_pair

REQUIRED = ("--checkpoint=a", "--img-dir=b", "--mask-dir=c")  # of `fastseg evaluate`


def epochs_of(run: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# Help


def test_train_help_shows_every_field_with_its_description_and_choices(cli):
    status, out, err = cli("train", "--help")
    text = " ".join(out.split())
    assert (status, err) == (0, "")
    assert text.startswith("usage: fastseg train [--config FILE] [--any-config-field VALUE ...] ")
    for name, field in fastseg.Config.model_fields.items():
        choices = ""  # others than Literals have N, X, TEXT or true|false
        if get_origin(field.annotation) is Literal:
            choices = "|".join(filter(None, get_args(field.annotation)))
        assert re.search(
            rf"--{name.replace('_', '-')} {re.escape(choices) or '[^ ]+'} {re.escape(field.description)}", text
        )
    assert re.search(r"--batch-size N [^(]+ \(default: 0\) ", text)
    assert "--bad-samples raise|skip " in text


def test_help_names_the_commands(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for command in ("train", "evaluate", "predict", "export", "submission", "tune", "check", "synth"):
        assert re.search(rf"\n    {command}\s", out)


def test_version_is_known_in_a_source_tree_and_is_that_of_the_installed_package(cli):
    status, out, _ = cli("--version")
    assert (status, out) == (0, f"fastseg {fastseg.__version__}\n")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # in a source tree
        assert importlib.metadata.version("fastseg-dali") == fastseg.__version__


# Flags and files


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[fastseg.Config]:
    """The configurations with which `fastseg train` would train; nothing is trained."""
    configs = []

    def train(config: fastseg.Config, **options: object) -> None:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastseg.training.loop.train", train)
    return configs


def test_every_field_has_a_flag(cli, configured):
    changed = {"image_height": 320, "learning_rate": 3e-4, "pin_memory": False, "cache": "off", "val_img_dir": ""}
    values = {**fastseg.Config().model_dump(), **changed}
    cli("train", *flags({**values, "classes": ""}))
    assert configured[0].model_dump() == values
    assert configured[0].model_fields_set == values.keys()


def test_flags_override_the_file(cli, configured, tmp_path):
    (tmp_path / "config.json").write_text('{"BATCH_SIZE": 4, "SEED": 7}')
    cli("train", "--config", tmp_path / "config.json", "--batch-size", 8)
    assert configured == [fastseg.Config(batch_size=8, seed=7)]
    assert configured[0].model_fields_set == {"batch_size", "seed"}


def test_the_defaults_need_no_flags(cli, configured):
    cli("train")
    assert configured == [fastseg.Config()]


def test_ctrl_c_ends_with_status_130(cli, configured):
    assert cli("train") == (130, "", "fastseg: interrupted\n")


def test_an_interrupted_run_tells_how_to_resume(cli, monkeypatch, tmp_path):
    stopped = fastseg.TrainResult(tmp_path, 0.5, 0.4, 1, 10.0, 1.0, interrupted=True, history=[])
    monkeypatch.setattr("fastseg.training.loop.train", lambda config, **options: stopped)
    status, out, err = cli("train")
    assert (status, out) == (130, "")
    assert re.search(rf"same command again to resume from {re.escape(str(tmp_path / 'last.pt'))}", err)


@pytest.mark.parametrize(
    ("arguments", "subject", "remedy"),
    [
        (["train", "--lr", "1"], "--lr: ", "--learning-rate?"),
        (["train", "--batch_size", "1"], "--batch_size: ", "--batch-size?"),
        (["train", "--batchsize=1"], "--batchsize: ", "--batch-size?"),
        (["train", "--BATCH-SIZE", "1"], "--BATCH-SIZE: ", "--batch-size?"),
        (["train", "--confg", "f"], "--confg: ", "--config?"),
        (["train", "--batch", "1"], "--batch: ", "--batch-size?"),
        (["train", "a.json"], "a.json: ", "`fastseg train --help`"),
        (["train", "-b"], "-b: ", "`fastseg train --help`"),
        (["train", "--name"], "argument --name: ", "`fastseg train --help`"),
        (["train", "--batch-size", "-1"], "batch_size: ", "at least 0"),
        (["train", "--learning-rate", "-1"], "learning_rate: ", "above 0"),
        (["train", "--pin-memory", "2"], "pin_memory: ", "true or false"),
        (["train", "--image-height", "170"], "image_height: ", "160 or 176"),
        (["train", "--config", "no.json"], "no.json: ", "existing JSON file"),
        (["train", "--config", ""], ".: ", "existing JSON file"),
        (["evaluate"], "the following arguments", "--checkpoint, --img-dir, --mask-dir. See `fastseg evaluate --help`"),
        (["evaluate", *REQUIRED, "--batchsize=1"], "--batchsize: ", "--batch-size?"),
        (["synth", "--carz", "2"], "--carz: ", "--cars?"),
        (["synth", "--cars", "x"], "argument --cars: ", "`fastseg synth --help`"),
        ([], "the following arguments", "`fastseg --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_argument_is_named_with_a_remedy(arguments, subject, remedy, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli(*arguments)
    outcome.assert_refused(subject, remedy)
    assert outcome.err.count("\n") == 1
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"BATCH_SIZE": 16,}', ["JSON"]),
        ('{"BATCHSIZE": 16}', ["BATCHSIZE: ", "batch_size?"]),
        ('{"DEVICE": "gpu"}', ["device: ", "cuda:N"]),
    ],
)
def test_bad_config_file_is_named(content, words, cli, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(content)
    cli("train", "--config", file).assert_refused(f"{file}: ", *words)


# Runs


@pytest.mark.usefixtures("pictures")
def test_train_writes_a_run_and_evaluate_repeats_its_scores(cli, data):
    outcome = cli("train", *flags(fields(data, data)))
    run = data / "runs" / "carvana"
    assert outcome.status == 0
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "curves.png", "overlay.png", "best.pt", "last.pt"),
    }
    summary = json.loads((run / "summary.json").read_text())
    assert outcome.out.startswith(f"IoU {summary['val_iou']:.4f}, Dice {summary['val_dice']:.4f} (means over ")
    assert outcome.out.endswith(f" {run}/\n")
    assert summary["bad_samples"] == {"count": 0, "images": []}

    folders = ("--img-dir", data / "images", "--mask-dir", data / "masks")
    status, out, _ = cli("evaluate", "--checkpoint", run / "best.pt", *folders, "--device=cpu", "--precision=fp32")
    line, *_, scores = out.splitlines()
    scores = json.loads(scores)
    assert status == 0
    assert scores["images"] == 4
    assert [scores["dice"], scores["iou"]] == pytest.approx([summary["val_dice"], summary["val_iou"]], abs=1e-5)
    assert line.startswith(f"4 images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); ")


def test_the_log_tells_whether_a_run_resumes(cli, data):
    last = data / "runs" / "carvana" / "last.pt"
    run = fields(data, data)
    assert "new run from random weights (no last.pt yet)\n" in cli("train", *flags(run)).err
    again = cli("train", *flags({**run, "num_epochs": 2}))
    assert f"resuming from {last} at epoch 2, step 0\n" in again.err
    assert epochs_of(last.parent) == [1, 2]
    from_scratch = cli("train", *flags({**run, "load_model": False}))
    assert "new run from random weights (load_model is false)\n" in from_scratch.err
    assert epochs_of(last.parent) == [1]


def test_named_checkpoint_is_where_a_new_run_starts(cli, data, trained):
    best = trained / "best.pt"
    outcome = cli("train", *flags(fields(data, data, checkpoint=best)))
    assert outcome.status == 0
    assert f"weights from {best} " in outcome.err


def test_png_named_jpg_is_decoded(cli, data):
    path = data / "images" / "car0_02.jpg"
    with Image.open(path) as image:
        image.save(data / "photo.png")
    (data / "photo.png").rename(path)
    outcome = cli("train", *flags(fields(data, data)))
    summary = json.loads((data / "runs" / "carvana" / "summary.json").read_text())
    assert (outcome.status, summary["train_pairs"], summary["bad_samples"]["count"]) == (0, 4, 0)


def test_skipped_files_are_named_and_counted(cli, data):
    for seed in range(4):
        write_pair(data, f"car{2 + seed}_01", seed=seed)
    (data / "masks" / "car0_01_mask.gif").unlink()
    photo, mask = data / "images" / "car1_02.jpg", data / "masks" / "car2_01_mask.gif"
    damage("images/car1_02.jpg")(data)
    Image.new("1", (5, 7)).save(mask)
    outcome = cli("train", *flags(fields(data, data, bad_samples="skip", val_img_dir="", val_fraction=0.3)))
    assert outcome.status == 0
    for words in (("1 of 8 images", "masks", "car0_01.jpg"), (str(photo), "truncated"), (str(mask), "96x64", "5x7")):
        assert re.search(".*".join(map(re.escape, words)), outcome.err), words
    summary = json.loads((data / "runs" / "carvana" / "summary.json").read_text())
    assert summary["bad_samples"]["count"] == 3
    assert sorted(summary["bad_samples"]["images"]) == ["car0_01.jpg", "car1_02.jpg", "car2_01.jpg"]
    assert summary["train_pairs"] + summary["val_pairs"] == 5


def test_without_validation_folders_whole_cars_are_held_out(cli, data, monkeypatch):
    monkeypatch.chdir(data)  # where ./data/val_images/ does not exist
    run = fields(data, data)
    del run["val_img_dir"], run["val_mask_dir"]
    outcome = cli("train", *flags(run))
    assert outcome.status == 0
    assert re.search("no validation folders: held out 2 pairs", outcome.err)


def test_synth_makes_the_four_folders(cli, tmp_path, monkeypatch):
    out = tmp_path / "data"
    small = functools.partial(generate_module.generate, width=192, height=128)
    monkeypatch.setattr(generate_module, "generate", small)
    status, printed, _ = cli("synth", "--out", out, "--cars", 2, "--views", 1)
    assert (status, printed) == (0, f"1 training pair and 1 validation pair in {out}/\n")
    for split in ("train", "val"):
        assert len(fastseg.find_pairs(out / f"{split}_images", out / f"{split}_masks")) == 1


# scripts/train.py, and commands in a new process


@pytest.fixture
def script(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run scripts/train.py in this process."""
    path = ROOT / "scripts" / "train.py"

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        return cli(run=lambda: runpy.run_path(str(path), run_name="__main__"))

    return run


def test_script_trains_from_a_file_in_any_case(script, data, monkeypatch):
    config = {name.upper(): value for name, value in fields(data, data).items()}
    (data / "hyperparams.json").write_text(json.dumps(config))
    monkeypatch.chdir(data)
    outcome = script("hyperparams.json")
    assert outcome.status == 0
    assert outcome.out.endswith(f" {data}/runs/carvana/\n")
    assert (data / "runs" / "carvana" / "summary.json").exists()


@pytest.mark.parametrize("gpu", [True, False])
def test_script_without_arguments_reads_the_file_beside_it(script, configured, gpu, monkeypatch):
    """The file asks for cuda; without a GPU the script trains on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    outcome = script()
    assert outcome.status == 130
    file = fastseg.Config.from_json(ROOT / "scripts" / "hyperparams.json")
    assert file.device == "cuda"
    assert configured == [file if gpu else file.replace(device="cpu")]
    assert ("training on the CPU" in outcome.err) is not gpu
    assert script("--device", "cuda:1").status == 130
    assert configured[1].device == "cuda:1"


def test_python_m_fastseg_refuses_bad_data(data):
    damage("images/car0_02.jpg")(data)
    before = files(data)
    outcome = run_process("-m", "fastseg", "train", *flags(fields(data, data)), cwd=data)
    outcome.assert_refused("", f"{data}/images/car0_02.jpg: ", "truncated")
    assert files(data) == before


def test_script_refuses_a_bad_file(tmp_path):
    (tmp_path / "hyperparams.json").write_text('{"LERNING_RATE": 0.0001}')
    outcome = run_process(ROOT / "scripts" / "train.py", "hyperparams.json", cwd=tmp_path)
    outcome.assert_refused("hyperparams.json: LERNING_RATE: ", "learning_rate?")
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hyperparams.json"]


def test_a_full_standard_output_is_one_message(data):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastseg", "check", "images", "masks", "--no-duplicates"],
            cwd=data,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastseg: standard output: "), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_of_standard_output_may_leave(data):
    command = [sys.executable, "-m", "fastseg", "check", "images", "masks", "--no-duplicates"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    error = subprocess.run(command, cwd=data, env=environment, timeout=600, **streams).stderr
    os.close(writer)
    assert "Traceback" not in error
    assert "Exception ignored" not in error
