"""The command line as its user meets it: flags, results, refusals; and that a refusal writes nothing."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from PIL import Image

import fastseg
from fastseg.checkpoint import save_checkpoint
from fastseg.cli import main
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
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line here and now, with its log on standard error as in a process of its own."""
    root = logging.getLogger()

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(root, "handlers", [])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return Outcome(exit.value.code, *capsys.readouterr())

    level = root.level
    yield run
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
    """The folder of a run with two epochs. Not to be written to."""
    result = fastseg.train(fields(pairs_dir, tmp_path_factory.mktemp("trained"), num_epochs=2))
    return result.run_dir


# Help


def test_train_help_shows_every_field_with_its_description_and_choices(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line a flag
    status, out, err = cli("train", "--help")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("--")}
    assert (status, err) == (0, "")
    for name, field in fastseg.Config.model_fields.items():
        line = lines[f"--{name.replace('_', '-')}"]
        assert field.description in line
        assert "|".join(choice for choice in get_args(field.annotation)) in line
    assert "--batch-size N" in lines["--batch-size"]
    assert lines["--batch-size"].endswith("(default: 16)")
    assert lines["--load-model"].endswith("(default: true)")
    assert out.startswith("usage: fastseg train [--config FILE] [--any-config-field VALUE ...]\n")


def test_help_names_the_commands(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for command in ("train", "evaluate", "synth"):
        assert f"\n    {command} " in out


# Training and evaluation


def test_flags_are_the_field_names_with_dashes(cli, monkeypatch, tmp_path):
    """Every field by its flag, as text, ends up in the configuration that is trained."""
    values = {
        **{name: field.default for name, field in fastseg.Config.model_fields.items()},
        **{"image_height": 320, "learning_rate": 3e-4, "pin_memory": False, "cache": "off", "name": "flags"},
    }
    seen = []
    monkeypatch.setattr("fastseg.training.train", lambda config: seen.append(config) or pytest.exit_on_purpose())
    monkeypatch.setattr(pytest, "exit_on_purpose", lambda: (_ for _ in ()).throw(KeyboardInterrupt), raising=False)
    assert cli("train", *flags(values)) == (130, "", "fastseg: interrupted\n")
    assert seen[0].model_dump() == values
    assert seen[0].model_fields_set == values.keys()


def test_flags_win_over_the_file(cli, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"BATCH_SIZE": 4, "SEED": 7}')
    seen = []
    monkeypatch.setattr("fastseg.training.train", lambda config: seen.append(config) or pytest.fail("not reached"))
