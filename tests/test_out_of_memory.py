"""Out of memory, injected on the CPU: batches are split until they fit, and then one message ends the run."""

import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastseg
from fastseg.data.loader import Loader
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.memory import free_memory
from fastseg.runtime.out_of_memory import halve_until_it_fits, is_out_of_memory
from fastseg.training.loop import train_step
from fastseg.training.setup import build_run, find_splits, load_or_init_model
from fastseg.training.step import micro_batch as micro_batch_module
from fastseg.training.step.augment import augment, sample_params
from fastseg.training.step.micro_batch import estimate_batch_size, fit_micro_batch
from tests.conftest import write_checkpoint
from tests.test_resume import send_signal
from tests.test_training import config, same

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity ..."),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2684354560 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "NumPy": MemoryError("Unable to allocate 2.50 GiB for an array with shape (671088640,) and data type float32"),
}
AMOUNT = r"2\.50 GiB were asked for; [0-9.]+ .iB are free"
UNET = fastseg.UNet.forward


@pytest.fixture
def limit(monkeypatch):
    """Let the network fail for more than a number of images, once its whole forward or backward pass has been made."""

    def set_limit(images: int, error: Exception = ERRORS["GPU"], backward: bool = False) -> list[int]:
        sizes = []

        def fail(*_):
            raise error

        def forward(self, x):
            if x.is_meta:  # of the estimate
                return UNET(self, x)
            sizes.append(len(x))
            if backward and torch.is_grad_enabled() and len(x) > images:
                x = x.detach().requires_grad_()
                x.register_hook(fail)  # the last gradient; all others are there
                return UNET(self, x)
            logits = UNET(self, x)  # changes the statistics of batch norm
            if len(x) > images:
                fail()
            return logits

        monkeypatch.setattr(fastseg.UNet, "forward", forward)
        return sizes

    return set_limit


def make_run(settings):
    runtime = choose_runtime(settings)
    model, _ = load_or_init_model(settings)
    return build_run(settings, runtime, model, *find_splits(settings))


def gradients_of_step(settings, images, masks):
    """The gradients that the optimizer receives, with the statistics of batch norm fixed, and the loss."""
    run, gradients = make_run(settings), []
    run.model.eval()
    run.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in run.model.parameters()))
    train_step(run, images, masks)
    assert run.step == 1
    return gradients, run.loss_sum.item()


@pytest.mark.parametrize("recipe", ["fast", "tutorial"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 9])
def test_accumulated_gradients_are_those_of_the_whole_batch(pairs_dir, tmp_path, recipe, micro_batch):
    """Compared with the gradients of the loss in float64; 3 leaves a part of another size."""
    settings = config(pairs_dir, tmp_path, recipe=recipe, precision="fp32", progressive_resizing=0)
    run = make_run(settings)
    images, masks, _ = next(iter(run.train_loader))
    inputs, targets = augment(images, masks, sample_params(settings, 4, torch.Generator().manual_seed(0)))
    model = run.model.eval().double()
    logits, targets = model(inputs.double()), targets.double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    if recipe == "fast":
        probability, pixels = logits.sigmoid(), (1, 2, 3)
        both = 2 * (probability * targets).sum(pixels) + 1
        expected = expected + (1 - both / (probability.sum(pixels) + targets.sum(pixels) + 1)).mean()
    expected.backward()
    gradients, loss = gradients_of_step(settings.replace(micro_batch=micro_batch), images, masks)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_run_that_halves_its_batch_equals_one_with_that_micro_batch(
    pairs_dir, tmp_path, limit, caplog, name, backward
):
    """All that last.pt holds: weights, statistics, optimizer, EMA, loss, and the random generator."""
    caplog.set_level("INFO")
    settings = config(pairs_dir, tmp_path, ema_decay=0.5, progressive_resizing=0)
    given = fastseg.train(settings.replace(name="given", micro_batch=1))
    limit(1, ERRORS[name], backward)
    halved = fastseg.train(settings.replace(name="halved"))
    logged = [line for line in caplog.messages if line.startswith("micro_batch: ")]
    assert [line.split(" ")[1] for line in logged] == ["4", "2"]  # once each
    first, second = (torch.load(run.run_dir / "last.pt", weights_only=True) for run in (given, halved))
    for part in ("model", "ema_model"):
        assert same(first[part], second[part])
    assert torch.equal(first["generator"], second["generator"])
    for index, state in first["optimizer"]["state"].items():
        assert same(state, second["optimizer"]["state"][index])
    assert [entry["train_loss"] for entry in given.history] == [entry["train_loss"] for entry in halved.history]


def test_a_failure_in_a_later_step_changes_nothing_else(pairs_dir, tmp_path, monkeypatch):
    """The first step runs whole; in the second, memory has become short. A run that is told to split there is equal."""
    settings = config(pairs_dir, tmp_path, progressive_resizing=0)
    batches = [batch[:2] for batch in make_run(settings).train_loader][:2]
    told, halved = make_run(settings), make_run(settings)
    for run in (told, halved):
        run.model.train()
        train_step(run, *batches[0])
    told.micro_batch = 2
    train_step(told, *batches[1])

    def forward(self, x):
        logits = UNET(self, x)
        if len(x) > 2:
            raise ERRORS["GPU"]
        return logits

    monkeypatch.setattr(fastseg.UNet, "forward", forward)
    train_step(halved, *batches[1])
    assert halved.micro_batch == 2
    assert same(told.model.state_dict(), halved.model.state_dict())
    assert torch.equal(told.loss_sum, halved.loss_sum)
    assert torch.equal(told.generator.get_state(), halved.generator.get_state())
    assert all(parameter.grad is None for parameter in halved.model.parameters())


def test_a_resumed_run_splits_again(pairs_dir, tmp_path, limit, monkeypatch):
    settings = config(pairs_dir, tmp_path, progressive_resizing=0, num_epochs=3)
    given = fastseg.train(settings.replace(name="given", micro_batch=2))
    sizes = limit(2)
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, batch=3)
        assert fastseg.train(settings.replace(name="halved")).interrupted
    sizes.clear()
    halved = fastseg.train(settings.replace(name="halved"))
    assert sizes[:2] == [4, 2]
    first, second = (torch.load(run.run_dir / "last.pt", weights_only=True)["model"] for run in (given, halved))
    assert same(first, second)


@pytest.mark.parametrize("name", ERRORS)
def test_one_pair_that_does_not_fit_is_one_message(pairs_dir, tmp_path, limit, name):
    sizes = limit(0, ERRORS[name])
    with pytest.raises(fastseg.FastsegError, match=f"^batch_size: not even one pair.*{AMOUNT}.*base_channels"):
        fastseg.train(config(pairs_dir, tmp_path))
    assert sizes == [4, 2, 1]


def test_a_given_micro_batch_is_not_halved(pairs_dir, tmp_path, limit, monkeypatch):
    sizes = limit(1)
    for free, words in ((2**40, "by estimate 1 do.*micro_batch=1"), (0, "by estimate 0 do.*base_channels")):
        monkeypatch.setattr(micro_batch_module, "free_memory", lambda device, free=free: free)
        with pytest.raises(fastseg.FastsegError, match=f"^micro_batch: 2 pairs.*{words}"):
            fastseg.train(config(pairs_dir, tmp_path, micro_batch=2))
    assert sizes == [2, 2]


def test_a_rank_among_others_does_not_halve_alone(pairs_dir, tmp_path, limit):
    run = make_run(config(pairs_dir, tmp_path))
    run.runtime = replace(run.runtime, world_size=2)
    sizes = limit(1)
    with pytest.raises(fastseg.FastsegError, match=r"^batch_size: 2 pairs.*by estimate 1 do.*micro_batch=1.*process"):
        train_step(run, torch.zeros(2, 32, 48, 3, dtype=torch.uint8), torch.zeros(2, 32, 48, dtype=torch.uint8))
    assert sizes == [2]


def test_captured_graphs_are_not_split(pairs_dir, tmp_path):
    with pytest.raises(fastseg.ConfigError, match=r"^micro_batch: .*graphs.*got 2.*compile=auto"):
        config(pairs_dir, tmp_path, compile="graphs", micro_batch=2)
    run = make_run(config(pairs_dir, tmp_path))
    run.compiled = "graphs"

    def backward(micro_batch):
        assert micro_batch == 4
        raise ERRORS["GPU"]

    with pytest.raises(fastseg.FastsegError, match=r"^batch_size: 4 pairs.*by estimate 3 do.*batch_size=3.*compile="):
        fit_micro_batch(run, backward, 4)


@pytest.mark.parametrize("place", ["loader", "optimizer"])
def test_out_of_memory_elsewhere_in_training_is_one_message(pairs_dir, tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise ERRORS["CPU"]

    owner, name = {"loader": (Loader, "__iter__"), "optimizer": (torch.optim.AdamW, "step")}[place]
    monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(micro_batch_module, "free_memory", lambda device: 10**9)
    with pytest.raises(fastseg.FastsegError, match=rf"^memory: .*{AMOUNT}.*estimate.*batch_size=[1-9]"):
        fastseg.train(config(pairs_dir, tmp_path))


def test_other_errors_pass_unchanged(pairs_dir, tmp_path, limit):
    sizes = limit(0, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        fastseg.train(config(pairs_dir, tmp_path))
    assert sizes == [4]
    assert not is_out_of_memory(ValueError("out of memory"))


def test_validation_halves_its_batches(pairs_dir, tmp_path, limit):
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole", micro_batch=1, num_epochs=1)).history[0]
    limit(1)
    halved = fastseg.train(config(pairs_dir, tmp_path, name="halved", micro_batch=1, num_epochs=1)).history[0]
    for score in ("val_loss", "val_dice", "val_iou", "val_dice_pixels"):
        assert halved[score] == pytest.approx(whole[score], abs=1e-6), score


def test_evaluation_halves_its_batches(pairs_dir, tmp_path, limit):
    folders = (pairs_dir / "images", pairs_dir / "masks")
    checkpoint = write_checkpoint(tmp_path / "best.pt", batch_size=5, precision="fp32")
    whole = fastseg.evaluate(checkpoint, *folders, device="cpu", precision="fp32")
    sizes = limit(2)
    halved = fastseg.evaluate(checkpoint, *folders, device="cpu", precision="fp32")
    assert sizes == [5, 3, 2, 2, 1, 2, 2, 1, 2]
    for score in ("loss", "dice", "full_dice", "full_boundary_iou"):
        assert halved[score] == pytest.approx(whole[score], abs=1e-6), score
    limit(0)
    with pytest.raises(fastseg.FastsegError, match=f"^batch_size: not even one image.*{AMOUNT}"):
        fastseg.evaluate(checkpoint, *folders, device="cpu")


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_prediction_halves_its_batches(pairs_dir, tmp_path, limit, tta):
    checkpoint = write_checkpoint(tmp_path / "best.pt", batch_size=5)
    options = {"images": pairs_dir / "images", "device": "cpu", "precision": "fp32", "tta": tta}
    fastseg.predict(checkpoint, out=tmp_path / "whole", **options)
    sizes = limit(2)
    assert fastseg.predict(checkpoint, out=tmp_path / "halved", **options).masks == 12
    assert sizes[:3] == [5, 3, 2]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "halved" / path.name).read_bytes() == path.read_bytes()
    limit(0)
    with pytest.raises(fastseg.FastsegError, match=f"^batch_size: not even one image.*{AMOUNT}"):
        fastseg.predict(checkpoint, out=tmp_path / "none", **options)


def test_out_of_memory_in_a_thread_of_prediction_is_one_message(pairs_dir, tmp_path, monkeypatch, cli):
    checkpoint = write_checkpoint(tmp_path / "best.pt")

    def fail(*_, **__):
        raise ERRORS["NumPy"]

    monkeypatch.setattr("fastseg.masks.stages.write_results", fail)
    arguments = ("predict", "--checkpoint", checkpoint, "--images", pairs_dir / "images", "--out", tmp_path / "out")
    cli(*arguments, "--device", "cpu").assert_refused("memory: ", "2.50 GiB", "free", "batch_size")


def test_the_size_that_fits_serves_later_batches():
    sizes = []

    def forward(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise ERRORS["GPU"]
        return 2 * images

    forward_in_parts = halve_until_it_fits(forward, torch.device("cpu"))
    for count in (10, 7, 2):
        images = torch.rand(count, 3)
        assert torch.equal(forward_in_parts(images), 2 * images)
    assert sizes == [10, 5, 3, 3, 3, 1, 3, 3, 1, 2]


PEAK = """
from pathlib import Path
import torch
from fastseg import Config
from fastseg.network.checkpoint import build_model

model = build_model(Config(base_channels=16, depth=2)).train().to(memory_format=torch.channels_last)

def peak_after_step(pairs):
    x = torch.zeros(pairs, 3, 160, 240).contiguous(memory_format=torch.channels_last)
    model(x).sum().backward()
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])  # ru_maxrss would begin at that of the parent process

small = peak_after_step(2)
print((peak_after_step(10) - small) / 8)
"""


def test_the_estimate_resembles_the_measured_peak(monkeypatch):
    """Bytes per pair, against what the kernel counts in a process of its own."""
    measured = float(subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout)
    monkeypatch.setattr(micro_batch_module, "free_memory", lambda device: 10**12)
    runtime = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    settings = fastseg.Config(base_channels=16, depth=2)
    assert 10**12 / estimate_batch_size(settings, runtime) == pytest.approx(measured, rel=0.35)
    half = SimpleNamespace(device=runtime.device, dtype=torch.bfloat16)
    assert estimate_batch_size(settings, half) == pytest.approx(2 * estimate_batch_size(settings, runtime), abs=2)


@pytest.mark.gpu
def test_free_memory_of_the_gpu_is_its_drivers():
    device = torch.device("cuda", 0)
    before = free_memory(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - free_memory(device) == pytest.approx(2**28, rel=0.1)
    del held
