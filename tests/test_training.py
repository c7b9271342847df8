"""Whole runs on small pairs: accuracy, files, determinism and refusals."""

import errno
import itertools
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.network.checkpoint import init_model
from fastseg.runtime.device import Runtime
from fastseg.training import loop, summary
from fastseg.training.loop import train_step
from fastseg.training.setup import choose_batch_size, find_splits, resolve_config
from tests.conftest import TINY, fields, write_pair

SMALL = {**TINY, "precision": "auto"}
DIRS = {"val_img_dir": "", "val_fraction": 0.34}  # of 12 pairs 8 train: an epoch of 2 steps


def config(pairs_dir: Path, out: Path, **changes) -> fastseg.Config:
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    return fastseg.Config(**{**SMALL, **DIRS, **folders, "out_dir": str(out), "num_epochs": 2, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_overfits_four_pairs(tmp_path):
    """The default network with 8 channels, validated on its four training pairs."""
    for car in range(4):
        write_pair(tmp_path, f"car{car}_01", width=480, height=320, seed=car)
    folders = {"img_dir": str(tmp_path / "images"), "mask_dir": str(tmp_path / "masks")}
    result = fastseg.train(
        {
            **{f"{split}_{kind}": path for split in ("train", "val") for kind, path in folders.items()},
            "base_channels": 8,
            "batch_size": 4,
            "num_epochs": 36,
            "refiner_steps": 0,
            "device": "cpu",
            "out_dir": str(tmp_path / "runs"),
        }
    )
    assert result.val_dice >= 0.99
    again = fastseg.evaluate(result.run_dir / "best.pt", **folders, device="cpu")
    assert again["dice"] == pytest.approx(result.val_dice, abs=1e-6)


def test_same_seed_same_losses(pairs_dir, tmp_path):
    seeds = {"first": 0, "again": 0, "other": 1}
    runs = [fastseg.train(config(pairs_dir, tmp_path, name=name, seed=seed)) for name, seed in seeds.items()]
    losses = [[entry["train_loss"] for entry in run.history] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert same(weights(tmp_path / "first/last.pt"), weights(tmp_path / "again/last.pt"))


@pytest.mark.usefixtures("pictures")
def test_a_run_writes_its_files(pairs_dir, tmp_path):
    result = fastseg.train(config(pairs_dir, tmp_path, name="full"))
    expected = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "overlay.png", "best.pt", "last.pt"}
    assert {path.name for path in result.run_dir.iterdir()} == expected
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: line["val_dice"])
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["val_dice"] == best["val_dice"] == result.val_dice
    assert summary["best_epoch"] == best["epoch"]
    assert {"val_iou", "pairs_per_s", "seconds", "device", "versions"} <= summary.keys()
    assert fastseg.Config.from_json(result.run_dir / "config.json") == config(
        pairs_dir, tmp_path, name="full", optimizer="muon"
    )
    for name in ("curves.png", "overlay.png"):
        assert np.asarray(Image.open(result.run_dir / name).convert("L")).std() > 10


def test_weights_load_into_a_plain_network(pairs_dir, tmp_path):
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    fastseg.UNet(4, 2).load_state_dict(weights(result.run_dir / "best.pt"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_file_that_cannot_be_written_is_named(pairs_dir, tmp_path, name):
    settings = config(pairs_dir, tmp_path, num_epochs=1)
    settings.run_dir.joinpath(name).mkdir(parents=True)
    with pytest.raises(fastseg.OutputError, match=f"{name}: .*place"):
        fastseg.train(settings)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", ["curves.png", "overlay.png"])
def test_a_picture_that_cannot_be_written_is_a_warning(pairs_dir, tmp_path, name, caplog):
    settings = config(pairs_dir, tmp_path, num_epochs=1, tensorboard=True)
    settings.run_dir.joinpath(name).mkdir(parents=True)
    result = fastseg.train(settings)
    assert f"{name}: cannot be written" in caplog.text
    assert (result.run_dir / "summary.json").exists()


def test_metrics_that_cannot_be_written_come_after_the_checkpoint(pairs_dir, tmp_path, monkeypatch):
    """The disk is full when the first epoch's line is written."""
    settings = config(pairs_dir, tmp_path, num_epochs=2)

    def write_to_a_full_disk(entry):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(summary, "_json_line", write_to_a_full_disk)
        with pytest.raises(fastseg.OutputError, match=r"metrics\.jsonl: .*No space"):
            fastseg.train(settings)
    assert torch.load(settings.run_dir / "last.pt", weights_only=True)["epoch"] == 1
    assert len(fastseg.train(settings).history) == 2


def test_a_broken_validation_file_costs_no_trained_epoch(pairs_dir, tmp_path, monkeypatch):
    """It is met after the first epoch's training; once it is mended, the run resumes there."""
    for path in [*pairs_dir.glob("images/*"), *pairs_dir.glob("masks/*")]:
        for part in ("train", "val"):
            target = tmp_path / part / path.relative_to(pairs_dir)
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(path.read_bytes())
    folders = {
        f"{part}_{kind}_dir": str(tmp_path / part / f"{name}s")
        for part in ("train", "val")
        for kind, name in (("img", "image"), ("mask", "mask"))
    }
    settings = config(pairs_dir, tmp_path, check_data=False, **folders)
    whole = fastseg.train(settings.replace(name="whole"))
    broken = tmp_path / "val" / "images" / "car1_02.jpg"
    data = broken.read_bytes()
    broken.write_bytes(data[:2000])
    with pytest.raises(fastseg.DataError, match=r"car1_02\.jpg"):
        fastseg.train(settings)
    state = torch.load(settings.run_dir / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"], state["history"]) == (0, 3, [])
    broken.write_bytes(data)
    trained = []
    monkeypatch.setattr(loop, "train_step", lambda run, *batch: (trained.append(run.epoch), train_step(run, *batch)))
    resumed = fastseg.train(settings)
    assert trained == [1, 1, 1]
    assert same(weights(whole.run_dir / "last.pt"), weights(resumed.run_dir / "last.pt"))
    assert [entry["train_loss"] for entry in resumed.history] == [entry["train_loss"] for entry in whole.history]


@pytest.mark.usefixtures("pictures")
def test_the_overlay_skips_bad_files_that_an_earlier_process_has_found(pairs_dir, tmp_path):
    for path in [*pairs_dir.glob("images/*"), *pairs_dir.glob("masks/*")]:
        target = tmp_path / path.relative_to(pairs_dir)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "images/car0_01.jpg").write_bytes(b"")
    validation = {"val_img_dir": str(tmp_path / "images"), "val_mask_dir": str(tmp_path / "masks")}
    changes = {"bad_samples": "skip", "check_data": False, "num_epochs": 1, **validation}
    first = fastseg.train(config(pairs_dir, tmp_path / "runs", **changes))
    (first.run_dir / "overlay.png").unlink()
    again = fastseg.train(config(pairs_dir, tmp_path / "runs", **changes))  # has nothing left to train or to score
    assert (again.run_dir / "overlay.png").exists()


def test_skipped_files_are_named_and_counted(pairs_dir, tmp_path, caplog):
    for path in [*pairs_dir.glob("images/*"), *pairs_dir.glob("masks/*")]:
        target = tmp_path / path.relative_to(pairs_dir)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "images/car0_01.jpg").write_bytes(b"")
    truncated = (tmp_path / "masks/car1_02_mask.gif").read_bytes()[:200]
    (tmp_path / "masks/car1_02_mask.gif").write_bytes(truncated)
    validation = {"val_img_dir": str(pairs_dir / "images"), "val_mask_dir": str(pairs_dir / "masks")}
    with pytest.raises(fastseg.DataError, match=r"2 of 24 pairs.*bad_samples"):
        fastseg.train(config(tmp_path, tmp_path / "runs", **validation))
    assert not (tmp_path / "runs").exists()
    result = fastseg.train(config(tmp_path, tmp_path / "runs", bad_samples="skip", **validation))
    bad = json.loads((result.run_dir / "summary.json").read_text())["bad_samples"]
    assert bad == {"count": 2, "images": ["car0_01.jpg", "car1_02.jpg"]}
    assert "car1_02_mask.gif" in caplog.text


def test_min_steps_applies_only_if_num_epochs_is_not_given(pairs_dir, tmp_path):
    asked = fastseg.train(config(pairs_dir, tmp_path, name="asked", num_epochs=1))
    assert len(asked.history) == 1
    fields = config(pairs_dir, tmp_path, name="free", min_steps=9).model_dump(exclude={"num_epochs"})
    free = fastseg.train(fields)
    assert len(free.history) == 5  # 8 pairs, 2 steps an epoch, at least 9 steps
    assert json.loads((free.run_dir / "config.json").read_text())["num_epochs"] == 5


def test_batches_have_8_pairs_on_a_cpu_unless_a_size_is_given(pairs_dir, tmp_path):
    settings = {name: value for name, value in fields(pairs_dir, tmp_path).items() if name != "batch_size"}
    result = fastseg.train({**settings, "name": "first"})
    assert json.loads((result.run_dir / "config.json").read_text())["batch_size"] == 8
    asked = fastseg.train({**settings, "name": "asked", "batch_size": 5})
    resumed = fastseg.train({**settings, "name": "asked", "num_epochs": 2})  # keeps that of last.pt
    for run in (asked, resumed):
        assert json.loads((run.run_dir / "config.json").read_text())["batch_size"] == 5
    assert len(resumed.history) == 2


@pytest.mark.parametrize(
    ("device", "world_size", "recipe", "size"),
    [
        ("cpu", 1, "fast", 8),
        ("cpu", 3, "fast", 6),
        ("cpu", 16, "fast", 16),
        ("cpu", 1, "tutorial", 16),
        ("cuda", 3, "fast", 15),
    ],
)
def test_default_batch_size(device, world_size, recipe, size):
    runtime = Runtime(torch.device(device), torch.float32, world_size=world_size)
    assert choose_batch_size(fastseg.Config(recipe=recipe), runtime, None) == size
    assert choose_batch_size(fastseg.Config(batch_size=32), runtime, None) == 32
    assert choose_batch_size(fastseg.Config(), runtime, {"config": {}}) == choose_batch_size(
        fastseg.Config(), runtime, None
    )
    state = {"config": {"batch_size": 3 * world_size}}
    assert choose_batch_size(fastseg.Config(), runtime, state) == 3 * world_size
    with pytest.raises(fastseg.ConfigError, match=r"^batch_size: "):
        choose_batch_size(fastseg.Config(), runtime, {"config": {"batch_size": -8}})


def test_a_batch_of_the_checkpoint_that_the_processes_cannot_share_is_refused():
    runtime = Runtime(torch.device("cpu"), torch.float32, world_size=3)
    with pytest.raises(fastseg.ConfigError, match=r"^batch_size: .*3 processes.*got 8. Use 6 or 9"):
        choose_batch_size(fastseg.Config(), runtime, {"config": {"batch_size": 8}})


@pytest.mark.parametrize(
    ("batch_size", "num_pairs", "epochs"), [(16, 192, 20), (8, 192, 20), (32, 192, 40), (8, 4, 480), (8, 5088, 3)]
)
def test_a_run_whose_length_nobody_has_set_has_240_steps_and_3840_pairs(batch_size, num_pairs, epochs):
    assert resolve_config(fastseg.Config(batch_size=batch_size), num_pairs).num_epochs == epochs


def test_a_loss_that_is_not_finite_ends_the_run(pairs_dir, tmp_path):
    with pytest.raises(fastseg.FastsegError, match=r"^learning_rate: the loss became (nan|inf) .*1e\+20.*precision"):
        fastseg.train(config(pairs_dir, tmp_path, learning_rate=1e20, recipe="tutorial", num_epochs=9))


def test_the_callers_random_state_does_not_change(pairs_dir, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_after_epoch_sees_each_epoch_and_ends_the_run(pairs_dir, tmp_path):
    seen = []

    def after_epoch(entry):
        seen.append(entry)
        return entry["epoch"] == 2

    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=5), after_epoch=after_epoch)
    assert seen == result.history
    assert [entry["epoch"] for entry in seen] == [1, 2]
    assert not result.interrupted


@pytest.mark.usefixtures("pictures")
def test_tensorboard_shows_the_numbers_of_metrics_jsonl(pairs_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fastseg.train(config(pairs_dir, tmp_path, tensorboard=True))
    events = EventAccumulator(str(result.run_dir))
    events.Reload()
    read = [event.value for event in events.Scalars("val/dice")]
    assert read == pytest.approx([entry["val_dice"] for entry in result.history], rel=1e-6)
    assert [event.step for event in events.Scalars("run/pairs_per_s")] == [1, 2]
    shown = events.Images("overlay")[-1]
    with Image.open(result.run_dir / "overlay.png") as overlay:
        assert (shown.width, shown.height) == overlay.size


def test_missing_tensorboard_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fastseg.ConfigError, match=r"^tensorboard: .*fastseg-dali\[tensorboard\].*tensorboard=false"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, tensorboard=True))
    assert not any(tmp_path.iterdir())


def test_runs_in_two_threads_equal_runs_one_after_the_other(pairs_dir, tmp_path, monkeypatch):
    settings = [config(pairs_dir, tmp_path, name=f"seed{seed}", seed=seed, num_epochs=1) for seed in (0, 1)]
    alone = [weights(fastseg.train(one).run_dir / "last.pt") for one in settings]
    seed, both_seeded = torch.manual_seed, threading.Barrier(2)

    def seed_and_wait(number):  # a thread must not draw from the generator that the other one has seeded
        seed(number)
        both_seeded.wait(10)

    monkeypatch.setattr(torch, "manual_seed", seed_and_wait)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(fastseg.train, [one.replace(name=f"{one.name}t") for one in settings]))
    for before, result in zip(alone, together, strict=True):
        assert same(before, weights(result.run_dir / "last.pt"))


def test_first_weights_are_those_of_torchs_modules_and_leave_its_generator_alone():
    settings = fastseg.Config(base_channels=4, depth=2, seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = fastseg.UNet(4, 2).state_dict()
        state = torch.get_rng_state()
        found = init_model(settings).state_dict()
        assert torch.equal(torch.get_rng_state(), state)
    assert same(expected, found)


def test_two_runs_in_one_folder_are_refused(pairs_dir, tmp_path):
    """The second names the process that holds the folder; afterwards the folder is free, without a lock file."""
    settings, refused = config(pairs_dir, tmp_path, num_epochs=1), []

    def start_another(entry):
        with pytest.raises(fastseg.FastsegError, match=rf"carvana: .*process {os.getpid()}\b.*name") as error:
            fastseg.train(settings)
        refused.append(error)

    result = fastseg.train(settings, after_epoch=start_another)
    assert refused
    assert not list(result.run_dir.glob(".*"))
    fastseg.train(settings.replace(num_epochs=2))


def test_a_run_that_ended_meanwhile_is_not_overwritten(pairs_dir, tmp_path, monkeypatch):
    """Another process trains in the folder between the look for last.pt and the lock."""
    settings = config(pairs_dir, tmp_path, num_epochs=1)

    def find_splits_slowly(given):
        monkeypatch.setattr(loop, "find_splits", find_splits)
        fastseg.train(settings)
        return find_splits(given)

    monkeypatch.setattr(loop, "find_splits", find_splits_slowly)
    with pytest.raises(fastseg.FastsegError, match=r"last\.pt: .*another.*again"):
        fastseg.train(settings)


def spoil_weights(monkeypatch, after):
    """Make the weights NaN after the step of that number, whose loss is finite."""
    step, count = loop.train_step, itertools.count(1)

    def spoil(run, images, masks):
        step(run, images, masks)
        if next(count) == after:
            run.model.head.bias.data.fill_(math.nan)

    monkeypatch.setattr(loop, "train_step", spoil)


@pytest.mark.parametrize("epoch", [1, 2])
def test_no_checkpoint_has_weights_that_are_not_finite(pairs_dir, tmp_path, monkeypatch, epoch):
    """The weights become NaN in the last step of an epoch, whose losses are finite."""
    settings = config(pairs_dir, tmp_path, num_epochs=4)
    spoil_weights(monkeypatch, after=2 * epoch)
    with pytest.raises(fastseg.FastsegError, match=r"^learning_rate: .*not finite.*Lower it") as error:
        fastseg.train(settings)
    assert ("load_model=false" in str(error.value)) == (epoch == 2)  # otherwise there is nothing to resume from
    assert (settings.run_dir / "last.pt").exists() == (settings.run_dir / "best.pt").exists() == (epoch == 2)
    monkeypatch.undo()
    if epoch == 2:
        assert all(value.isfinite().all() for value in weights(settings.run_dir / "last.pt").values())
    advised = settings.replace(learning_rate=1e-4, load_model=False)
    assert len(fastseg.train(advised).history) == 4


def test_a_loss_that_is_not_finite_is_noticed_within_the_epoch(pairs_dir, tmp_path, monkeypatch):
    settings = config(pairs_dir, tmp_path, batch_size=1, num_epochs=1)
    steps = []
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)
    spoil_weights(monkeypatch, after=2)
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda run, *batch: (steps.append(1), step(run, *batch)))
    with pytest.raises(fastseg.FastsegError, match=r"^learning_rate: .*loss became nan in epoch 1.*Lower it"):
        fastseg.train(settings)
    assert len(steps) == 3  # of 8
    assert not list(tmp_path.rglob("*.pt"))


def test_a_last_checkpoint_of_nan_is_refused(pairs_dir, tmp_path):
    settings = config(pairs_dir, tmp_path, num_epochs=1)
    last = fastseg.train(settings).run_dir / "last.pt"
    state = torch.load(last, weights_only=True)
    state["model"]["head.bias"].fill_(math.nan)
    torch.save(state, last)
    with pytest.raises(fastseg.CheckpointError, match=r"last\.pt: .*not finite.*load_model=false"):
        fastseg.train(settings)


def test_json_files_hold_null_for_nan(pairs_dir, tmp_path, monkeypatch):
    """A run that is interrupted in its first epoch has no scores."""
    step = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda run, *batch: (step(run, *batch), setattr(run, "stop_requested", True))
    )
    result = fastseg.train(config(pairs_dir, tmp_path))
    assert result.interrupted
    summary = json.loads((result.run_dir / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["val_dice"] is None
