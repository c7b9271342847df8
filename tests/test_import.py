"""`import fastseg` loads nothing heavy; each test of that comes with a proof that it can fail."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastseg
from tests.conftest import fields

ROOT = Path(__file__).parents[1]


def loaded_by(code: str, *modules: str, path: Path | None = None) -> set[str]:
    """The subset of `modules` that a new interpreter has loaded after running `code`."""
    report = f"import sys\nprint(*[name for name in {modules} if name in sys.modules])"
    places = [str(ROOT), *([str(path)] if path else [])]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_loads_neither_torch_nor_dali_nor_numba():
    assert loaded_by("import fastseg", "nvidia.dali", "numba", "torch", "fastseg") == {"fastseg"}


def test_configuration_pairs_and_command_line_load_none_of_them():
    code = "import fastseg\nfastseg.Config()\nfastseg.find_pairs\nimport fastseg.cli"
    assert loaded_by(code, "nvidia.dali", "numba", "torch", "fastseg.data.pairs") == {"fastseg.data.pairs"}


def test_numba_would_be_seen():
    assert loaded_by("import fastseg\nimport fastseg.data.gif", "nvidia.dali", "numba") == {"numba"}


def test_dali_would_be_seen(tmp_path):
    """With a fake package, because DALI is not installed everywhere; both may share the namespace `nvidia`."""
    (tmp_path / "nvidia" / "dali").mkdir(parents=True)
    (tmp_path / "nvidia" / "dali" / "__init__.py").touch()
    assert loaded_by("import fastseg\nimport nvidia.dali", "nvidia.dali", "numba", path=tmp_path) == {"nvidia.dali"}


def test_training_loads_neither_matplotlib_nor_kornia_before_they_are_needed():
    modules = ("matplotlib", "kornia", "torch")
    assert loaded_by("from fastseg.training.loop import train", *modules) == {"torch"}
    code = "from fastseg.training.loop import train\nimport kornia, matplotlib.figure"
    assert loaded_by(code, *modules) == {*modules}


def test_a_training_does_not_load_dynamo(pairs_dir, tmp_path):
    """Of either recipe, or of an outline refiner."""
    step = (
        "import torch, fastseg\nfrom fastseg.training.recipe import make_optimizer\n"
        "model = torch.nn.Linear(1, 1)\nmodel(torch.ones(1, 1)).sum().backward()\n"
        "for recipe in 'fast', 'tutorial':\n"
        "    optimizer = {}\n    optimizer.step()\n    optimizer.zero_grad()"
    )
    ours, theirs = "make_optimizer(fastseg.Config(recipe=recipe), model)", "torch.optim.Adam(model.parameters())"
    train = f"\nfastseg.train({fields(pairs_dir, tmp_path, refiner_steps=2, num_epochs=6)})"
    assert loaded_by(step.format(ours) + train, "torch._dynamo", "torch") == {"torch"}
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["outline_refiner"]["dice"]
    assert loaded_by(step.format(theirs), "torch._dynamo", "torch") == {"torch._dynamo", "torch"}


def test_every_public_name_is_there():
    for name in fastseg.__all__:
        assert getattr(fastseg, name).__name__ == name
    assert {"train", "Config", "OutputError"} <= {*fastseg.__all__} <= {*dir(fastseg)}
    with pytest.raises(AttributeError, match="trian"):
        _ = fastseg.trian


def test_no_module_has_the_name_of_a_public_name():
    """Importing `fastseg.export`, were it a module, would replace the function `fastseg.export`."""
    modules = {module.name for module in pkgutil.iter_modules(fastseg.__path__)}
    assert {"config", "data", "training"} <= modules
    assert not modules & {*fastseg.__all__}


def test_setuptools_can_read_the_version_without_an_import():
    (version,) = re.findall(r'^__version__ = "(.+)"$', Path(fastseg.__file__).read_text(), re.MULTILINE)
    assert version == fastseg.__version__
