"""The examples of README.md and docs/ run as they are written, and the API page lists what is public.

Each page is one test: its examples build on one another, in a folder of the page's own that holds a small data set
(`data`, also as `photos` and `masks`), a trained network (`runs/carvana/best.pt`) and nothing else.
"""

import doctest
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_checkpoint, write_pair
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

import fastseg
from fastseg.network.outline.refiner import Refiner
from fastseg.training.outline import fit, patches
from fastseg.training.outline.patches import Patches
from fastseg.training.outline.train import train_refiner
from fastseg.training.state import Run

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of Carvana's size: three cars of two views to train, one to validate."""
    folder = tmp_path_factory.mktemp("examples")
    for part, cars in (("train", range(3)), ("val", range(3, 4))):
        for car in cars:
            for view in (1, 2):
                write_pair(folder / part, f"car{car}_{view:02d}", 1918, 1280, seed=10 * car + view)
        for kind in ("images", "masks"):
            shutil.move(folder / part / kind, folder / "data" / f"{part}_{kind}")
    shutil.copytree(folder / "data" / "train_images", folder / "photos")
    shutil.copytree(folder / "data" / "train_masks", folder / "masks")
    (folder / "runs" / "carvana").mkdir(parents=True)
    write_checkpoint(folder / "runs" / "carvana" / "best.pt", image_height=160, image_width=240)
    return folder


def train_refiner_briefly(refiner: Refiner, cut: Patches, run: Run, steps: int) -> None:
    train_refiner(refiner, cut, run, min(steps, 20))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_page(page: Path, example_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(example_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patches, "MAX_PATCHES", 64)
    monkeypatch.setattr(fit, "train_refiner", train_refiner_briefly)  # the default's 1200 steps take a minute
    parser = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    examples = list(Sybil([parser]).parse(page).examples())
    assert examples
    for example in examples:
        example.evaluate()


def test_api_page_lists_every_public_name():
    listed = set(re.findall(r"auto(?:function|class):: (\w+)(?=[(\n])", (ROOT / "docs" / "api.md").read_text()))
    errors = {name for name in fastseg.__all__ if name.endswith("Error")}  # docs/conf.py lists these
    assert listed == set(fastseg.__all__) - errors
