"""Whole runs on small pairs: what they learn, write, repeat and survive."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.training.augment import shrink
from fastseg.training.compile import capture_graphs, decide_compile
from fastseg.training.recipe import learning_rate, training_size
from tests.conftest import write_pair

SMALL = {"image_height": 32, "image_width": 48, "base_channels": 4, "depth": 2, "batch_size": 4, "device": "cpu"}
DIRS = {"val_img_dir": "", "val_fraction": 0.34}


def config(pairs_dir: Path, out: Path, **changes) -> fastseg.Config:
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    return fastseg.Config(**{**SMALL, **DIRS, **folders, "out_dir": str(out), "num_epochs": 2, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_overfits_four_pairs(tmp_path):
    """The default network, at 8 channels, learns four pairs by heart; validation is the same four."""
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


def test_a_run_leaves_what_the_readme_lists(pairs_dir, tmp_path):
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


def test_state_dict_keys_are_plain_and_load_into_a_bare_network(pairs_dir, tmp_path):
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    fastseg.UNet(4, 2).load_state_dict(weights(result.run_dir / "best.pt"))


def test_an_unchanged_finished_run_is_not_trained_again(pairs_dir, tmp_path, caplog):
    first = fastseg.train(config(pairs_dir, tmp_path))
    before = (first.run_dir / "last.pt").read_bytes()
    caplog.set_level("INFO")
    second = fastseg.train(config(pairs_dir, tmp_path))
    assert "all 2 epochs are done" in caplog.text
    assert second.val_dice == first.val_dice
    assert (first.run_dir / "last.pt").read_bytes() == before


def test_load_model_false_starts_anew(pairs_dir, tmp_path, caplog):
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    caplog.set_level("INFO")
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, load_model=False, seed=5))
    assert "a new run from random weights (load_model is false)" in caplog.text
    assert len(result.history) == 1


def test_a_named_checkpoint_gives_the_first_weights(pairs_dir, tmp_path):
    first = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    frozen = {"num_epochs": 1, "learning_rate": 1e-12, "weight_decay": 0, "recipe": "tutorial"}
    path = str(first.run_dir / "best.pt")
    second = fastseg.train(config(pairs_dir, tmp_path, name="second", checkpoint=path, **frozen))
    old, new = weights(first.run_dir / "best.pt"), weights(second.run_dir / "last.pt")
    torch.testing.assert_close(old["head.weight"], new["head.weight"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("killed_after", "changes"), [(1, {}), (2, {}), (3, {}), (3, {"ema_decay": 0.9})])
def test_resume_equals_uninterrupted(pairs_dir, tmp_path, killed_after, changes, monkeypatch):
    """Stopped after any step, in the middle of an epoch or at its end, a run ends with the same weights."""
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole", **changes))
    import fastseg.training.loop as training

    taken, real_step = [], training._step

    def step(run, images, masks):
        real_step(run, images, masks)
        taken.append(1)
        run.signalled = len(taken) == killed_after

    monkeypatch.setattr(training, "_step", step)
    stopped = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes))
    assert stopped.interrupted
    assert math.isnan(stopped.val_dice) == (killed_after <= 2)
    monkeypatch.setattr(training, "_step", real_step)
    resumed = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes))
    assert not resumed.interrupted
    assert same(weights(whole.run_dir / "last.pt"), weights(resumed.run_dir / "last.pt"))
    assert same(weights(whole.run_dir / "best.pt"), weights(resumed.run_dir / "best.pt"))
    assert [e["train_loss"] for e in resumed.history] == [e["train_loss"] for e in whole.history]


def test_ctrl_c_saves_and_ends_cleanly(pairs_dir, tmp_path):
    """A real signal to a real process; then the run is finished from what it saved."""
    settings = config(pairs_dir, tmp_path, num_epochs=400, image_height=64, image_width=96)
    settings.to_json(tmp_path / "config.json")
    command = [sys.executable, "-m", "fastseg", "train", "--config", str(tmp_path / "config.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not settings.run_dir.joinpath("best.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "last.pt is saved" in stderr
    assert "Run the same command again to go on" in stderr
    state = torch.load(settings.run_dir / "last.pt", weights_only=True)
    assert 1 <= state["epoch"] < 400


def test_kill_nine_costs_nothing_but_time(pairs_dir, tmp_path):
    """Killed three times at random moments and started again, a run ends with the weights of one left alone."""
    settings = config(pairs_dir, tmp_path, num_epochs=60, name="killed")
    whole = fastseg.train(settings.replace(name="whole"))
    settings.to_json(tmp_path / "config.json")
    command = [sys.executable, "-m", "fastseg", "train", "--config", str(tmp_path / "config.json")]
    rng, epochs = np.random.default_rng(), []
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        last = settings.run_dir / "last.pt"
        written = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == written):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        epochs.append(torch.load(settings.run_dir / "last.pt", weights_only=True)["epoch"])
    assert 0 < epochs[0] < 60  # it was killed in the middle
    resumed = fastseg.train(settings)
    assert same(weights(whole.run_dir / "last.pt"), weights(resumed.run_dir / "last.pt"))
    lines = [json.loads(line) for line in (resumed.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 61))
    assert [line["train_loss"] for line in lines] == [entry["train_loss"] for entry in whole.history]


def test_early_kill_leaves_the_last_checkpoint_whole(pairs_dir, tmp_path, monkeypatch):
    """A crash while a checkpoint is written leaves the one before, and no litter."""
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1))
    before = (result.run_dir / "last.pt").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(fastseg.CheckpointError, match=r"cannot be written \(No space left on device\)"):
        fastseg.train(config(pairs_dir, tmp_path, num_epochs=2))
    assert (result.run_dir / "last.pt").read_bytes() == before
    assert not [path for path in result.run_dir.iterdir() if path.name.startswith(".")]


def test_skipped_files_are_named_counted_and_training_goes_on(pairs_dir, tmp_path, caplog):
    for path in [*pairs_dir.glob("images/*"), *pairs_dir.glob("masks/*")]:
        target = tmp_path / path.relative_to(pairs_dir)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "images/car0_01.jpg").write_bytes(b"")
    truncated = (tmp_path / "masks/car1_02_mask.gif").read_bytes()[:200]
    (tmp_path / "masks/car1_02_mask.gif").write_bytes(truncated)
    with pytest.raises(fastseg.DataError, match="2 of 24 pairs cannot be used"):
        fastseg.train(
            config(
                tmp_path,
                tmp_path / "runs",
                val_img_dir=str(pairs_dir / "images"),
                val_mask_dir=str(pairs_dir / "masks"),
            )
        )
    assert not (tmp_path / "runs").exists()
    result = fastseg.train(
        config(
            tmp_path,
            tmp_path / "runs",
            bad_samples="skip",
            val_img_dir=str(pairs_dir / "images"),
            val_mask_dir=str(pairs_dir / "masks"),
        )
    )
    bad = json.loads((result.run_dir / "summary.json").read_text())["bad_samples"]
    assert bad == {"count": 2, "images": ["car0_01.jpg", "car1_02.jpg"]}
    assert "car1_02_mask.gif" in caplog.text


def test_more_epochs_on_a_small_data_set_only_if_none_were_asked_for(pairs_dir, tmp_path):
    asked = fastseg.train(config(pairs_dir, tmp_path, name="asked", num_epochs=1))
    assert len(asked.history) == 1
    fields = config(pairs_dir, tmp_path, name="free", min_steps=9).model_dump(exclude={"num_epochs"})
    free = fastseg.train(fields)
    assert len(free.history) == 5  # 8 pairs, 2 steps an epoch, at least 9 steps
    assert json.loads((free.run_dir / "config.json").read_text())["num_epochs"] == 5


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(pairs_dir, tmp_path):
    with pytest.raises(fastseg.FastsegError, match=r"the loss became \w+ in epoch \d.*Lower learning_rate"):
        fastseg.train(config(pairs_dir, tmp_path, learning_rate=1e20, recipe="tutorial", num_epochs=9))


def test_the_callers_random_numbers_are_left_alone(pairs_dir, tmp_path):
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
    with pytest.raises(fastseg.ConfigError, match="compile: graphs needs one process on a GPU; the network is on cpu"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, compile="graphs"))
    assert not any(tmp_path.iterdir())
    choose_runtime(config(tmp_path, tmp_path, compile="graphs"))  # what they trained is scored anywhere


def test_graphs_leave_the_network_as_it_was_and_serve_every_shape(monkeypatch):
    """Recording itself needs a GPU; here what is recorded runs eagerly, after the runs that recording makes."""

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


def test_the_averaged_weights_are_scored_and_kept(pairs_dir, tmp_path, monkeypatch):
    """best.pt holds the moving average of every step's weights, here computed again in float64."""
    import fastseg.training.loop as training

    seen, real_step = [], training._step

    def step(run, images, masks):
        real_step(run, images, masks)
        seen.append({key: value.double() for key, value in run.model.state_dict().items()})

    monkeypatch.setattr(training, "_step", step)
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, ema_decay=0.7, batch_size=2))
    average = {key: torch.zeros_like(value) for key, value in seen[0].items()}
    for step, state in enumerate(seen):
        share = max(0.3, 1 / (step + 1))  # the mean of the first steps, then decaying
        average = {key: (1 - share) * average[key] + share * state[key] for key in state}
    kept = weights(result.run_dir / "best.pt")
    assert len(seen) >= 3
    for key in ("head.weight", "encoder.0.1.running_var"):
        torch.testing.assert_close(kept[key].double(), average[key], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(kept[key].double(), seen[-1][key], atol=1e-6)
    scores = fastseg.evaluate(result.run_dir / "best.pt", pairs_dir / "images", pairs_dir / "masks", device="cpu")
    assert scores["images"] == 12


def test_the_first_steps_see_half_of_the_size():
    settings = fastseg.Config(progressive_resizing=0.5)
    sizes = [training_size(settings, step, 100) for step in range(100)]
    assert sizes == [(80, 128)] * 50 + [(160, 240)] * 50  # 120 does not divide by 16
    assert training_size(settings.replace(progressive_resizing=0), 0, 100) == (160, 240)
    assert training_size(settings.replace(recipe="tutorial"), 0, 100) == (160, 240)
    tiny = settings.replace(image_height=16, image_width=48)
    assert training_size(tiny, 0, 100) == (16, 32)  # of one image a 1 x 1 level would have no batch statistics


def test_shrinking_keeps_image_and_mask_together():
    """A disc's outline stands at the same place of both, and means are kept: each cell is an average."""
    y, x = np.mgrid[:160, :240]
    disc = torch.from_numpy(np.hypot(x - 150, y - 70) < 50).float()[None, None]
    image = disc.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    small_image, small_disc = shrink(image, disc, 80, 128)
    assert small_disc.shape == (1, 1, 80, 128)
    assert small_image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small_image[:, :1], small_disc, atol=1e-6, rtol=0)
    assert small_disc.mean().item() == pytest.approx(disc.mean().item(), abs=2e-3)
    centre = (small_disc[0, 0] * torch.arange(128)).sum() / small_disc.sum()
    assert centre.item() == pytest.approx((150.5 * 128 / 240) - 0.5, abs=0.1)


def test_tensorboard_shows_the_figures_of_metrics_jsonl(pairs_dir, tmp_path):
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


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fastseg.ConfigError, match="Install fastseg-dali\\[tensorboard\\], or pass tensorboard=false"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, tensorboard=True))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("progressive_resizing", "epochs"), [(0.7, 9), (0.0, 3)])
def test_patience_begins_when_training_sees_the_full_size(
    pairs_dir, tmp_path, monkeypatch, progressive_resizing, epochs
):
    """With scores that only fall: two epochs after the seven of ten that see small images, or after the first."""
    falling = iter(np.linspace(0.9, 0.1, 10).tolist())

    def score(*_):
        dice = next(falling)
        return dict.fromkeys(("loss", "iou", "dice_pixels", "iou_pixels"), 0.5) | {"dice": dice}

    monkeypatch.setattr("fastseg.training.loop.score_batches", score)
    changes = {"num_epochs": 10, "early_stopping": 2, "progressive_resizing": progressive_resizing}
    result = fastseg.train(config(pairs_dir, tmp_path, **changes))
    assert len(result.history) == epochs
