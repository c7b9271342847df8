"""Whole runs on small pairs: accuracy, files, determinism, interruption and resumption."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.data.loader import Loader
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.training.augment import resize
from fastseg.training.compile import capture_graphs, decide_compile
from fastseg.training.loop import train_step
from fastseg.training.recipe import learning_rate, training_size
from tests.conftest import write_pair

SMALL = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "batch_size": 4, "device": "cpu"}
DIRS = {"val_img_dir": "", "val_fraction": 0.34}  # of 12 pairs 8 train: an epoch of 2 steps

# The command line in a process that sends itself a signal: at its n-th training batch, or within its n-th torch.save.
PROGRAM = """
import itertools, signal, sys
import torch
from fastseg.cli import main
from fastseg.data.loader import Loader

name, place, number, *arguments = sys.argv[1:]
batches, save, count = Loader.__iter__, torch.save, itertools.count(1)

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

if place == "batch":
    Loader.__iter__ = iterate
else:
    torch.save = save_slowly
main(arguments)
"""


def config(pairs_dir: Path, out: Path, **changes) -> fastseg.Config:
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    return fastseg.Config(**{**SMALL, **DIRS, **folders, "out_dir": str(out), "num_epochs": 2, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def run_with_signal(name: str, place: str, number: int, settings: fastseg.Config, folder: Path):
    """`fastseg train` in a process that sends itself a signal at a given place, see PROGRAM."""
    settings.to_json(folder / "config.json")
    command = [sys.executable, "-c", PROGRAM, name, place, str(number), "train", "--config", folder / "config.json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


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
            "num_epochs": 60,
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
    assert fastseg.Config.from_json(result.run_dir / "config.json") == config(pairs_dir, tmp_path, name="full")
    for name in ("curves.png", "overlay.png"):
        assert np.asarray(Image.open(result.run_dir / name).convert("L")).std() > 10


def test_weights_load_into_a_plain_network(pairs_dir, tmp_path):
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    fastseg.UNet(4, 2).load_state_dict(weights(result.run_dir / "best.pt"))


def test_an_unchanged_finished_run_is_not_trained_again(pairs_dir, tmp_path, caplog):
    first = fastseg.train(config(pairs_dir, tmp_path))
    before = (first.run_dir / "last.pt").read_bytes()
    caplog.set_level("INFO")
    second = fastseg.train(config(pairs_dir, tmp_path))
    assert "all 2 epochs are done" in caplog.text
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


def test_a_second_ctrl_c_ends_the_run_at_once(pairs_dir, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    settings = config(pairs_dir, tmp_path)
    send_signal(monkeypatch, signal.SIGINT, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        fastseg.train(settings)
    state = torch.load(settings.run_dir / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)  # the end of the epoch before
    assert signal.getsignal(signal.SIGINT) is handler


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
    resumed = fastseg.train(settings)
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


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "overlay.png", "summary.json"])
def test_a_file_that_cannot_be_written_is_named(pairs_dir, tmp_path, name):
    settings = config(pairs_dir, tmp_path, num_epochs=1)
    settings.run_dir.joinpath(name).mkdir(parents=True)
    with pytest.raises(fastseg.OutputError, match=f"{name}: .*place"):
        fastseg.train(settings)


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


def test_a_loss_that_is_not_finite_ends_the_run(pairs_dir, tmp_path):
    with pytest.raises(fastseg.FastsegError, match=r"^learning_rate: the loss became (nan|inf) .*1e\+20.*precision"):
        fastseg.train(config(pairs_dir, tmp_path, learning_rate=1e20, recipe="tutorial", num_epochs=9))


def test_the_callers_random_state_does_not_change(pairs_dir, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_one_cycle_rises_to_its_peak_and_ends_at_zero():
    settings = fastseg.Config(learning_rate=1e-4)
    rates = [learning_rate(settings, step, 400) for step in range(401)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[100] == pytest.approx(3e-3)
    assert rates[400] == pytest.approx(0, abs=1e-9)
    assert np.all(np.diff(rates[:101]) > 0)
    assert np.all(np.diff(rates[100:]) < 0)
    assert {learning_rate(settings.replace(recipe="tutorial"), step, 400) for step in range(400)} == {1e-4}


@pytest.mark.skipif(os.environ.get("CC", "g++") == "", reason="needs a C++ compiler")
def test_compiled_training_reaches_the_same_loss(pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that what training sets is undone
    settings = config(pairs_dir, tmp_path, name="compiled", precision="fp32", compile="on", progressive_resizing=0.5)
    eager = fastseg.train(settings.replace(name="eager", compile="off"))
    compiled = fastseg.train(settings)
    losses = [[entry["train_loss"] for entry in run.history] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not any("_orig_mod" in key for key in weights(compiled.run_dir / "last.pt"))
    assert list((tmp_path / "cache/fastseg/compiled").glob("*/fxgraph/*"))  # for the next run


@pytest.mark.parametrize(
    ("device", "steps", "warm", "choice"),
    [("cpu", 10**6, True, "off"), ("cuda", 954, False, "off"), ("cuda", 954, True, "on"), ("cuda", 9540, False, "on")],
)
def test_compile_auto_weighs_the_steps_that_remain(device, steps, warm, choice):
    chosen, reason = decide_compile(fastseg.Config(), torch.device(device), steps, warm=warm)
    assert chosen == choice
    assert device == "cpu" or str(steps) in reason
    for asked in ("off", "graphs"):
        assert decide_compile(fastseg.Config(compile=asked), torch.device(device), steps, warm=warm)[0] == asked


def test_graphs_are_refused_without_a_gpu(tmp_path):
    with pytest.raises(fastseg.ConfigError, match=r"^compile: .*GPU.*cpu.*auto"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, compile="graphs"))
    assert not any(tmp_path.iterdir())
    choose_runtime(config(tmp_path, tmp_path, compile="graphs"))  # scoring is possible on any machine


def test_captured_graphs_equal_the_network_at_every_shape(monkeypatch):
    """Capturing needs a GPU. Here a fake runs the network three times, as capturing does, and returns it."""

    def make_graphed_callables(module, inputs):
        for _ in range(3):
            module(*inputs)
        shapes.append(inputs[0].shape)
        return module

    shapes = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    torch.manual_seed(0)
    model, plain = (fastseg.UNet(4, 2) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    both = [(2, 3, 8, 12), (2, 3, 16, 24)]
    forward = capture_graphs(model, Runtime(torch.device("cpu"), torch.float32), both)
    assert shapes == both
    for shape in both:
        x = torch.randn(shape)
        found, exact = forward(x), plain.train()(x)
        torch.testing.assert_close(found, exact)
        found.mean().backward()
        exact.mean().backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    with pytest.raises(KeyError):
        forward(torch.randn(1, 3, 8, 12))


def test_after_epoch_sees_each_epoch_and_ends_the_run(pairs_dir, tmp_path):
    seen = []

    def after_epoch(entry):
        seen.append(entry)
        return entry["epoch"] == 2

    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=5), after_epoch=after_epoch)
    assert seen == result.history
    assert [entry["epoch"] for entry in seen] == [1, 2]
    assert not result.interrupted


def test_the_ema_of_the_weights_is_scored_and_saved(pairs_dir, tmp_path, monkeypatch):
    """best.pt holds the EMA of every step's weights, compared with one computed in float64."""
    states = []

    def record(run, images, masks):
        train_step(run, images, masks)
        states.append({key: value.double() for key, value in run.model.state_dict().items()})

    monkeypatch.setattr("fastseg.training.loop.train_step", record)
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, ema_decay=0.7, batch_size=2))
    average = {key: torch.zeros_like(value) for key, value in states[0].items()}
    for step, state in enumerate(states):
        share = max(0.3, 1 / (step + 1))  # the mean of the first steps, then an exponential average
        average = {key: (1 - share) * average[key] + share * state[key] for key in state}
    saved = weights(result.run_dir / "best.pt")
    assert len(states) >= 3
    for key in ("head.weight", "encoder.0.1.running_var"):
        torch.testing.assert_close(saved[key].double(), average[key], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(saved[key].double(), states[-1][key], atol=1e-6)
    scores = fastseg.evaluate(result.run_dir / "best.pt", pairs_dir / "images", pairs_dir / "masks", device="cpu")
    assert scores["images"] == 12


def test_the_first_steps_see_half_of_the_size():
    settings = fastseg.Config(progressive_resizing=0.5)
    sizes = [training_size(settings, step, 100) for step in range(100)]
    assert sizes == [(80, 128)] * 50 + [(160, 240)] * 50  # 120 is not divisible by 16
    assert training_size(settings.replace(progressive_resizing=0), 0, 100) == (160, 240)
    assert training_size(settings.replace(recipe="tutorial"), 0, 100) == (160, 240)
    tiny = settings.replace(image_height=16, image_width=48)
    assert training_size(tiny, 0, 100) == (
        16,
        32,
    )  # 1 x 1 cells have no batch statistics at batch size 1


def test_resizing_keeps_image_and_mask_together():
    """A disc has the same place in both, and its mean stays the same, because each cell is an average."""
    y, x = np.mgrid[:160, :240]
    disc = torch.from_numpy(np.hypot(x - 150, y - 70) < 50).float()[None, None]
    image = disc.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    small_image, small_disc = resize(image, disc, 80, 128)
    assert small_disc.shape == (1, 1, 80, 128)
    assert small_image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small_image[:, :1], small_disc, atol=1e-6, rtol=0)
    assert small_disc.mean().item() == pytest.approx(disc.mean().item(), abs=2e-3)
    centre = (small_disc[0, 0] * torch.arange(128)).sum() / small_disc.sum()
    assert centre.item() == pytest.approx((150.5 * 128 / 240) - 0.5, abs=0.1)


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


@pytest.mark.parametrize(("progressive_resizing", "epochs"), [(0.7, 9), (0.0, 3)])
def test_patience_begins_when_training_sees_the_full_size(
    pairs_dir, tmp_path, monkeypatch, progressive_resizing, epochs
):
    """With falling scores: two epochs after the seven with small images, or two after the first."""
    falling = iter(np.linspace(0.9, 0.1, 10).tolist())

    def score(*_):
        dice = next(falling)
        return dict.fromkeys(("loss", "iou", "dice_pixels", "iou_pixels"), 0.5) | {"dice": dice}

    monkeypatch.setattr("fastseg.training.loop.score_batches", score)
    changes = {"num_epochs": 10, "early_stopping": 2, "progressive_resizing": progressive_resizing}
    result = fastseg.train(config(pairs_dir, tmp_path, **changes))
    assert len(result.history) == epochs
