"""A network of a user's own: training, resuming, sizes, checkpoints, prediction, export, messages."""

import copy
import signal

import numpy as np
import pytest
import torch
from torch import nn

import fastseg
from fastseg.network.adapter import Adapter, find_size_multiple
from tests.test_resume import send_signal
from tests.test_training import config, same, weights


class Halving(nn.Module):
    """Halves the image `levels` times, returns logits at 1/`factor` of its size; dropout draws random numbers."""

    def __init__(self, levels: int = 2, factor: int = 1, outputs: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, 1, 1) for i in range(levels))
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ModuleList(nn.Conv2d(12, 6, 3, 1, 1) for _ in range(levels))
        self.head = nn.Conv2d(6, outputs, factor, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.encoder:
            skips.append(block(x).relu())
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.dropout(self.norm(x))
        for block in self.decoder:
            x = block(torch.cat([skips.pop(), nn.functional.interpolate(x, scale_factor=2)], 1)).relu()
        return self.head(x)


def halving(**options) -> Halving:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Halving(**options)


class Patches(nn.Module):
    """One logit per patch, of images of one size."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)
        self.place = nn.Parameter(torch.zeros(1, 3, height, width))
        self.head = nn.Conv2d(3, 1, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.place)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_an_own_network_trains_and_predicts(pairs_dir, tmp_path, factor):
    module = halving(factor=factor)
    before = copy.deepcopy(module.state_dict())
    changes = {"num_epochs": 30, "batch_size": 8, "progressive_resizing": 0.5, "learning_rate": 1e-3, "ema_decay": 0.9}
    settings = config(pairs_dir, tmp_path, **changes)
    result = fastseg.train(settings, network=module)
    assert result.history[-1]["val_loss"] < 0.8 * result.history[0]["val_loss"]
    assert same(module.state_dict(), before)  # a copy was trained
    path = result.run_dir / "best.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["config"]["network"] == "own:tests.test_networks.Halving"
    assert saved["config"]["size_multiple"] == 4
    segmenter = fastseg.load(path, network=module)
    assert same(module.state_dict(), before)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8))
    trained = halving(factor=factor)
    trained.load_state_dict({key.removeprefix("network."): value for key, value in saved["model"].items()})
    logits = trained.eval()((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    logits = nn.functional.interpolate(logits, (32, 48), mode="bilinear")[:, 0]
    torch.testing.assert_close(segmenter(images), logits.sigmoid(), atol=1e-5, rtol=0)
    folders = {"img_dir": pairs_dir / "images", "mask_dir": pairs_dir / "masks"}
    scores = fastseg.evaluate(path, **folders, device="cpu", network=module)
    assert scores["images"] == 12
    predicted = fastseg.predict(path, pairs_dir / "images", tmp_path / "masks", device="cpu", network=module)
    assert predicted.masks == 12


class Tied(nn.Module):
    """Two convolutions that share their weights, which lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 1, 1)
        self.second.weight = self.first.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu())
        if x.mean().item() > 1e9:  # depends on values, which torch.export refuses
            x = -x
        return self.head(x)


def test_tied_weights_are_exported_and_a_network_that_cannot_be_traced_is_named(pairs_dir, tmp_path):
    path = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1), network=Tied()).run_dir / "best.pt"
    written = fastseg.export(path, tmp_path / "net.safetensors", network=Tied())
    assert written["max_difference"] == 0
    with pytest.raises(fastseg.FastsegError, match=r"net\.pt2: .*forward.*another format"):
        fastseg.export(path, tmp_path / "net.pt2", network=Tied())


@pytest.mark.parametrize("name", ["own.safetensors", "own.pt2", "own.onnx"])
def test_an_own_network_is_exported(pairs_dir, tmp_path, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
    module = halving(factor=2)
    path = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1), network=module).run_dir / "best.pt"
    written = fastseg.export(path, tmp_path / name, network=module)
    assert written["max_difference"] is None or written["max_difference"] < 1e-5
    if name.endswith("safetensors"):
        assert same(
            fastseg.load(tmp_path / name, network=module).state_dict(), fastseg.load(path, network=module).state_dict()
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_an_own_network_resumes_exactly(pairs_dir, tmp_path, batch, monkeypatch):
    """Dropout draws the numbers that it would have drawn, whatever the caller's random state is."""
    module, changes = halving(dropout=0.5), {"ema_decay": 0.9}
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole", **changes), network=module)
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, batch)
        assert fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes), network=module).interrupted
    torch.manual_seed(7)
    state = torch.get_rng_state()
    fastseg.train(config(pairs_dir, tmp_path, name="stopped", **changes), network=halving(dropout=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(whole.run_dir / "last.pt"), weights(tmp_path / "stopped/last.pt"))
    plain = fastseg.train(config(pairs_dir, tmp_path, name="plain", **changes), network=halving())
    assert plain.history[0]["train_loss"] != whole.history[0]["train_loss"]  # there was dropout


def test_a_checkpoint_asks_for_its_module(pairs_dir, tmp_path):
    path = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1), network=halving()).run_dir / "best.pt"
    for use in (
        lambda: fastseg.load(path),
        lambda: fastseg.predict(path, pairs_dir / "images", tmp_path / "masks"),
        lambda: fastseg.evaluate(path, pairs_dir / "images", pairs_dir / "masks"),
        lambda: fastseg.export(path, tmp_path / "x.pt2"),
    ):
        with pytest.raises(fastseg.CheckpointError, match=r"best.pt: .*test_networks.Halving.*network="):
            use()
    with pytest.raises(fastseg.ConfigError, match=r"^network: .*own:.*network="):
        fastseg.train(path.parent / "config.json")
    with pytest.raises(fastseg.CheckpointError, match=r"best.pt: .*do not fit.*encoder.2"):
        fastseg.load(path, network=halving(levels=3))
    again = fastseg.train(path.parent / "config.json", network=halving())
    assert again.best_epoch == 1


def test_a_unet_needs_no_module(trained):
    with pytest.raises(fastseg.CheckpointError, match=r"best.pt: .*unet.*Leave out network"):
        fastseg.load(trained / "best.pt", network=halving())


class Fails(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (halving(outputs=2), r"^network: .*\(B, 1, H, W\).*\(1, 2, 32, 48\)"),
        (Fails(lambda x: x[:, :1, 1:]), r"^network: .*whole factor.*\(1, 1, 31, 48\)"),
        (Fails(lambda x: {"out": x}), r"^network: .*a dict"),
        (Fails(lambda x: x[:, 0]), r"^network: .*\(1, 32, 48\)"),
        (Fails(lambda x: x[:, :1] > 0), r"^network: .*torch.bool"),
        (Fails(lambda x: x @ torch.zeros(3, 3)), r"^network: .*32x48.*RuntimeError: .*Correct"),
        (halving(levels=5), r"^image_width: must be divisible by 32 .*got 48. Use 32 or 64"),
        (nn.functional.relu, r"^network: .*torch.nn.Module.*instance"),
        (Halving, r"^network: .*torch.nn.Module.*instance"),
    ],
)
def test_a_wrong_network_is_refused_before_data_are_read(tmp_path, module, message):
    with pytest.raises(fastseg.ConfigError, match=message):
        fastseg.train(config(tmp_path / "nowhere", tmp_path), network=module)
    assert not (tmp_path / "carvana").exists()


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_sizes_are_found(levels):
    module = halving(levels=levels).train() if levels else Fails(lambda x: x[:, :1])
    before = copy.deepcopy(module.state_dict())
    assert find_size_multiple(module, 160, 240, 1) == 2**levels
    assert module.training
    assert same(module.state_dict(), before)


def test_odd_multiples_and_single_sizes_are_found():
    assert find_size_multiple(Fails(lambda x: nn.functional.max_pool2d(x[:, :1], 7)), 140, 140, 1) == 7
    assert find_size_multiple(Patches(160, 240), 160, 240, 1) == 0


def test_images_of_one_size(pairs_dir, tmp_path, caplog):
    """A network that takes one size only trains without small images."""
    caplog.set_level("INFO")
    settings = {**config(pairs_dir, tmp_path).model_dump(), "image_height": 36, "image_width": 60}
    result = fastseg.train(settings, network=Patches(36, 60))  # sizes that the UNet does not take
    assert "progressive_resizing: 0, because" in caplog.text
    segmenter = fastseg.load(result.run_dir / "best.pt", network=Patches(36, 60))
    assert segmenter(torch.zeros(1, 36, 60, 3, dtype=torch.uint8)).shape == (1, 36, 60)
    with pytest.raises(ValueError, match="36 and 60"):
        segmenter(torch.zeros(1, 32, 60, 3, dtype=torch.uint8))


def test_the_adapter_normalises_as_the_encoder_expects():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.rand(2, 3, 8, 8)
    inputs = (pixels - 0.5) / 0.25
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Adapter(nn.Identity(), mean, std)(inputs), expected, atol=1e-5, rtol=0)


def test_compiled_equals_eager(pairs_dir, tmp_path):
    runs = [
        fastseg.train(config(pairs_dir, tmp_path, name=mode, compile=mode, num_epochs=1), network=halving(factor=2))
        for mode in ("off", "on")
    ]
    assert runs[0].history[0]["train_loss"] == pytest.approx(runs[1].history[0]["train_loss"], abs=1e-4)


class Hungry(Halving):
    """Fits in memory with two pairs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_split(pairs_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1), network=Hungry())
    assert "micro_batch: 4 pairs do not fit" in caplog.text
    assert result.best_epoch == 1
    with pytest.raises(fastseg.FastsegError, match=r"^micro_batch: 4 pairs do not fit.*micro_batch=2"):
        fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, name="fixed", micro_batch=4), network=Hungry())
