"""Ranks that are killed, meet an error or are told to stop, under torchrun and its restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist

import fastseg
from fastseg.network.checkpoint import load_checkpoint
from fastseg.runtime import distributed
from fastseg.runtime.signals import stop_on_signal
from tests.conftest import ROOT, damage, write_pair
from tests.processes import run_ranks
from tests.test_distributed import FIELDS
from tests.test_training import same, weights

# The command line; the rank that writes kills itself once, at step 25, when last.pt of step 20 exists.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from threading import Thread
from fastseg.cli import main
from fastseg.training import loop

once, *arguments = sys.argv[1:]
step = loop.train_step

def train_step(run, images, masks):
    step(run, images, masks)
    if run.step == 25 and run.runtime.rank == 0 and not os.path.exists(once):
        Path(once).touch()
        while not (run.config.run_dir / "last.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

loop.train_step = train_step
main(arguments)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of 60 cars, an epoch of 30 steps. Read only."""
    folder = tmp_path_factory.mktemp("many")
    for car in range(60):
        write_pair(folder, f"car{car}_01", width=48, height=32, seed=car)
    return folder


def config(train: Path, val: Path, out: Path, **changes) -> fastseg.Config:
    folders = {
        f"{split}_{kind}_dir": str(data / part)
        for split, data in (("train", train), ("val", val))
        for kind, part in (("img", "images"), ("mask", "masks"))
    }
    return fastseg.Config(
        **{**FIELDS, **folders, "out_dir": str(out), "batch_size": 2, "checkpoint_every_s": 1e-9, **changes}
    )


def start(settings: fastseg.Config, *program: object, max_restarts: int = 0, **options) -> subprocess.Popen[str]:
    settings.to_json(Path(settings.out_dir, f"{settings.name}.json"))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(f"--max-restarts={max_restarts}", *map(str, program)),
            *("train", "--config", Path(settings.out_dir, f"{settings.name}.json")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **options,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Standard error of a process that ends; the status is in `returncode`."""
    _, err = process.communicate(timeout=600)
    assert str(ROOT / "fastseg") not in err  # torchrun ends with a traceback of its own
    return err


@pytest.fixture(scope="module")
def undisturbed(many, pairs_dir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks. Read only."""
    settings = config(many, pairs_dir, tmp_path_factory.mktemp("undisturbed"), checkpoint_every_s=0)
    settings.to_json(Path(settings.out_dir, "config.json"))
    ended = run_ranks(2, "-m", "fastseg", "train", "--config", Path(settings.out_dir, "config.json"))
    assert ended.returncode == 0, ended.stderr
    return settings.run_dir


def read_scores(run: Path) -> list[list[float]]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[entry[score] for score in ("epoch", "train_loss", "val_loss", "val_dice")] for entry in entries]


def assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert same(weights(first / name), weights(second / name))
    assert read_scores(first) == read_scores(second)
    assert not list(second.glob(".*"))  # neither temporary files nor a lock


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(many, pairs_dir, tmp_path, undisturbed):
    settings, program = config(many, pairs_dir, tmp_path), tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = start(settings, program, tmp_path / "once", max_restarts=2)
    err = finish(process)
    assert process.returncode == 0, err
    assert "exitcode: -9" in err
    assert err.count("resuming from") == 1
    assert "at epoch 1, step 20" in err
    assert_equal_runs(undisturbed, settings.run_dir)


def test_ctrl_c_saves_the_state(many, pairs_dir, tmp_path):
    """From a terminal the ranks receive it, and torchrun, which passes it to its ranks once more."""
    settings = config(many, pairs_dir, tmp_path, num_epochs=1000)
    process = start(settings, "-m", "fastseg", start_new_session=True)
    while not (settings.run_dir / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert "last.pt is saved" in err
    state = load_checkpoint(settings.run_dir / "last.pt")
    assert state["epoch"] < 1000


def test_ranks_ignore_a_second_signal(monkeypatch):
    """torchrun passes on a Ctrl-C that its ranks have received from the terminal already."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stops = []
    with stop_on_signal(lambda: stops.append(1)):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert len(stops) == 3


def test_a_broken_validation_file_of_any_rank_costs_no_training(many, data, tmp_path):
    """The second file of the validation set is the second rank's."""
    name = sorted(path.name for path in (data / "images").iterdir())[1]
    settings = config(many, data, tmp_path, check_data=False, num_epochs=1, checkpoint_every_s=0, batch_size=4)
    damage(f"images/{name}")(data)
    process = start(settings, "-m", "fastseg")
    err = finish(process)
    assert process.returncode != 0
    assert f"fastseg: {data / 'images' / name}: " in err
    assert "last.pt is saved" in err
    state = load_checkpoint(settings.run_dir / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 15)


def test_ranks_do_not_read_what_killed_ranks_have_left_in_the_store(monkeypatch):
    """torchrun keeps its store; in it one rank reads before the other has written."""
    store, results = dist.HashStore(), {}

    def join(rank: int) -> None:
        monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, rank, 2)]))
        results[rank] = distributed._join_store()[0]

    for start in range(3):
        results.clear()
        threads = []
        for rank in (start % 2, 1 - start % 2):
            threads.append(Thread(target=join, args=[rank]))
            threads[-1].start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(60)
        results[0].set("address", str(start))
        assert results[1].get("address") == str(start).encode()
        assert not results[0].check([f"address of {start - 1}"])
        results[1].set(f"address of {start}", "")
