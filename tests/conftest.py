"""Small pairs drawn with Pillow (coloured blobs on a textured wall), small checkpoints, and the command line."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.data.dali.choice import has_dali

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
    "refiner_steps": 0,
}


def write_pair(folder: Path, name: str, width: int = 96, height: int = 64, seed: int = 0, mask: str = "gif") -> None:
    """Write a JPEG to folder/images and its exact mask to folder/masks; `seed` decides the blob's place and colour."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre_x, centre_y = width * rng.uniform(0.35, 0.65), height * rng.uniform(0.4, 0.6)
    blob = ((x - centre_x) / (0.28 * width)) ** 2 + ((y - centre_y) / (0.25 * height)) ** 2 < 1
    wall = 150 + 30 * np.sin(x / 9)[..., None] + rng.normal(0, 4, (height, width, 3))
    paint = rng.integers(20, 110, 3) + 20 * np.sin(y / 5)[..., None]
    image = np.where(blob[..., None], paint, wall).clip(0, 255).astype(np.uint8)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / f"{name}.jpg", quality=90)
    Image.fromarray(blob).save(folder / "masks" / f"{name}_mask.{mask}")


def write_checkpoint(path: Path, seed: int = 3, **fields: object) -> Path:
    """Write a small random network whose activations have statistics like those of a trained one."""
    import torch

    from fastseg.network.checkpoint import build_model, save_checkpoint

    config = fastseg.Config(**{"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.3)
        with torch.no_grad():  # about half of the pixels are foreground, most with high certainty
            logits = model.eval()(torch.randn(4, 3, config.image_height, config.image_width))
            model.head.weight *= 2 / logits.std()
            model.head.bias.copy_((model.head.bias - logits.median()) * 2 / logits.std())
    save_checkpoint(path, {"config": config.model_dump(), "model": model.state_dict()})
    return path


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of 3 cars x 4 views, 96x64. Shared by all tests, so read only."""
    folder = tmp_path_factory.mktemp("pairs")
    for car in range(3):
        for view in range(4):
            write_pair(folder, f"car{car}_{view + 1:02d}", seed=10 * car + view)
    return folder


@pytest.fixture(scope="session")
def pairs(pairs_dir: Path) -> "fastseg.Pairs":
    return fastseg.find_pairs(pairs_dir / "images", pairs_dir / "masks")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    def assert_refused(self, subject: object, *words: str) -> None:
        """One error message in the last line, which begins with the file or field and holds the words in order."""
        assert self.status == 2, self
        assert "Traceback" not in self.err
        assert self.out == ""
        messages = [line for line in self.err.splitlines() if line.startswith("fastseg: ")]
        assert len(messages) == 1
        assert self.err.endswith(f"{messages[0]}\n")
        pattern = ".*".join(map(re.escape, (f"fastseg: {subject}", *words)))
        assert re.match(pattern, messages[0]), (pattern, messages[0])


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run the command line in this process, with its log on standard error as in a process of its own."""
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
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def flags(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def fields(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run that trains and validates on data/images and data/masks."""
    images, masks = str(data / "images"), str(data / "masks")
    folders = {"train_img_dir": images, "train_mask_dir": masks, "val_img_dir": images, "val_mask_dir": masks}
    return {**TINY, **folders, "out_dir": str(out / "runs"), **changes}


def files(folder: Path) -> dict[str, int]:
    """The files of a folder and their times, to see that none is written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """images/ and masks/ of 2 cars x 2 views that a test may damage."""
    for seed, name in enumerate(("car0_01", "car0_02", "car1_01", "car1_02")):
        write_pair(tmp_path, name, seed=seed)
    return tmp_path


@pytest.fixture(scope="module")
def trained(pairs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run. Read only."""
    return fastseg.train(fields(pairs_dir, tmp_path_factory.mktemp("trained"))).run_dir


@pytest.fixture(scope="session", autouse=True)
def _without_pictures() -> Iterator[None]:
    """Trainings draw nothing, which takes ten times as long as a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_overlay"):
            patch.setattr(f"fastseg.training.summary.{name}", lambda *arguments: None)
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    """Trainings draw their pictures after all."""
    with with_pictures():
        yield


@contextmanager
def with_pictures() -> Iterator[None]:
    from fastseg import plots

    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_overlay"):
            patch.setattr(f"fastseg.training.summary.{name}", getattr(plots, name))
        yield


def damage(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Replace a file's bytes, or cut it in the middle."""

    def damage_file(data: Path) -> None:
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) // 2] if content is None else content)

    return damage_file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if not has_dali():
        for item in items:
            if item.get_closest_marker("dali"):
                item.add_marker(pytest.mark.skip(reason="needs nvidia-dali-cuda120"))
