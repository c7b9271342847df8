"""The Ray Data job of docs/distributed.md, on a local cluster of two workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint, write_pair
from PIL import Image

import fastseg

ray = pytest.importorskip("ray", reason="needs ray[data]")
ROOT = Path(__file__).parents[1]

CLUSTER = """
import ray
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
"""


def test_job_of_the_page_writes_the_masks_of_the_network(tmp_path: Path) -> None:
    for seed in range(20):
        write_pair(tmp_path, f"car{seed}_01", 120, 80, seed=seed)
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    job = re.search(r"```py\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), re.DOTALL)[1]
    replaced = {
        "s3://bucket/photos": str(tmp_path / "images"),
        "s3://bucket/masks": str(tmp_path / "predicted"),
        "/shared/runs/carvana/best.pt": str(checkpoint),
        '"cuda", 2': '"cpu", 2',
    }
    for text, other in replaced.items():
        assert text in job
        job = job.replace(text, other)
    (tmp_path / "job.py").write_text(CLUSTER + job)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}  # a socket's path has a limit
    command = [sys.executable, str(tmp_path / "job.py")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr

    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "predicted").to_pylist()
    segmenter = fastseg.load(checkpoint)
    assert {Path(row["path"]).name for row in rows} == {f"car{seed}_01.jpg" for seed in range(20)}
    for row in rows:
        with Image.open(row["path"]) as photo:
            image = np.asarray(photo.convert("RGB").resize((48, 32), Image.Resampling.BOX))
        with torch.inference_mode():
            expected = segmenter(torch.from_numpy(image.copy())[None])[0].numpy()
        assert row["foreground"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert (np.array(row["mask"], bool).reshape(32, 48) != (expected > 0.5)).mean() < 0.01
