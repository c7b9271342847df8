"""`import fastseg` stays light; each guard here is also shown to see what it guards against."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastseg

ROOT = Path(__file__).parents[1]


def loaded_by(code: str, *modules: str, path: Path | None = None) -> set[str]:
    """Which of `modules` a fresh interpreter has loaded after running `code`."""
    report = f"import sys\nprint(*[name for name in {modules} if name in sys.modules])"
    places = [str(ROOT), *([str(path)] if path else [])]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_loads_neither_dali_nor_numba():
    assert loaded_by("import fastseg", "nvidia.dali", "numba", "torch", "fastseg") == {"fastseg"}


def test_configuration_and_pairs_load_neither():
    code = "import fastseg\nfastseg.Config()\nfastseg.find_pairs\nimport fastseg.cli"
    assert loaded_by(code, "nvidia.dali", "numba", "torch", "fastseg.data.pairs") == {"fastseg.data.pairs"}


def test_guard_sees_numba():
    assert loaded_by("import fastseg\nimport fastseg.data.gif", "nvidia.dali", "numba") == {"numba"}


def test_guard_sees_dali(tmp_path):
    """With a stand-in, because DALI is not installed everywhere; `nvidia` is a namespace that both may share."""
    (tmp_path / "nvidia" / "dali").mkdir(parents=True)
    (tmp_path / "nvidia" / "dali" / "__init__.py").touch()
    assert loaded_by("import fastseg\nimport nvidia.dali", "nvidia.dali", "numba", path=tmp_path) == {"nvidia.dali"}


def test_every_public_name_is_there():
    for name in fastseg.__all__:
        assert getattr(fastseg, name).__name__ == name
    assert {*fastseg.__all__} < {*dir(fastseg)}
    with pytest.raises(AttributeError, match="module 'fastseg' has no attribute 'trian'"):
        _ = fastseg.trian
