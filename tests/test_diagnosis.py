"""Black masks are reported at once, with the reasons that the data speak for first."""

import re

import pytest
from PIL import Image

import fastseg
from fastseg.network.unet import UNet
from fastseg.quality.diagnosis import explain_predictions, foreground_shares, warn_of_uniform_masks
from tests.conftest import fields

ENTRY = {"epoch": 3, "val_predicted": 0.0, "val_foreground": 0.2, "val_dice_pixels": 0.0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "epoch 3 are empty"),
        ({"val_predicted": 1.0, "val_dice_pixels": 1 / 3}, "epoch 3 are full"),
        ({"val_predicted": 0.3, "val_dice_pixels": 0.3}, "0.300 .* below 0.333, .* everything"),
        ({"val_predicted": 0.3, "val_foreground": 0.0}, "below 1.000, .* nothing"),
    ],
)
def test_the_problem_is_named(changes, problem):
    message = explain_predictions({**ENTRY, **changes}, [0.2], 1e-4, 1000)
    assert re.search(problem, message), message


@pytest.mark.parametrize(
    "changes",
    [
        {"val_predicted": 0.2, "val_dice_pixels": 0.4},
        {"val_foreground": 0.0, "val_dice_pixels": 1.0},
        {"val_predicted": 1.0, "val_foreground": 1.0, "val_dice_pixels": 1.0},
    ],
)
def test_better_than_guessing_is_no_problem(changes):
    assert explain_predictions({**ENTRY, **changes}, [0.2], 1e-4, 1000) == ""


@pytest.mark.parametrize(
    ("shares", "learning_rate", "steps", "first"),
    [
        ([0.0, 0.2, 0.3], 1e-4, 1000, "mask values: 1 of 3"),
        ([0.2], 1e-4, 10, "too few steps: 10"),
        ([0.2], 0.1, 1000, "learning_rate: 0.1"),
        ([0.001], 1e-4, 1000, "class share: foreground covers 0.10%"),
    ],
)
def test_the_reason_that_the_data_speak_for_comes_first(shares, learning_rate, steps, first):
    message = explain_predictions(ENTRY, shares, learning_rate, steps)
    assert f"(1) {first}" in message
    assert "pairs: " in message


def test_uniform_masks():
    assert "are empty" in warn_of_uniform_masks([0.0, 0.0])
    assert "are full" in warn_of_uniform_masks([1.0])
    assert warn_of_uniform_masks([0.0, 1.0]) == warn_of_uniform_masks([]) == ""


def test_a_run_with_black_masks_says_so(data, caplog):
    for path in (data / "masks").iterdir():
        Image.new("1", (96, 64)).save(path)
    fastseg.train(fields(data, data))
    assert "all of 4 training masks that were read are empty" in caplog.text


@pytest.mark.usefixtures("pictures")
def test_a_run_with_empty_predictions_says_so_once_and_draws_them(data, caplog, monkeypatch):
    """The head's bias is so low that no pixel is foreground."""
    settings = fastseg.Config(**fields(data, data, num_epochs=3, learning_rate=1e-12))
    drawn = []

    def after_epoch(entry):
        drawn.append((settings.run_dir / "overlay.png").exists())

    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x: forward(self, x) - 100)
    result = fastseg.train(settings, after_epoch=after_epoch)
    assert drawn == [True, True, True]
    assert caplog.text.count("are empty. Likely reasons") == 1
    assert result.history[0]["val_predicted"] == 0
    shares = foreground_shares(fastseg.find_pairs(data / "images", data / "masks"))
    assert result.history[0]["val_foreground"] == pytest.approx(sum(shares) / 4, abs=0.02)
