"""Checkpoints within an epoch, every `checkpoint_every_s` seconds."""

import itertools
import math
import signal
import time
from threading import Event
from types import SimpleNamespace

import pytest
import torch

import fastseg
from fastseg.network.checkpoint import load_checkpoint
from fastseg.training import interval
from fastseg.training.writer import CheckpointWriter
from tests.test_resume import run_with_signal
from tests.test_training import config, same, weights

ALWAYS = 1e-9  # seconds


@pytest.fixture
def saves(monkeypatch):
    """The position of each `last.pt` that a run starts to write: epoch, step, and whether it is within an epoch."""
    found, save = [], CheckpointWriter.save

    def record(writer, states, **options):
        (state,) = (state for path, state in states.items() if path.name == "last.pt")
        found.append((state["epoch"], state["step"], bool(options)))
        save(writer, states, **options)
        writer.wait()

    monkeypatch.setattr(CheckpointWriter, "save", record)
    return found


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9, "cache": "off"}])
def test_a_run_killed_within_an_epoch_resumes_within_it(pairs_dir, tmp_path, changes):
    settings = config(pairs_dir, tmp_path, name="killed", checkpoint_every_s=ALWAYS, **changes)
    whole = fastseg.train(settings.replace(name="whole", checkpoint_every_s=0))
    done = run_with_signal("SIGKILL", "batch", 4, settings, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = load_checkpoint(settings.run_dir / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 1)
    resumed = fastseg.train(settings)
    for name in ("last.pt", "best.pt"):
        assert same(weights(whole.run_dir / name), weights(resumed.run_dir / name))
    assert [entry["train_loss"] for entry in resumed.history] == [entry["train_loss"] for entry in whole.history]


def test_zero_saves_only_after_epochs(pairs_dir, tmp_path, saves):
    fastseg.train(config(pairs_dir, tmp_path, checkpoint_every_s=0))
    assert saves == [(1, 0, False), (2, 0, False)]
    saves.clear()
    fastseg.train(config(pairs_dir, tmp_path, name="often", checkpoint_every_s=ALWAYS))
    assert saves == [(0, 1, True), (0, 2, True), (1, 0, False), (1, 1, True), (1, 2, True), (2, 0, False)]


def test_seconds_count_from_the_last_save(pairs_dir, tmp_path, saves, monkeypatch):
    """By a clock that advances by 1000 s whenever it is read: once per step, three times per save."""
    settings = config(pairs_dir, tmp_path, batch_size=1, num_epochs=1, checkpoint_every_s=2500)
    began, readings = time.perf_counter(), itertools.count(1)

    class Time:
        perf_counter = staticmethod(lambda: began + 1000.0 * next(readings))

    monkeypatch.setattr("fastseg.training.interval.time", Time)
    monkeypatch.setattr("fastseg.training.state.time", Time)
    fastseg.train(settings)
    within = [step for _, step, is_within in saves if is_within]
    assert within == [3, 5, 7]


def test_training_does_not_wait_for_a_slow_disk(pairs_dir, tmp_path, monkeypatch):
    """While a checkpoint is being written, no other one within the epoch is begun."""
    may_write, save, started = Event(), torch.save, []

    def save_slowly(state, file):
        started.append((state["epoch"], state.get("step")))
        assert may_write.wait(60)
        save(state, file)

    monkeypatch.setattr(torch, "save", save_slowly)
    monkeypatch.setattr("fastseg.training.loop.validate", lambda run: may_write.set() or finish(run))

    def finish(run):
        run.epoch, run.step = run.epoch + 1, 0
        run.history[-1].update(val_dice=0.5, val_iou=0.5, epoch_seconds=0.0, val_size=run.config.image_height)

    monkeypatch.setattr("fastseg.training.loop.warn_of_black_masks", lambda run: None)
    monkeypatch.setattr("fastseg.training.loop.summarise", lambda run, left_out: None)
    fastseg.train(config(pairs_dir, tmp_path, batch_size=1, num_epochs=1, checkpoint_every_s=ALWAYS))
    assert started == [(0, 1)]


@pytest.mark.parametrize("where", ["model", "ema_model", "loss_sum"])
def test_no_checkpoint_within_an_epoch_is_infinite_or_nan(tmp_path, where):
    path, bad = tmp_path / "last.pt", torch.tensor([1.0, math.inf])
    state = {"config": {"base_channels": 4, "depth": 2}, "model": {"w": torch.ones(2)}, "ema_model": None}
    state["loss_sum"] = torch.zeros(())
    with CheckpointWriter() as writer:
        writer.save({path: state}, if_finite=True)
    before = path.read_bytes()
    with CheckpointWriter() as writer:
        writer.save({path: {**state, where: bad if where == "loss_sum" else {"w": bad}}}, if_finite=True)
    assert path.read_bytes() == before


def test_checkpoint_every_s_is_not_negative():
    with pytest.raises(fastseg.ConfigError, match=r"^checkpoint_every_s: .*-1"):
        fastseg.Config(checkpoint_every_s=-1)


def test_ranks_agree_across_epochs_of_few_steps(monkeypatch):
    """An epoch of 7 steps has no step 20; the run has."""
    run = SimpleNamespace(stop_requested=True, interrupted=False, step=6, runtime=SimpleNamespace(rank=1, world_size=2))
    run.runtime.device = torch.device("cpu")
    monkeypatch.setattr(interval, "all_reduce", lambda flags: flags)
    for run.steps_done in (19, 20):
        interval.stop_or_save(run)
        assert run.interrupted == (run.steps_done == 20)
