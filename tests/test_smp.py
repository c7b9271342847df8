"""Networks of segmentation-models-pytorch: training, resuming, ranks, normalisation, prediction, export, messages."""

import signal
import sys

import pytest
import torch
from peers import import_torchvision

import fastseg
from fastseg.network.architecture import build_model, resolve_sizes
from tests.conftest import ROOT
from tests.test_distributed import run_program
from tests.test_resume import assert_kill_changes_nothing, send_signal
from tests.test_training import config, same, weights

NETWORK = "smp:FPN:mobilenet_v2"  # with dropout
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def smp():
    try:
        operators = import_torchvision()
    except ImportError:
        pytest.skip("needs torchvision")
    yield pytest.importorskip("segmentation_models_pytorch")
    del operators


def smp_config(pairs_dir, tmp_path, **changes) -> fastseg.Config:
    size = {"image_height": 64, "image_width": 96, "batch_size": 8}
    return config(pairs_dir, tmp_path, network=NETWORK, **{**size, **changes})


@pytest.mark.usefixtures("smp")
def test_an_smp_network_trains_resumes_predicts_and_exports(pairs_dir, tmp_path, monkeypatch):
    changes = {"batch_size": 4, "freeze_encoder": 2, "encoder_lr": 0.1}
    whole = fastseg.train(smp_config(pairs_dir, tmp_path, name="whole", **changes))
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, 3)  # one step after the encoder's first
        assert fastseg.train(smp_config(pairs_dir, tmp_path, name="stopped", **changes)).interrupted
    fastseg.train(smp_config(pairs_dir, tmp_path, name="stopped", **changes))
    assert same(weights(whole.run_dir / "last.pt"), weights(tmp_path / "stopped/last.pt"))
    path = whole.run_dir / "best.pt"
    scores = fastseg.evaluate(path, pairs_dir / "images", pairs_dir / "masks", device="cpu")
    assert scores["images"] == 12
    assert fastseg.predict(path, pairs_dir / "images", tmp_path / "masks", device="cpu").masks == 12
    assert fastseg.export(path, tmp_path / "smp.pt2")["max_difference"] < 1e-4
    fastseg.export(path, tmp_path / "smp.safetensors")
    assert same(fastseg.load(tmp_path / "smp.safetensors").state_dict(), fastseg.load(path).state_dict())


def test_the_encoders_normalisation_is_used_and_stored(pairs_dir, tmp_path, smp, monkeypatch):
    create = smp.create_model
    asked = []

    def create_model(*names, encoder_weights, **options):
        asked.append(encoder_weights)
        return create(*names, encoder_weights=None, **options)

    with monkeypatch.context() as patch:
        patch.setattr(smp, "create_model", create_model)
        patch.setattr(smp.encoders, "get_preprocessing_params", lambda *names: IMAGENET)
        result = fastseg.train(smp_config(pairs_dir, tmp_path, num_epochs=1, encoder_weights="imagenet"))
        assert asked == ["imagenet"]
        fastseg.train(smp_config(pairs_dir, tmp_path, num_epochs=2, encoder_weights="imagenet"))  # resumes
        assert asked == ["imagenet", None]
    model = fastseg.load(result.run_dir / "best.pt").unet  # without the weights and their description
    pixels = torch.rand(2, 3, 64, 96)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET.values())
    with torch.no_grad():
        expected = model.network((pixels - mean) / std)
        torch.testing.assert_close(model((pixels - 0.5) / 0.25), expected, atol=1e-4, rtol=1e-4)


IMPORT_TORCHVISION = f"""
import sys
sys.path.append({str(ROOT / "benchmarks")!r})
from peers import import_torchvision
operators = import_torchvision()
"""

PROGRAM = f"""{IMPORT_TORCHVISION}
import fastseg
fastseg.train(sys.argv[1])
"""


@pytest.mark.usefixtures("smp")
def test_kill_nine_does_not_change_the_result(pairs_dir, tmp_path):
    settings = smp_config(pairs_dir, tmp_path, batch_size=4, num_epochs=3, freeze_encoder=3)
    assert_kill_changes_nothing(settings, tmp_path, 4, IMPORT_TORCHVISION)


@pytest.mark.usefixtures("smp")
def test_two_processes_compute_what_one_does(pairs_dir, tmp_path):
    network = "smp:Linknet:resnet18"  # without dropout, whose numbers differ between processes
    settings = smp_config(pairs_dir, tmp_path, precision="fp32").replace(network=network)
    one, two = (run_program(PROGRAM, settings.replace(name=str(count)), tmp_path, count) for count in (1, 2))
    for score in ("train_loss", "val_loss", "val_dice"):
        assert two[0][score] == pytest.approx(one[0][score], abs=1e-3), score


@pytest.mark.usefixtures("smp")
@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("smp:Nope:resnet18", r"^network: .*no architecture Nope.*Unet"),
        ("smp:Unet:resnet19", r"^network: .*resnet19.*Choose another"),
        ("smp:DPT:resnet18", r"^network: .*smp:DPT:resnet18.*tu-"),
    ],
)
def test_unknown_names_are_refused(network, words):
    with pytest.raises(fastseg.ConfigError, match=words):
        build_model(fastseg.Config(network=network))


@pytest.mark.usefixtures("smp")
def test_a_size_that_the_network_cannot_divide_is_named():
    settings = fastseg.Config(network="smp:DeepLabV3Plus:mobilenet_v2", image_height=160, image_width=232)
    with pytest.raises(fastseg.ConfigError, match=r"^image_width: .*by 16 .*got 232. Use 224 or 240"):
        resolve_sizes(settings, build_model(settings))


def test_weights_that_cannot_be_downloaded(smp, monkeypatch):
    def fail(*arguments, **options):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(smp, "create_model", fail)
    settings = fastseg.Config(network=NETWORK, encoder_weights="imagenet")
    with pytest.raises(fastseg.ConfigError, match=r"^encoder_weights: .*downloaded.*no connection.*empty"):
        build_model(settings, pretrained=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(fastseg.ConfigError, match=r"^network: .*not installed.*fastseg-dali\[smp\]"):
        build_model(fastseg.Config(network=NETWORK))


@pytest.mark.parametrize("network", ["Unet", "smp:Unet", "smp:Unet:", "smp:../x:y", "own_module"])
def test_a_name_has_one_of_three_forms(network):
    with pytest.raises(fastseg.ConfigError, match=r"^network: must be .*smp:Unet:resnet34"):
        fastseg.Config(network=network)
