"""Two ranks against a single process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.runtime.distributed import local_batch_size, process_group
from fastseg.training.setup import resolve_config
from tests.conftest import write_pair
from tests.processes import Ended, Started, run_ranks

KINDS = (("img", "image"), ("mask", "mask"))
FIELDS = {
    "image_height": 32,
    "image_width": 48,
    "base_channels": 4,
    "refiner_steps": 0,
    "depth": 2,
    "batch_size": 4,
    "num_epochs": 2,
    "device": "cpu",
    "precision": "fp32",
    "val_img_dir": "",
    "val_fraction": 0.34,
    "ema_decay": 0.5,
}


def run_two(config: fastseg.Config, folder: Path) -> Ended:
    config.to_json(folder / "two.json")
    return run_ranks(2, "-m", "fastseg", "train", "--config", folder / "two.json")


@pytest.mark.parametrize(("micro_batch", "optimizer"), [(0, "adamw"), (1, "adamw"), (0, "muon")])
def test_two_processes_compute_what_one_does(pairs_dir, tmp_path, micro_batch, optimizer):
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    config = fastseg.Config(**FIELDS, **folders, out_dir=str(tmp_path), name="one", optimizer=optimizer)
    one = fastseg.train(config.replace(micro_batch=2 * micro_batch))  # one pair from each process
    finished = run_two(config.replace(name="two", micro_batch=micro_batch), tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("the run is in") == 1  # only rank 0 prints
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(one.history) == 2
    for line, entry in zip(map(json.loads, lines), one.history, strict=True):
        for score in ("train_loss", "val_loss", "val_dice", "val_iou", "val_dice_pixels"):
            assert line[score] == pytest.approx(entry[score], abs=1e-4), score
    assert json.loads((tmp_path / "two/summary.json").read_text())["processes"] == 2


def test_an_error_ends_all_ranks(pairs_dir, tmp_path):
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(tmp_path / "nowhere")}
    fastseg.Config(**FIELDS, **folders, out_dir=str(tmp_path / "runs")).to_json(tmp_path / "two.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastseg"]
    finished = subprocess.run(
        [*command, "train", "--config", tmp_path / "two.json"], capture_output=True, text=True, timeout=600
    )
    assert finished.returncode != 0
    assert f"fastseg: {tmp_path / 'nowhere'}: " in finished.stderr
    assert not (tmp_path / "runs").exists()


def test_the_batch_must_be_divisible_by_the_ranks():
    assert local_batch_size(16, 4) == 4
    with pytest.raises(fastseg.ConfigError, match=r"^batch_size: .*got 16.*15 or 18"):
        local_batch_size(16, 3)


def test_two_processes_share_fewer_pairs_than_the_batch_size(tmp_path):
    """Five pairs, a batch of 16 and two processes: steps of four pairs, as in one process with a batch of 4."""
    for car in range(5):
        write_pair(tmp_path, f"car{car}_01", seed=car)
    folders = {f"{split}_{kind}_dir": str(tmp_path / f"{name}s") for split in ("train", "val") for kind, name in KINDS}
    config = fastseg.Config(**{**FIELDS, **folders, "out_dir": str(tmp_path)})
    one = fastseg.train(config.replace(name="one", batch_size=4))
    finished = run_two(config.replace(name="two", batch_size=16), tmp_path)
    assert finished.returncode == 0, finished.stderr
    weights = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=1e-3, msg=key)
    assert len(one.history) == 2


def test_fewer_pairs_than_processes_are_refused():
    config = fastseg.Config(batch_size=16)
    assert resolve_config(config, num_pairs=15, world_size=2).batch_size == 14
    assert resolve_config(config, num_pairs=15, world_size=1).batch_size == 15
    with pytest.raises(fastseg.ConfigError, match=r"^batch_size: .*1 training pair.*2 processes"):
        resolve_config(config, num_pairs=1, world_size=2)


PROGRAM = """
import os, sys
import torch
from torch import nn
import fastseg

torch.manual_seed(int(os.environ.get("RANK", "0")))  # the first process decides the weights
network = nn.Sequential(
    nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 1, 1)
)
network.register_parameter("unused", nn.Parameter(torch.zeros(3)))  # as a classifier's head, which DDP must expect
fastseg.train(sys.argv[1], network=network)
"""


def run_program(program: str, config: fastseg.Config, folder: Path, processes: int) -> list[dict[str, float]]:
    """Run a program as ranks with the path of a configuration; the entries of its metrics.jsonl."""
    (folder / "program.py").write_text(program)
    config.to_json(folder / "config.json")
    finished = run_ranks(processes, folder / "program.py", folder / "config.json")
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_an_own_network_as_one_does(pairs_dir, tmp_path):
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    config = fastseg.Config(**FIELDS, **folders, out_dir=str(tmp_path), network="own")
    one, two = (run_program(PROGRAM, config.replace(name=str(count)), tmp_path, count) for count in (1, 2))
    for first, second in zip(one, two, strict=True):
        for score in ("train_loss", "val_loss", "val_dice"):
            assert second[score] == pytest.approx(first[score], abs=1e-4), score


def test_a_group_that_ends_does_not_wait_for_its_last_collective() -> None:
    """What holds Python's lock while it destroys a group of gloo hangs, about once in 60 times."""
    program = """
import gc
import torch
from fastseg.runtime import distributed
from fastseg.runtime.distributed import barrier, process_group, wrap_ddp

distributed._join_store = lambda: (torch.distributed.HashStore(), 0, 1)  # a group of one rank
gc.freeze()  # so that a collection takes a millisecond
for _ in range(400):
    with process_group("cpu"):
        network = wrap_ddp(torch.nn.Linear(2, 2), torch.device("cpu"))
        network(torch.ones(1, 2)).sum().backward()
        barrier()
    del network
    gc.collect()
"""
    assert Started("-c", program, env={"WORLD_SIZE": "2"}).wait(timeout=120).returncode == 0


@pytest.mark.parametrize(("local_rank", "device", "words"), [(2, "auto", "process 3 finds 2"), (1, "cuda:1", "cuda:1")])
def test_ranks_that_would_share_a_gpu_are_refused(local_rank, device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(fastseg.ConfigError, match=rf"^device: .*{words}"), process_group(device):
        pass
