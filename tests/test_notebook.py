"""scripts/main.ipynb runs from top to bottom, its masks have the printed Dice, and its committed outputs are clean."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

ROOT = Path(__file__).parents[1]
QUICK = "CARS, VIEWS = 4, 2\nCHANNELS = 8\nSTEPS = 48\nREFINER_STEPS = 10"  # 6 training pairs, 2 validation pairs
ABSOLUTE_PATH = re.compile(r"(?<![\w./~-])/[\w.-]+/|\b[A-Z]:\\")


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(ROOT / "scripts" / "main.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(committed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook after a run with fewer pairs and steps, and its working directory."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.from_dict(committed)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source = QUICK
    # Without kernel directories the kernel is the running Python, not another one that the user has installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))  # without the user's start-up files
        client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute(cleanup_kc=True)  # raises the error of a cell; ends the kernel
    return notebook, folder


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: Any) -> list[str]:
    """All printed text, and the text that stands for pictures."""
    found = []
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        found += [output.get("text", ""), *output.get("traceback", ())]
        found += [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def pictures(cell: Any) -> list[str]:
    """The pictures of a cell, base64."""
    shown = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return [data for bundle in shown for kind, data in bundle.items() if kind.startswith("image/")]


def problems(notebook: Any) -> list[str]:
    """Errors, output on standard error, and warnings, which rich moves to standard output while a bar is shown."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    found = [str(output) for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return found + [text for text in texts(notebook) if "Warning" in text]


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("L")) > 127


def test_masks_have_the_photos_size_and_the_printed_dice(executed):
    notebook, folder = executed
    dice = []
    for photo in sorted((folder / "data" / "val_images").iterdir()):
        true = read_mask(folder / "data" / "val_masks" / f"{photo.stem}_mask.gif")
        found = read_mask(folder / "runs" / "notebook" / "masks" / f"{photo.stem}_mask.png")
        with Image.open(photo) as picture:
            assert found.shape == (picture.height, picture.width)
        dice.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert len(dice) == 2
    (printed,) = re.findall(r"full size: +Dice ([\d.]+)", "\n".join(texts(notebook)))
    assert np.mean(dice) > 0.85  # all foreground: 0.35
    assert float(printed) == pytest.approx(np.mean(dice), abs=1e-3)


def test_predicted_classes_have_the_printed_iou(executed):
    notebook, folder = executed
    masks = []
    for path in sorted((folder / "data" / "parts" / "val_masks").iterdir()):
        predicted = folder / "runs" / "notebook-parts" / "masks" / path.name
        masks.append([np.asarray(Image.open(file)) for file in (path, predicted)])
    assert len(masks) == 1
    true, predicted = (torch.from_numpy(np.stack(some)) for some in zip(*masks, strict=True))
    expected = multiclass_jaccard_index(predicted, true, num_classes=6)
    (printed,) = re.findall(r"mean {5}IoU ([\d.]+)", "\n".join(texts(notebook)))
    assert float(printed) == pytest.approx(expected.item(), abs=1e-3)


def test_every_cell_shows_as_many_pictures_as_committed(executed, committed):
    notebook, _ = executed
    shown = [pictures(cell) for cell in code_cells(notebook)]
    assert [len(one) for one in shown] == [len(pictures(cell)) for cell in code_cells(committed)]
    for data in (data for one in shown for data in one):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array(picture.convert("L")).std() > 10
            assert picture.width <= 1300
    assert sum(map(len, shown)) == 9


def test_no_errors_and_no_warnings(executed, committed):
    assert problems(executed[0]) == []
    assert problems(committed) == []


def test_committed_outputs_are_of_one_run_in_order(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert (ROOT / "scripts" / "main.ipynb").stat().st_size < 1e6


def test_committed_outputs_have_no_absolute_paths(committed):
    assert ABSOLUTE_PATH.search("see /home/me/data")
    assert ABSOLUTE_PATH.search("'/tmp/x'")
    assert ABSOLUTE_PATH.search(r"C:\Users")
    assert len("".join(texts(committed))) > 1000
    assert [text for text in texts(committed) if ABSOLUTE_PATH.search(text) or "Traceback" in text] == []


def test_committed_notebook_runs_with_any_python3_kernel(committed):
    nbformat.validate(committed)
    assert committed.metadata.kernelspec.name == "python3"
