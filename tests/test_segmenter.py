"""The network with its preprocessing, against the bare network in float64; and files that are not checkpoints."""

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
    assert probabilities.std() > 0.2  # nearly constant outputs would agree in any case


def test_red_is_not_blue(checkpoint):
    """Swapping red and blue changes the result."""
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
    ("shape", "dtype", "words"),
    [
        ((1, 32, 48, 3), torch.float32, ["uint8 (B, H, W, 3)", "torch.float32 (1, 32, 48, 3)"]),
        ((32, 48, 3), torch.uint8, ["uint8 (B, H, W, 3)", "torch.uint8 (32, 48, 3)"]),
        ((1, 3, 32, 48), torch.uint8, ["uint8 (B, H, W, 3)", "torch.uint8 (1, 3, 32, 48)"]),
        ((1, 32, 46, 3), torch.uint8, ["divisible by 4", "32 x 46"]),
    ],
)
def test_wrong_images_are_refused(checkpoint, shape, dtype, words):
    with pytest.raises(ValueError, match="^images .*" + ".*".join(map(re.escape, words))):
        fastseg.load(checkpoint)(torch.zeros(shape, dtype=dtype))


def test_unavailable_device_is_refused(checkpoint):
    with pytest.raises(fastseg.ConfigError, match=r"^device: .*cuda:N.*'gpu'"):
        fastseg.load(checkpoint, device="gpu")
    with pytest.raises(fastseg.ConfigError, match=r"^device: cuda:99 "):
        fastseg.load(checkpoint, device=torch.device("cuda:99"))


def assert_refused(path, *words):
    """A CheckpointError that begins with the file and holds the words in order."""
    with pytest.raises(fastseg.CheckpointError, match="^" + ".*".join(map(re.escape, (f"{path}: ", *words)))):
        fastseg.load(path)


@pytest.mark.parametrize("name", ["best.pt", "best.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    assert_refused(tmp_path / name, "No such file", "existing checkpoint")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_files_are_refused(checkpoint, tmp_path, name):
    intact, path = tmp_path / f"intact_{name}", tmp_path / name
    if name.endswith(".pt"):
        intact.write_bytes(checkpoint.read_bytes())
    else:
        fastseg.export(checkpoint, intact)
    data = intact.read_bytes()
    fastseg.load(intact)
    for length in (0, 5, 9, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(path, "damaged", "another")


def test_safetensors_of_other_programs_are_refused(checkpoint, tmp_path):
    unet, config = load_model(checkpoint)
    path, fields = tmp_path / "model.safetensors", config.model_dump()
    for metadata, *words in (
        (None, "version of fastseg"),
        ({"format": "pt"}, "version of fastseg"),
        ({"config": "[1, 2]"}, "version of fastseg"),
        ({"config": '{"layers": 3}'}, "version of fastseg"),
        ({"config": "no JSON"}, "damaged"),
        ({"config": json.dumps({**fields, "base_channels": 8})}, "weights", "base_channels 8, depth 2"),
        ({"config": json.dumps({**fields, "batch_size": -1})}, "configuration", "batch_size: ", "at least"),
    ):
        save_file(unet.state_dict(), path, metadata)
        assert_refused(path, *words)
    save_file(unet.state_dict(), path, {"config": json.dumps(fields)})
    assert fastseg.load(path).config == config
