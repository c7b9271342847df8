"""Small pairs that every test can afford, drawn with Pillow alone: coloured blobs on a textured wall."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.data.loader import _has_dali


def write_pair(folder: Path, name: str, width: int = 96, height: int = 64, seed: int = 0, mask: str = "gif") -> None:
    """One JPEG in folder/images and one exact mask in folder/masks; the blob's place and colour depend on seed."""
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
    """A small network as `best.pt`: random, but with statistics like those of a trained one."""
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
        with torch.no_grad():  # about half of the pixels foreground, most of them surely
            logits = model.eval()(torch.randn(4, 3, config.image_height, config.image_width))
            model.head.weight *= 2 / logits.std()
            model.head.bias.copy_((model.head.bias - logits.median()) * 2 / logits.std())
    save_checkpoint(path, {"config": config.model_dump(), "model": model.state_dict()})
    return path


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of 3 cars x 4 views, 96x64. Shared by all tests: not to be written to."""
    folder = tmp_path_factory.mktemp("pairs")
    for car in range(3):
        for view in range(4):
            write_pair(folder, f"car{car}_{view + 1:02d}", seed=10 * car + view)
    return folder


@pytest.fixture(scope="session")
def pairs(pairs_dir: Path) -> "fastseg.Pairs":
    return fastseg.find_pairs(pairs_dir / "images", pairs_dir / "masks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if not _has_dali():
        for item in items:
            if item.get_closest_marker("dali"):
                item.add_marker(pytest.mark.skip(reason="needs nvidia-dali-cuda120"))
