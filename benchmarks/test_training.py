"""Small versions of training.py: `pytest benchmarks/test_training.py --benchmark-enable`."""

import json
import sys
from pathlib import Path
from typing import Any

import flops
import measure
import pytest
import time_to_dice
import torch
import train_row
import trainers
import training
from command import folder_fields
from PIL import Image

import fastseg
from fastseg.config import Config

FIELDS = {"base_channels": 4, "batch_size": 2, "num_epochs": 2, "refiner_steps": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "MATMUL_SIZE", {"cpu": 256})


@pytest.fixture(scope="session")
def two_cars(pairs: fastseg.Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared pairs under the names of two cars, so that one of them can be validation."""
    folder = tmp_path_factory.mktemp("cars")
    for kind, path in (("images", pairs.image_path), ("masks", pairs.mask_path)):
        (folder / f"train_{kind}").mkdir()
        for index in range(len(pairs)):
            source = Path(path(index))
            (folder / f"train_{kind}" / source.name.replace("car", "bus" if index % 2 else "car")).symlink_to(source)
    return folder


@pytest.fixture
def setting(two_cars: Path) -> trainers.Setting:
    found = fastseg.find_pairs(two_cars / "train_images", two_cars / "train_masks")
    train_pairs, val_pairs = fastseg.split_by_group(found, 0.5, seed=0)
    return trainers.Setting(train_pairs, val_pairs, Config(**FIELDS), "pillow", {}, rounds=1)


@pytest.mark.parametrize("channels", [64, 4])
def test_flops_are_those_of_the_convolutions(channels: int) -> None:
    """Against a count by hand, from the shapes of the convolutions."""
    with torch.device("meta"):
        model, image = fastseg.UNet(channels), torch.empty(1, 3, 160, 240)
    by_hand = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        size = inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output  # where the kernel runs
        by_hand.append(2 * module.weight.numel() * size.shape[2] * size.shape[3])

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(note)
    model(image)
    counted = flops.count_flops(lambda: fastseg.UNet(channels), 160, 240)
    assert counted["forward"] == sum(by_hand)
    assert counted["forward_backward"] == 3 * sum(by_hand) - by_hand[0]  # no gradient of the image
    assert counted["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    if channels == 64:
        assert counted["forward"] == pytest.approx(56.4e9, rel=0.01)
        assert counted["forward_backward"] == pytest.approx(169e9, rel=0.01)


@pytest.mark.parametrize("name", ["autocast", "fastseg"])
def test_step(benchmark: Any, setting: trainers.Setting, name: str) -> None:
    trainer = trainers.make_trainer(name, setting)
    images, masks, _ = next(iter(trainer.epoch()))
    benchmark(trainer.step, images, masks)
    assert all(torch.isfinite(weight).all() for weight in trainer.run.model.parameters())


def test_the_row_fastseg_is_what_train_does(setting: trainers.Setting, tmp_path: Path) -> None:
    time_to_dice.link_setting(setting, tmp_path)
    result = fastseg.train({**FIELDS, **folder_fields(tmp_path), "out_dir": tmp_path / "runs"})
    row = train_row.run_row("fastseg", setting)
    assert row["val_dice"] == pytest.approx(result.history[-1]["val_dice"], abs=1e-6)
    assert row["steps"] == 4
    plain = train_row.run_row("augmentation", setting)
    assert plain["exact_loss"] == row["exact_loss"]
    assert plain["val_dice"] != row["val_dice"]


def test_data_loader_has_our_order(setting: trainers.Setting) -> None:
    run = trainers.make_trainer("loader", setting).run

    def load(batches: Any) -> Any:
        for indices in batches:
            yield torch.zeros(2), torch.zeros(2), indices

    epoch = trainers._data_loader_epochs(run, load)
    for _ in range(2):
        ours, theirs = ([list(indices) for _, _, indices in batches] for batches in (run.train_loader, epoch()))
        assert ours == theirs


def test_a_wrong_row_is_refused(setting: trainers.Setting) -> None:
    trainer = trainers.make_trainer("channels_last", setting)
    batch = train_row.first_batch(setting, torch.device("cpu"))
    model = trainer.run.model
    assert train_row.check_gradients(trainer, *batch)["loss_error"] < 1e-5
    trainer.run.forward = lambda x: 1.1 * model(x)
    with pytest.raises(ValueError, match="wrong loss"):
        train_row.check_gradients(trainer, *batch)
    trainer.run.forward = lambda x: model(x).detach() + 0 * model(x)  # the loss is right, its gradient is not
    with pytest.raises(ValueError, match=r"gradient_error\W+1\.0"):
        train_row.check_gradients(trainer, *batch)


def test_command(
    two_cars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script in one process, except for the row that forks workers."""

    def run_here(function: Any, name: str, *arguments: Any) -> Any:
        return (
            measure.in_fresh_process(function, name, *arguments) if name == "tutorial" else function(name, *arguments)
        )

    result = tmp_path / "training.json"
    options = ["--data", str(two_cars), "--pairs", "8", "--val-fraction", "0.5", "--channels", "4", "--batch-size", "2"]
    options += ["--rows", "tutorial,loader,fastseg,graphs", "--steps", "2", "--repeat", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["training.py", *options, "--device", "cpu", "--json", str(result)])
    monkeypatch.setattr(training, "in_fresh_process", run_here)
    training.main()
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line == json.loads(result.read_text())
    assert [row["row"] for row in last_line["rows"]] == ["tutorial", "loader", "fastseg"]
    assert last_line["missing"] == {"graphs": "n/a: CUDA graphs need a GPU"}
    for row in last_line["rows"]:
        assert row["steps"] == 4  # two epochs of two steps: there is always a later epoch
        assert row["limit_pct"] > 0
        assert row["peak_gib"] > 0.05
        flops_a_s = 1e9 * row["gflop_a_pair"] * row["pairs_per_s"]
        assert row["limit_pct"] == pytest.approx(flops_a_s / row["matmul_tflops"] / 1e10, rel=0.01)
    assert last_line["data_efficiency_pct"] == last_line["rows"][2]["data_efficiency_pct"] > 0
    assert last_line["times_as_fast"].keys() == {"tutorial"}
    assert str(two_cars) not in result.read_text()
    with Image.open(result.with_suffix(".png")) as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(("target", "limit_s", "reached"), [(0.0, 600.0, True), (1.1, 0.0, False)])
def test_loop_ends_at_the_target_or_the_limit(
    setting: trainers.Setting, target: float, limit_s: float, reached: bool
) -> None:
    setting = setting._replace(reader="plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.peers, "plain", lambda pairs, workers, pin_memory: _decode_here(setting), raising=False)
        run = time_to_dice.run_loop(setting, target, limit_s, time_to_dice.time.monotonic())
    assert (run["seconds"] is not None) == reached
    assert run["epochs"] == 1 or not reached


def _decode_here(setting: trainers.Setting) -> Any:
    return train_row.HostDecoder(setting.train_pairs, 160, 240).decode


SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[2], sys.argv[4])
folder.mkdir(parents=True)
(folder / "config.json").write_text('{"image_height": 160}')
with open(folder / "metrics.jsonl", "w", buffering=1) as file:
    for dice in (0.2, 0.9, 0.3):
        file.write(json.dumps({"val_dice": dice, "val_size": 160}) + "\\n")
    file.write('{"val_di')
    file.flush()
    %s
"""


@pytest.mark.parametrize(
    ("target", "limit_s", "then", "expected"),
    [
        (0.9, 60, "time.sleep(60)", {"best_dice": 0.9, "epochs": 3}),
        (0.95, 60, "sys.exit(0)", {"seconds": None, "best_dice": 0.9, "epochs": 3}),
        (0.95, 1, "time.sleep(60)", {"seconds": None}),
    ],
)
def test_command_is_watched(tmp_path: Path, target: float, limit_s: float, then: str, expected: Any) -> None:
    command = [sys.executable, "-c", SCRIPT % then, "--out-dir", str(tmp_path), "--name", "a"]
    run = time_to_dice.run_command(command, target, limit_s)
    assert run.items() >= expected.items()
    assert (run["seconds"] is None) == (target > 0.9)


def test_a_command_that_fails_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('fastseg: no')", "--out-dir", str(tmp_path), "--name", "a"]
    with pytest.raises(RuntimeError, match="fastseg: no"):
        time_to_dice.run_command(command, 0.9, 60)


def test_only_scores_at_full_size_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_height": 160}')
    assert time_to_dice.read_dice(tmp_path) == []
    lines = ['{"val_dice": 0.98, "val_size": 80}', '{"val_dice": 0.96, "val_size": 160}', '{"val_dice": 0.97, "val_si']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert time_to_dice.read_dice(tmp_path) == [0.0, 0.96]


def test_time_to_dice(two_cars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With `fastseg train` itself; the target is Dice 0."""
    options = ["--data", str(two_cars), "--pairs", "8", "--val-fraction", "0.5", "--channels", "4", "--batch-size", "2"]
    options += ["--time-to-dice", "0", "--racers", "fast", "--repeat", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training.py", *options])
    training.main()
    printed = capsys.readouterr().out
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert row["racer"] == "fast"
    assert row["seconds"] > 1
    assert row["epochs"] >= 1
    assert "seconds to Dice 0" in printed


def test_one_racer_that_fails_stops_no_other(
    setting: trainers.Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"seconds": 2.0, "best_dice": 0.5, "epochs": 1}

    def run_command(command: list[str], target: float, limit_s: float) -> dict[str, Any]:
        if command[command.index("--recipe") + 1] == "fast":
            raise RuntimeError("fastseg train failed: no")
        return done

    monkeypatch.setattr(time_to_dice, "run_command", run_command)
    result = time_to_dice.race(["fast", "tutorial"], setting, 0.4, 60, repeat=2)
    assert "no" in result["missing"]["fast"]
    assert [(row["racer"], row["seconds"], len(row["runs"])) for row in result["rows"]] == [("tutorial", 2.0, 2)]
    assert "fast: not measured" in capsys.readouterr().out


def test_rows_that_begin_elsewhere_are_refused(setting: trainers.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"tutorial": 0.7, "loader": 0.7, "fastseg": 0.701, "smp": 1.2}
    monkeypatch.setattr(
        training, "in_fresh_process", lambda function, name, _: {"exact_loss": losses[name], "pairs_per_s": [1.0]}
    )
    runs, missing = training.measure_all(list(losses), setting, 1)
    assert list(runs) == ["tutorial", "loader", "smp"]
    assert "other weights" in missing["fastseg"]


def test_a_batch_larger_than_the_data_is_refused(two_cars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--data", str(two_cars), "--pairs", "8", "--batch-size", "99"])
    with pytest.raises(fastseg.ConfigError, match=r"--batch-size.*99.*Lower"):
        training.main()
