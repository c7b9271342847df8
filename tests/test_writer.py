"""The background writer of checkpoints: order, errors, and kill -9 at every stage of a write."""

import errno
import os
from pathlib import Path
from threading import Event

import pytest
import torch

import fastseg
from fastseg.network.checkpoint import load_checkpoint
from fastseg.training.writer import CheckpointWriter, copy_to_cpu
from tests.processes import run
from tests.test_training import config

# Child processes save generation after generation of two files, and each kills itself at another of its writer's calls.
KILLS = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from fastseg.network.checkpoint import load_checkpoint
from fastseg.training.writer import CheckpointWriter

torch.set_num_threads(1)
files = [Path(sys.argv[1], name) for name in ("best.pt", "last.pt")]
FIELDS = {"base_channels": 4, "depth": 2}
count = itertools.count(1)

def state(generation):
    return {"config": FIELDS, "model": {"weight": torch.full((50_000,), generation)}, "epoch": generation}

def save_generation(writer, generation):
    writer.save({path: state(generation) for path in files})

def killing_at(number):
    def point():
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(function):
        def call(*arguments):
            point()
            function(*arguments)
            point()
        return call
    def save_slowly(state, file, save=torch.save):
        file.write(b"half of a checkpoint")
        file.flush()
        point()
        file.seek(0)
        save(state, file)
    torch.save, os.fsync, os.replace = save_slowly, around(os.fsync), around(os.replace)

with CheckpointWriter() as writer:
    save_generation(writer, 0)
newest = 0
for number in range(1, 21):
    child = os.fork()
    if child == 0:
        killing_at(number)
        with CheckpointWriter() as writer:
            save_generation(writer, newest + 1)
            save_generation(writer, newest + 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, number
    best, last = map(load_checkpoint, files)
    for found in (best, last):
        assert (found["model"]["weight"] == found["epoch"]).all()
    # Each save is five calls per file: within the write, before and after the flush, before and after the rename.
    assert best["epoch"] - newest == (number >= 5) + (number >= 15), (number, newest, best["epoch"])
    assert last["epoch"] - newest == (number >= 10) + (number >= 20), (number, newest, last["epoch"])
    newest = best["epoch"]
    with CheckpointWriter() as writer:
        save_generation(writer, newest)
print("whole after", number, "kills")
"""


def state(value: float) -> dict:
    return {"config": {"base_channels": 4, "depth": 2}, "model": {"weight": torch.full((3,), value)}}


def value(path: Path) -> float:
    return load_checkpoint(path)["model"]["weight"][0].item()


def full_disk(state, file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_nine_at_every_stage_leaves_whole_files(tmp_path):
    done = run("-c", KILLS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "whole after 20 kills\n"


def test_two_saves_end_with_the_later_state(tmp_path):
    paths = [tmp_path / "best.pt", tmp_path / "last.pt"]
    with CheckpointWriter() as writer:
        for number in (1, 2):
            writer.save({path: state(number) for path in paths})
    assert [value(path) for path in paths] == [2, 2]


def test_the_state_is_that_of_the_call(tmp_path, monkeypatch):
    """Training changes the weights in place while the disk is slow, and the file holds those of the call."""
    may_write, save = Event(), torch.save

    def save_late(state, file):
        assert may_write.wait(60)
        save(state, file)

    monkeypatch.setattr(torch, "save", save_late)
    weights, path = state(1), tmp_path / "last.pt"
    with CheckpointWriter() as writer:
        writer.save({path: weights})
        weights["model"]["weight"].add_(1)
        weights["config"]["depth"] = 7
        assert not path.exists()
        may_write.set()
    assert value(path) == 1
    assert load_checkpoint(path)["config"]["depth"] == 2


def test_a_copy_has_the_same_values_strides_and_sharing():
    weight = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    copied = copy_to_cpu({Path("a"): {"w": weight, "list": [{1: weight, "n": None, "t": (0.9, 0.99)}]}})[0][Path("a")]
    assert copied["w"] is copied["list"][0][1]
    assert torch.equal(copied["w"], weight)
    assert copied["w"].stride() == weight.stride()
    assert copied["w"].data_ptr() != weight.data_ptr()
    assert not copied["w"].requires_grad
    assert (copied["list"][0]["n"], copied["list"][0]["t"]) == (None, (0.9, 0.99))


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_an_error_is_raised_once_in_the_training_thread(tmp_path, monkeypatch, when):
    path, refusal = tmp_path / "last.pt", pytest.raises(fastseg.OutputError, match=r"last\.pt: .*No space left.*room")
    writer = CheckpointWriter()
    writer.save({path: state(1)})
    writer.wait()
    monkeypatch.setattr(torch, "save", full_disk)
    writer.save({path: state(2)})
    if when == "at the next save":
        with refusal:
            writer.save({path: state(3)})
        with writer:
            pass
    else:
        with refusal, writer:
            pass
    assert value(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_an_error_does_not_hide_the_one_that_ends_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch, "save", full_disk)
    writer = CheckpointWriter()
    writer.save({tmp_path / "last.pt": state(1)})
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert "last.pt" in caplog.text
    assert "No space left" in caplog.text


def test_a_disk_that_fills_up_during_training_is_one_message(pairs_dir, tmp_path, monkeypatch, cli):
    settings = config(pairs_dir, tmp_path, num_epochs=4)
    settings.to_json(tmp_path / "config.json")
    save, calls = torch.save, []

    def fill_disk(state, file):
        calls.append(file)
        (save if len(calls) <= 2 else full_disk)(state, file)  # best.pt and last.pt of the first epoch

    monkeypatch.setattr(torch, "save", fill_disk)
    done = cli("train", "--config", tmp_path / "config.json")
    done.assert_refused(settings.run_dir, ".pt", "No space left", "room")
    assert load_checkpoint(settings.run_dir / "best.pt")["scores"]["epoch"] == 1
    assert load_checkpoint(settings.run_dir / "last.pt")["epoch"] == 1
    assert not [path for path in settings.run_dir.iterdir() if path.name.startswith(".")]
