"""scripts/compile_kernels.py leaves nothing for the first command to compile, and caches that fail end no command."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from fastseg.runtime.kernels import njit
from tests.conftest import ROOT

COMMANDS = """
import sys
from pathlib import Path
import fastseg
from PIL import Image
from tests.conftest import TINY, write_pair

out = Path(sys.argv[1])
made = fastseg.generate(out / "cars", cars=2, views=4, width=240, height=160, progress=False)
folders = {
    f"{split}_{field}_dir": str(made[f"{split}_{kind}"])
    for split in ("train", "val")
    for field, kind in (("img", "images"), ("mask", "masks"))
}
run = fastseg.train({**TINY, **folders, "out_dir": str(out)})
fastseg.predict(run.run_dir / "best.pt", made["val_images"], out / "masks", device="cpu", refine="crf")
fastseg.evaluate(run.run_dir / "best.pt", made["val_images"], made["val_masks"], device="cpu")
for mask in ("gif", "png"):
    write_pair(out / mask, "car_01", mask=mask)
    fastseg.check(out / mask / "images", out / mask / "masks")
for kind in ("P", "RGB"):
    for format in ("png", "bmp"):
        folder = out / f"{kind}-{format}"
        write_pair(folder, "car_01", mask="png")
        path = folder / "masks" / "car_01_mask.png"
        Image.open(path).convert("L").convert(kind).save(path.with_suffix(f".{format}"))
        if format == "bmp":
            path.unlink()
        palette = {"wall": [0, 0, 0], "blob": [255, 255, 255]}
        config = fastseg.Config(classes=palette, ignore_value=-1)
        pairs = fastseg.find_pairs(folder / "images", folder / "masks")
        list(fastseg.Loader(pairs, height=16, width=24, batch_size=1, classes=config.classes, ignore_value=-1))
        fastseg.check(folder / "images", folder / "masks", classes=palette, ignore_value=-1)
"""


def kernels_of(*arguments: str | Path) -> tuple[set[str], set[str]]:
    """The files of kernels that a program and its processes load from numba's cache, and those that they compile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_DEBUG_CACHE": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    loaded, compiled = (re.findall(rf"data {action} .*?([^/']+\.nbc)", done.stdout) for action in ("loaded", "saved"))
    return set(loaded), set(compiled)


def test_the_commands_find_every_kernel_compiled(tmp_path):
    prepared = set.union(*kernels_of("scripts/compile_kernels.py"))
    loaded, compiled = kernels_of("-c", COMMANDS, tmp_path / "out")
    assert compiled == set()
    assert len(loaded) >= 8
    assert loaded <= prepared


@pytest.mark.parametrize("place", ["temporary", "none", "of another user"])
def test_kernels_compile_where_numba_can_write_no_cache(place, tmp_path):
    """No folder beside the source, none of the user's, and perhaps no safe temporary one."""
    (tmp_path / "kernel.py").write_text(
        "from fastseg.runtime.kernels import njit\n@njit(cache=True)\ndef double(x):\n    return 2 * x\n"
    )
    (tmp_path / "__pycache__").touch()  # a file, so that no folder of that name can be made, not even by root
    folder = tmp_path / f"fastseg-kernels-{os.getuid()}"
    if place == "none":
        folder.touch()
    elif place == "of another user":
        folder.mkdir()
        folder.chmod(0o777)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("NUMBA")},
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "/dev/null/cache",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
    }
    command = [sys.executable, "-c", "from kernel import double; print(double(21))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "42\n", done.stderr
    assert bool(folder.is_dir() and any(folder.iterdir())) == (place == "temporary")


@pytest.fixture
def call(tmp_path, monkeypatch) -> Callable[[], tuple[int, int]]:
    """Call a kernel as a new process would: its result, and how often it was found in the cache."""
    (tmp_path / "kernel.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    double = runpy.run_path(str(tmp_path / "kernel.py"))["double"]

    def call_new() -> tuple[int, int]:
        kernel = njit(cache=True)(double)
        return kernel(21), kernel.stats.cache_hits.total()

    return call_new


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros"])
def test_damaged_files_of_numbas_cache_are_replaced(call, tmp_path, suffix, damage):
    """As after a power failure."""
    assert call() == (42, 0)
    assert call() == (42, 1)
    (path,) = (tmp_path / "cache").rglob(f"*{suffix}")
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"empty": b"", "half": half, "zeros": half + bytes(len(half))}[damage])
    assert call() == (42, 0)
    assert call() == (42, 1)


def test_kernels_are_python_where_numba_compiles_nothing(monkeypatch):
    """With NUMBA_DISABLE_JIT, as debuggers and coverage need it."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert njit(cache=True)(lambda x: 2 * x)(21) == 42


def test_a_full_disk_costs_a_kernel_its_cache_only(call, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        assert call() == (42, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").rglob("*.nb*"))
    assert call() == (42, 0)
    assert call() == (42, 1)
