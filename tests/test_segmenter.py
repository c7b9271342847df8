"""The network with its preprocessing, against the bare network in float64; and what is no checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastseg
from fastseg.network.checkpoint import load_model
from tests.conftest import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 48), (3, 32, 48), (2, 4, 20)])
def test_probabilities_are_those_of_the_network_on_normalised_photos(checkpoint, batch, height, width):
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    probabilities = fastseg.load(checkpoint)(torch.from_numpy(pixels))
    assert probabilities.shape == (batch, height, width)
    assert probabilities.dtype == torch.float32
    unet, _ = load_model(checkpoint)
    inputs = torch.from_numpy((pixels.astype(np.float64) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    logits = unet.double()(inputs)[:, 0].detach().numpy()
    np.testing.assert_allclose(probabilities.numpy(), 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert probabilities.std() > 0.2  # or agreement would mean little


def test_red_is_not_blue(checkpoint):
    """The colours' order counts: a picture and its mirror image in colour differ."""
    segmenter = fastseg.load(checkpoint)
    pixels = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (segmenter(pixels) - segmenter(pixels.flip(3))).abs().max() > 0.05


def test_loaded_network_is_ready_for_use(checkpoint):
    segmenter = fastseg.load(checkpoint)
    assert isinstance(segmenter, fastseg.Segmenter)
    assert not any(module.training for module in segmenter.modules())
    assert not any(parameter.requires_grad for parameter in segmenter.parameters())
    assert {parameter.device.type for parameter in segmenter.parameters()} == {"cpu"}
    assert segmenter.config == load_model(checkpoint)[1]
    assert (segmenter.config.image_height, segmenter.config.base_channels) == (32, 4)


@pytest.mark.gpu
def test_network_on_a_gpu_agrees(checkpoint):
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    there = fastseg.load(checkpoint, device="cuda")(pixels.cuda())
    torch.testing.assert_close(there.cpu(), fastseg.load(checkpoint)(pixels), atol=1e-2, rtol=0)  # TF32


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(1, 32, 48, 3), "images must be uint8 (B, H, W, 3); got torch.float32 (1, 32, 48, 3)."),
        (torch.zeros(32, 48, 3, dtype=torch.uint8), "images must be uint8 (B, H, W, 3); got torch.uint8 (32, 48, 3)."),
        (
            torch.zeros(1, 3, 32, 48, dtype=torch.uint8),
            "images must be uint8 (B, H, W, 3); got torch.uint8 (1, 3, 32, 48).",
        ),
        (
            torch.zeros(1, 32, 46, 3, dtype=torch.uint8),
            "images must have a height and a width divisible by 4; got 32 x 46.",
        ),
    ],
)
def test_wrong_images_are_refused(checkpoint, images, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fastseg.load(checkpoint)(images)


def test_device_that_is_not_here_is_refused(checkpoint):
    with pytest.raises(fastseg.ConfigError, match=r"^device: must be auto, cpu, cuda or cuda:N; got 'gpu'"):
        fastseg.load(checkpoint, device="gpu")
    with pytest.raises(fastseg.ConfigError, match=r"^device: cuda:99 "):
        fastseg.load(checkpoint, device=torch.device("cuda:99"))


DAMAGED = "{path}: is damaged or no checkpoint. Use another, or remove it."
FOREIGN = "{path}: is no checkpoint of this version of fastseg (format 1). Use one that it wrote."


def refusal(path):
    with pytest.raises(fastseg.CheckpointError) as error:
        fastseg.load(path)
    return str(error.value)


def test_missing_file_is_named(tmp_path):
    for name in ("best.pt", "best.safetensors"):
        path = tmp_path / name
        assert refusal(path) == f"{path}: cannot be read (No such file or directory). Name an existing checkpoint."


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_files_are_refused(checkpoint, tmp_path, name):
    whole, path = tmp_path / f"whole_{name}", tmp_path / name
    if name.endswith(".pt"):
        whole.write_bytes(checkpoint.read_bytes())
    else:
        fastseg.export(checkpoint, whole)
    data = whole.read_bytes()
    fastseg.load(whole)
    for length in (0, 5, 9, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert refusal(path) == DAMAGED.format(path=path)


def test_others_safetensors_are_refused(checkpoint, tmp_path):
    unet, config = load_model(checkpoint)
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"config": "[1, 2]"}, {"config": '{"layers": 3}'}):
        save_file(unet.state_dict(), path, metadata)
        assert refusal(path) == FOREIGN.format(path=path)
    save_file(unet.state_dict(), path, {"config": "no JSON"})
    assert refusal(path) == DAMAGED.format(path=path)
    save_file(unet.state_dict(), path, {"config": json.dumps({**config.model_dump(), "base_channels": 8})})
    assert refusal(path).startswith(f"{path}: must hold the weights of a network with base_channels 8 and depth 2")
    save_file(unet.state_dict(), path, {"config": json.dumps({**config.model_dump(), "batch_size": -1})})
    assert refusal(path).startswith(f"{path}: holds a configuration that cannot be used (batch_size: must be at least")
    save_file(unet.state_dict(), path, {"config": json.dumps(config.model_dump())})
    assert fastseg.load(path).config == config
