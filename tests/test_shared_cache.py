"""The ranks on one machine share a cache: each file is opened once, and memory holds each row once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fields, write_pair

import fastseg
from fastseg import Pairs
from fastseg.data.caches.rows import STAMP_BYTES, Rows
from fastseg.data.caches.shared import RowsCache
from fastseg.data.host import HostDecoder
from tests.processes import run_ranks

KINDS = ["memory", "disk"]

TRAIN = """
import json, os, sys
from pathlib import Path
import fastseg
from fastseg.data import host, loader
from fastseg.training import summary

opened, read = [], host.read_file

def read_file(path):
    if Path(path).parent.name == "images":
        opened.append(Path(path).name)
    return read(path)

host.read_file = read_file
loader.verify_rows = summary.draw_overlay = lambda *_: None  # which open some files a second time
fastseg.train(sys.argv[1])
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(opened))
"""

READ = """
import os, sys
from pathlib import Path
import fastseg
from fastseg.data import loader
from fastseg.runtime.distributed import barrier, get_rank, get_world_size, process_group

images, masks, kind, out, height, width, kill = sys.argv[1:]
loader.verify_rows = lambda *_: None
def pss():
    # KiB of the cache's mapping, shared pages divided by the number of processes; and of all mappings
    name, cache, total = "", 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            name = rest[4] if len(rest) > 4 else ""
        elif first == "Pss:":
            total += int(rest[0])
            cache += int(rest[0]) * (".fastseg" in name or "fastseg-cache" in name)
    return cache, total

with process_group("cpu"):
    pairs = fastseg.find_pairs(images, masks)
    settings = {"height": int(height), "width": int(width), "num_workers": 1, "decoder": "host", "cache_dir": out}
    settings |= {"rank": get_rank(), "world_size": get_world_size(), "batch_size": 4}
    loader = fastseg.Loader(pairs, cache=kind, **settings)
    for epoch in range(4):
        sums = {int(i): int(pixels.sum()) for images, _, indices in loader for i, pixels in zip(indices, images)}
        barrier()
    cache, total = pss()
    barrier()
    Path(out, f"{get_rank()}.txt").write_text(f"{cache} {total} {len(sums)}")
    if kill == "kill":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_open_each_file_once(pairs_dir: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"num_epochs": 5, "cache": kind, "cache_dir": str(tmp_path / "cache"), "num_workers": 1}
    options |= {"val_img_dir": "", "val_fraction": 0.34, "decoder": "host", "check_data": False}
    config = fastseg.Config(**fields(pairs_dir, tmp_path, **options))
    one = fastseg.train(config.replace(cache="off", name="one"))
    config.replace(name="two").to_json(tmp_path / "two.json")
    finished = run_ranks(2, "-c", TRAIN, tmp_path / "two.json", tmp_path)
    assert finished.returncode == 0, finished.stderr
    opened = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert sorted(opened[0] + opened[1]) == sorted(path.name for path in (pairs_dir / "images").iterdir())
    assert opened[0]
    assert opened[1]
    lines = (config.replace(name="two").run_dir / "metrics.jsonl").read_text().splitlines()
    for line, entry in zip(map(json.loads, lines), one.history, strict=True):
        assert line["train_loss"] == pytest.approx(entry["train_loss"], abs=1e-4)
    if kind == "disk":
        assert all(path.suffix == ".fastseg" for path in (tmp_path / "cache").iterdir())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's proportional set size")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_processes_holds_one_cache(tmp_path: Path, kind: str) -> None:
    for number in range(32):
        write_pair(tmp_path, f"car{number}_01", 24, 16, seed=number)
    arguments = (tmp_path / "images", tmp_path / "masks", kind, tmp_path, 320, 640, "")
    finished = run_ranks(2, "-c", READ, *arguments)
    assert finished.returncode == 0, finished.stderr
    found = [list(map(int, path.read_text().split())) for path in sorted(tmp_path.glob("[01].txt"))]
    assert sum(count for *_, count in found) == 32
    size = 32 * 320 * 640 * 4 / 1024
    assert all(cache > 0.4 * size for cache, *_ in found)
    assert 0.95 * size < sum(cache for cache, *_ in found) < 1.1 * size


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_behind_a_killed_pair(pairs_dir: Path, tmp_path: Path, kind: str) -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    arguments = (pairs_dir / "images", pairs_dir / "masks", kind, tmp_path, 320, 640, "kill")
    assert run_ranks(2, "-c", READ, *arguments).returncode != 0
    assert set(map(str, shared.iterdir() if shared.exists() else ())) <= set(map(str, before))
    assert [path.suffix for path in tmp_path.glob("*.fastseg*")] == ([".fastseg"] if kind == "disk" else [])


def test_a_row_whose_pixels_do_not_match_its_checksum_is_decoded_again(pairs: Pairs) -> None:
    """As when a processor shows the stamp of another process before the pixels."""
    rows, path = Rows.in_memory((len(pairs), 16, 24))
    stamps = np.ones((len(pairs), STAMP_BYTES), np.uint8)
    writer = RowsCache(rows, stamps)
    mapped = Rows.open(path, (len(pairs), 16, 24), shared=True)
    assert mapped is not None
    reader = RowsCache(mapped, stamps)
    batches = [np.arange(6), np.arange(6, 12)]
    for batch in HostDecoder(pairs, 16, 24).decode(batches):
        writer.put(batch)
    rows.images[3, 5] = 0
    reader.refresh()
    assert reader.filled.all()
    assert [reader.find_damaged(indices).tolist() for indices in batches] == [[3], []]
    assert np.flatnonzero(~reader.filled).tolist() == [3]
    for batch in HostDecoder(pairs, 16, 24).decode([np.array([3])]):
        reader.put(batch)
    assert writer.gather(np.arange(12)).images.equal(reader.gather(np.arange(12)).images)
    assert writer.rows.is_intact(3)
