"""Runs that are interrupted, killed or short of disk space, and resumed."""

import functools
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.data.loader import Loader
from fastseg.network.checkpoint import build_model, load_checkpoint
from fastseg.training import loop
from fastseg.training.recipe import LR_FACTOR, make_optimizer
from tests.processes import Ended, run
from tests.test_training import config, same, weights

# The command line in a process that sends itself a signal: at its n-th training batch, or within its n-th torch.save.
PROGRAM = """
import itertools, signal, sys
import torch
from fastseg.cli import main
from fastseg.data.loader import Loader
from fastseg.training.writer import CheckpointWriter

name, place, number, *arguments = sys.argv[1:]
batches, save, count = Loader.__iter__, torch.save, itertools.count(1)
start_saving = CheckpointWriter.save

def send_signal_in_time():
    if next(count) == int(number):
        signal.raise_signal(signal.Signals[name])

def iterate(loader):
    for batch in batches(loader):
        if loader.shuffle:
            send_signal_in_time()
        yield batch

def save_slowly(state, file):
    file.write(b"half of a checkpoint")
    file.flush()
    send_signal_in_time()
    file.seek(0)
    save(state, file)

def save_and_wait(writer, states, **options):
    start_saving(writer, states, **options)
    writer.wait()

if place == "batch":
    Loader.__iter__ = iterate
    CheckpointWriter.save = save_and_wait  # so that it is known which checkpoint the signal finds
else:
    torch.save = save_slowly
main(arguments)
"""


def run_with_signal(
    name: str, place: str, number: int, settings: fastseg.Config, folder: Path, before: str = ""
) -> Ended:
    """`fastseg train` in a process that sends itself a signal at a given place, see PROGRAM; `before` runs first."""
    settings.to_json(folder / "config.json")
    return run("-c", before + PROGRAM, name, place, number, "train", "--config", folder / "config.json")


def assert_kill_changes_nothing(settings: fastseg.Config, folder: Path, batch: int, before: str = "") -> None:
    """Killed at a training batch within the second epoch, and resumed, a run ends as an undisturbed one."""
    whole = fastseg.train(settings.replace(name="whole"))
    killed = settings.replace(name="killed")
    done = run_with_signal("SIGKILL", "batch", batch, killed, folder, before)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(killed.run_dir / "last.pt", weights_only=True)["epoch"] == 1
    resumed = fastseg.train(killed)
    for name in ("last.pt", "best.pt"):
        assert same(weights(whole.run_dir / name), weights(resumed.run_dir / name)), name
    for score in ("train_loss", "val_loss", "val_iou"):
        assert [entry[score] for entry in resumed.history] == [entry[score] for entry in whole.history], score


def send_signal(monkeypatch, number: int, batch: int, times: int = 1) -> None:
    """Send this process a signal before the step on its training batch number `batch`, counted from 1."""
    batches, count = Loader.__iter__, itertools.count(1)

    def iterate(loader):
        for item in batches(loader):
            if loader.shuffle and next(count) == batch:
                for _ in range(times):
                    signal.raise_signal(number)
            yield item

    monkeypatch.setattr(Loader, "__iter__", iterate)


def test_an_unchanged_finished_run_is_not_trained_again(pairs_dir, tmp_path, caplog):
    first = fastseg.train(config(pairs_dir, tmp_path))
    before = (first.run_dir / "last.pt").read_bytes()
    caplog.set_level("INFO")
    second = fastseg.train(config(pairs_dir, tmp_path))
    assert "finished after 2 epochs" in caplog.text
    assert "raise num_epochs" in caplog.text
    assert second.val_dice == first.val_dice
    assert (first.run_dir / "last.pt").read_bytes() == before


def test_load_model_false_starts_from_scratch(pairs_dir, tmp_path, caplog):
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    caplog.set_level("INFO")
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, load_model=False, seed=5))
    assert "new run from random weights (load_model is false)" in caplog.text
    assert len(result.history) == 1


def test_a_named_checkpoint_gives_the_first_weights(pairs_dir, tmp_path):
    first = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    frozen = {"num_epochs": 1, "learning_rate": 1e-12, "weight_decay": 0, "recipe": "tutorial"}
    path = str(first.run_dir / "best.pt")
    second = fastseg.train(config(pairs_dir, tmp_path, name="second", checkpoint=path, **frozen))
    old, new = weights(first.run_dir / "best.pt"), weights(second.run_dir / "last.pt")
    torch.testing.assert_close(old["head.weight"], new["head.weight"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("number", "batch", "changes"),
    [
        (signal.SIGINT, 1, {}),
        (signal.SIGINT, 2, {}),
        (signal.SIGTERM, 3, {}),
        (signal.SIGINT, 3, {"ema_decay": 0.9}),
        (signal.SIGINT, 3, {"optimizer": "muon"}),
        (signal.SIGINT, 1, {"freeze_encoder": 2, "encoder_lr": 0.3}),
        (signal.SIGINT, 3, {"freeze_encoder": 2, "encoder_lr": 0.3}),
    ],
)
def test_resume_equals_uninterrupted(pairs_dir, tmp_path, number, batch, changes, monkeypatch):
    """Interrupted after any step, in the middle of an epoch or at its end, a run ends with the same weights."""
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole", **changes))
    with monkeypatch.context() as patch:
        send_signal(patch, number, batch)
        stopped = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes))
    assert stopped.interrupted
    assert math.isnan(stopped.val_dice) == (batch <= 2)
    resumed = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes))
    assert not resumed.interrupted
    assert same(weights(whole.run_dir / "last.pt"), weights(resumed.run_dir / "last.pt"))
    assert same(weights(whole.run_dir / "best.pt"), weights(resumed.run_dir / "best.pt"))
    assert [e["train_loss"] for e in resumed.history] == [e["train_loss"] for e in whole.history]


@pytest.fixture
def default_ctrl_c():
    """Python's own handler of Ctrl-C, which a process started in the background by a shell does not have."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_second_ctrl_c_ends_the_run_at_once(pairs_dir, tmp_path, monkeypatch):
    settings = config(pairs_dir, tmp_path)
    send_signal(monkeypatch, signal.SIGINT, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        fastseg.train(settings)
    state = torch.load(settings.run_dir / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)  # the end of the previous epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_saves_the_state_and_ends_the_command(pairs_dir, tmp_path):
    settings = config(pairs_dir, tmp_path)
    done = run_with_signal("SIGINT", "batch", 3, settings, tmp_path)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    for words in ("last.pt is saved", "same command again to resume"):
        assert words in done.stderr
    state = torch.load(settings.run_dir / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1)


def test_kill_nine_does_not_change_the_result(pairs_dir, tmp_path):
    """Killed three times and started again, a run ends with the weights of an uninterrupted one."""
    settings = config(pairs_dir, tmp_path, num_epochs=4, name="killed")
    whole = fastseg.train(settings.replace(name="whole"))
    last = settings.run_dir / "last.pt"
    for place, number, epoch in (
        ("save", 2, None),  # within the first last.pt
        ("batch", 4, 1),  # in the middle of the second epoch
        ("save", 1, 1),  # after the second epoch's line in metrics.jsonl, within its first checkpoint
    ):
        done = run_with_signal("SIGKILL", place, number, settings, tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert last.exists() == (epoch is not None)
        assert epoch is None or torch.load(last, weights_only=True)["epoch"] == epoch
    assert list(settings.run_dir.glob(".*.tmp"))
    resumed = fastseg.train(settings)
    assert not list(settings.run_dir.glob(".*"))  # neither temporary files nor a lock of the killed processes
    assert same(weights(whole.run_dir / "last.pt"), weights(resumed.run_dir / "last.pt"))
    lines = [json.loads(line) for line in (resumed.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["train_loss"] for line in lines] == [entry["train_loss"] for entry in whole.history]


def test_a_full_disk_leaves_the_previous_checkpoint(pairs_dir, tmp_path, monkeypatch):
    """An error while a checkpoint is written leaves the previous one, and no temporary file."""
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    before = (result.run_dir / "last.pt").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(fastseg.OutputError, match=r"\.pt: .*No space left on device.*room"):
        fastseg.train(config(pairs_dir, tmp_path, num_epochs=2))
    assert (result.run_dir / "last.pt").read_bytes() == before
    assert not [path for path in result.run_dir.iterdir() if path.name.startswith(".")]


def test_epochs_of_older_versions_were_scored_at_full_size(pairs_dir, tmp_path):
    """Their entries have no `val_size`; a later epoch with a higher Dice becomes the best."""
    run_dir = fastseg.train(config(pairs_dir, tmp_path)).run_dir
    state = torch.load(run_dir / "last.pt", weights_only=True)
    for entry in state["history"]:
        del entry["val_size"]
        entry["val_dice"] = -1.0
    torch.save(state, run_dir / "last.pt")
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=3))
    assert [entry["val_size"] for entry in result.history] == [32, 32, 32]
    assert result.best_epoch == torch.load(run_dir / "best.pt", weights_only=True)["scores"]["epoch"] == 3


def test_a_changed_weight_decay_counts_from_the_resume_on(pairs_dir, tmp_path):
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, weight_decay=0.01))
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=2, weight_decay=0.5))
    groups = torch.load(result.run_dir / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


def test_a_changed_seed_does_not_change_what_is_held_out(pairs_dir, tmp_path, caplog):
    """Cars of the training would be in the validation set, and their scores too high."""
    held_out = {"val_img_dir": "", "val_fraction": 0.3, "num_epochs": 1}
    for name, seed in (("same", 0), ("changed", 5)):
        fastseg.train(config(pairs_dir, tmp_path, **held_out, name=name))
        caplog.set_level("INFO")
        again = config(pairs_dir, tmp_path, **{**held_out, "num_epochs": 2}, name=name, seed=seed)
        assert fastseg.train(again).history[-1]["epoch"] == 2
    assert "seed: 0" in caplog.text
    assert same(*(weights(tmp_path / name / "last.pt") for name in ("same", "changed")))
    losses = [json.loads((tmp_path / name / "summary.json").read_text())["val_dice"] for name in ("same", "changed")]
    assert losses[0] == losses[1]


def test_a_run_that_resumes_needs_its_first_weights_no_longer(pairs_dir, tmp_path):
    first = fastseg.train(config(pairs_dir, tmp_path, name="first", num_epochs=1))
    weights = first.run_dir / "best.pt"
    fastseg.train(config(pairs_dir, tmp_path, name="second", num_epochs=1, checkpoint=weights))
    weights.unlink()
    again = fastseg.train(config(pairs_dir, tmp_path, name="second", num_epochs=2, checkpoint=weights))
    assert len(again.history) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("before", "after"), [(1.0, 0.3), (0.3, 1.0), (0.3, 0.5)])
def test_the_encoders_rate_may_change_on_resume(pairs_dir, tmp_path, monkeypatch, optimizer, before, after):
    """The optimizer's values of each parameter stay with it, though the groups of parameters are others."""
    settings = config(pairs_dir, tmp_path, num_epochs=1, optimizer=optimizer)
    first = fastseg.train(settings.replace(encoder_lr=before))
    saved = by_parameter(load_checkpoint(first.run_dir / "last.pt"), settings)
    resumed, rates, train_step = {}, set(), loop.train_step

    def first_step(run, images, masks):
        if not resumed:
            for name, parameter in run.model.named_parameters():
                resumed[name] = {key: value.clone() for key, value in run.optimizer.state[parameter].items()}
        train_step(run, images, masks)
        rates.update(group.get(LR_FACTOR, 1.0) for group in run.optimizer.param_groups)

    monkeypatch.setattr(loop, "train_step", first_step)
    fastseg.train(settings.replace(encoder_lr=after, num_epochs=2))
    assert saved.keys() == resumed.keys()
    assert all(same(saved[name], resumed[name]) for name in saved)
    assert after in rates
    assert before == 1 or before not in rates


def by_parameter(state: dict, settings: fastseg.Config) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimizer of a `last.pt` knows of each parameter."""
    model = build_model(settings)
    optimizer = make_optimizer(settings.replace(encoder_lr=state["config"]["encoder_lr"]), model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["optimizer"]["param_groups"] for number in group["params"]]
    values = state["optimizer"]["state"]
    return {names[p]: values[number] for p, number in zip(parameters, numbers, strict=True)}


def test_an_average_may_begin_and_end_on_resume(pairs_dir, tmp_path):
    for epochs, decay in ((1, 0.0), (2, 0.9), (3, 0.0)):
        run = fastseg.train(config(pairs_dir, tmp_path, num_epochs=epochs, ema_decay=decay))
        assert bool(load_checkpoint(run.run_dir / "last.pt")["ema_model"]) == (decay > 0)
    assert len(run.history) == 3


def test_a_run_without_a_gradient_scaler_resumes_with_one(pairs_dir, tmp_path, monkeypatch):
    """As from bf16 to fp16 on another GPU."""
    run = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    scaler = functools.partial(torch.amp.GradScaler, init_scale=1.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **_: scaler(device))
    resumed = fastseg.train(config(pairs_dir, tmp_path, num_epochs=2))
    assert len(resumed.history) == 2
    assert load_checkpoint(run.run_dir / "last.pt")["scaler"]["scale"] == 1.0


@pytest.mark.parametrize(
    ("before", "changes", "field"),
    [
        ({"optimizer": "adamw"}, {"optimizer": "muon"}, "optimizer"),
        ({}, {"optimizer": "adamw"}, "optimizer"),
        ({}, {"recipe": "tutorial"}, "recipe"),
        ({"recipe": "tutorial"}, {"recipe": "fast"}, "recipe"),
    ],
)
def test_another_optimizer_is_refused_by_its_field(pairs_dir, tmp_path, before, changes, field):
    run = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, **before))
    saved = (run.run_dir / "last.pt").read_bytes()
    with pytest.raises(fastseg.ConfigError, match=rf"{field}: .*load_model=false"):
        fastseg.train(config(pairs_dir, tmp_path, num_epochs=2, **{**before, **changes}))
    assert (run.run_dir / "last.pt").read_bytes() == saved
