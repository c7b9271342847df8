"""scripts/compile_kernels.py leaves nothing for the first command to compile."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# In a process of its own, because a kernel that this process has loaded is not looked up in the cache again.
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


def run_python(*arguments: str | Path, cache: Path) -> set[str]:
    """Run a script with another cache for numba; returns the names of the kernels' files in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return {file.name for file in cache.rglob("*.nbc")}


def test_the_commands_find_every_kernel_compiled(tmp_path):
    cache = tmp_path / "cache"
    compiled = run_python("scripts/compile_kernels.py", cache=cache)
    assert len(compiled) >= 8
    assert run_python("-c", COMMANDS, tmp_path / "out", cache=cache) == compiled
