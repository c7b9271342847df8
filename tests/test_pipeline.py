"""A user's own augmentation and loss: against kornia called directly, resumed runs, two processes, and messages."""

import signal

import kornia.augmentation as K
import pytest
import torch

import fastseg
from fastseg.network.losses import bce_dice_loss, bce_loss
from fastseg.runtime.device import Runtime, seeded
from fastseg.training.step.pipeline import augment_with
from tests.processes import run
from tests.test_distributed import FIELDS, run_program
from tests.test_resume import send_signal
from tests.test_training import config, same, weights


def pipeline() -> K.AugmentationSequential:
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(10.0, (0.1, 0.1), (0.9, 1.1), padding_mode="border", p=0.8),
        K.ColorJitter(0.1, 0.1, 0.1, 0.05),
        K.RandomGaussianNoise(std=0.05, p=0.5),
        data_keys=["input", "mask"],
    )


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 32, 48, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 256, (count, 32, 48), generator=generator, dtype=torch.uint8)


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank, world_size)


def test_a_pipeline_sees_images_and_coverage_between_0_and_1():
    (images, masks), settings = batch(), fastseg.Config(seed=4)
    inputs, targets = augment_with(pipeline(), images, masks, settings, runtime(), 7)
    with seeded(torch.device("cpu"), 4, 7):
        pixels, shapes = pipeline()(images.permute(0, 3, 1, 2) / 255, masks[:, None] / 255)
    torch.testing.assert_close(inputs, (pixels - 0.5) / 0.25, atol=1e-5, rtol=0)
    torch.testing.assert_close(targets, shapes, atol=1e-6, rtol=0)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    again, _ = augment_with(pipeline(), images, masks, settings, runtime(), 7)
    other, _ = augment_with(pipeline(), images, masks, settings, runtime(), 8)
    assert torch.equal(again, inputs)
    assert not torch.equal(other, inputs)


def test_classes_keep_their_numbers():
    images, masks = batch()
    masks = torch.where(masks < 100, 2, torch.where(masks < 200, 0, 255)).to(torch.uint8)
    settings = fastseg.Config(classes=["wall", "floor", "car"])
    _, targets = augment_with(pipeline(), images, masks, settings, runtime(), 0)
    assert targets.dtype == torch.uint8
    assert targets.shape == (4, 1, 32, 48)
    assert set(targets.unique().tolist()) == {0, 2, 255}


def test_ranks_augment_as_one_process_does():
    (images, masks), settings = batch(), fastseg.Config()
    whole = augment_with(pipeline(), images, masks, settings, runtime(), 3)
    for rank in (0, 1):
        part = runtime(rank, 2)
        mine = augment_with(pipeline(), images[part.rank_slice], masks[part.rank_slice], settings, part, 3)
        assert all(torch.equal(a[part.rank_slice], b) for a, b in zip(whole, mine, strict=True))


@pytest.mark.parametrize("number", [1, 3])
def test_resume_equals_uninterrupted(pairs_dir, tmp_path, number, monkeypatch):
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole"), augmentation=pipeline(), loss=bce_loss)
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, number)
        stopped = fastseg.train(config(pairs_dir, tmp_path, name="stopped"), augmentation=pipeline(), loss=bce_loss)
    assert stopped.interrupted
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fastseg.train(config(pairs_dir, tmp_path, name="stopped"), augmentation=pipeline(), loss=bce_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(whole.run_dir / "last.pt"), weights(tmp_path / "stopped/last.pt"))
    ours = fastseg.train(config(pairs_dir, tmp_path, name="ours"), loss=bce_loss)
    assert ours.history[0]["train_loss"] != whole.history[0]["train_loss"]


KILLED = """
import os, signal, sys
import fastseg, torch
from tests.test_networks import halving
from tests.test_pipeline import pipeline

kill = lambda entry: entry["epoch"] == 2 and os.kill(os.getpid(), signal.SIGKILL)
after_epoch = kill if sys.argv[2] == "kill" else None
own = {"network": halving(dropout=0.3), "augmentation": pipeline(), "loss": torch.nn.BCEWithLogitsLoss()}
fastseg.train(sys.argv[1], **own, after_epoch=after_epoch)
"""


def test_a_killed_run_resumes_exactly(pairs_dir, tmp_path):
    """kill -9 after the second epoch, while its checkpoint may still be written: network, pipeline and loss are own."""
    ended = {}
    for name, modes in (("whole", ["run"]), ("killed", ["kill", "run"])):
        settings = config(pairs_dir, tmp_path, name=name, num_epochs=3, network="own")
        settings.to_json(tmp_path / "config.json")
        for mode in modes:
            done = run("-c", KILLED, tmp_path / "config.json", mode)
            assert done.returncode == (-signal.SIGKILL if mode == "kill" else 0), done.stderr
        ended[name] = weights(settings.run_dir / "last.pt")
    assert same(ended["whole"], ended["killed"])


PROGRAM = """
import sys
import fastseg, kornia.augmentation as K
pipeline = K.AugmentationSequential(
    K.RandomHorizontalFlip(p=0.5), K.RandomAffine(10.0), K.ColorJitter(0.1), data_keys=["input", "mask"]
)
fastseg.train(sys.argv[1], augmentation=pipeline)
"""


def test_two_processes_compute_what_one_does(pairs_dir, tmp_path):
    folders = {"train_img_dir": str(pairs_dir / "images"), "train_mask_dir": str(pairs_dir / "masks")}
    settings = fastseg.Config(**FIELDS, **folders, out_dir=str(tmp_path))
    one, two = (run_program(PROGRAM, settings.replace(name=str(count)), tmp_path, count) for count in (1, 2))
    for first, second in zip(one, two, strict=True):
        for score in ("train_loss", "val_loss", "val_dice"):
            assert second[score] == pytest.approx(first[score], abs=1e-4), score


def test_an_own_loss_takes_the_recipes_place(pairs_dir, tmp_path):
    recipe, own, other = (
        fastseg.train(config(pairs_dir, tmp_path, name=name, precision="fp32"), loss=loss)
        for name, loss in (("recipe", None), ("own", bce_dice_loss), ("other", torch.nn.BCEWithLogitsLoss()))
    )
    assert same(weights(recipe.run_dir / "last.pt"), weights(own.run_dir / "last.pt"))
    assert other.history[0]["train_loss"] < own.history[0]["train_loss"]  # BCE alone
    assert other.history[0]["val_loss"] > other.history[0]["train_loss"]  # BCE + Dice


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"augmentation": K.AugmentationSequential(K.RandomHorizontalFlip(), data_keys=["input"])}, "raised"),
        ({"augmentation": K.RandomHorizontalFlip()}, "raised|return"),
        ({"augmentation": lambda images, masks: images}, "return images and masks"),
        ({"augmentation": lambda images, masks: (images[..., 1:], masks)}, r"\(2, 3, 32, 47\)"),
        ({"augmentation": "flip"}, "callable; got str"),
        ({"loss": "dice"}, "callable; got str"),
        ({"loss": lambda logits, targets: logits - targets}, r"scalar.*\(2, 1, 16, 16\)"),
        ({"loss": lambda logits, targets: 0.5}, "scalar.*float"),
        ({"loss": lambda logits, targets: targets.mean()}, "without a gradient"),
        ({"loss": lambda logits: logits.mean()}, r"raised TypeError"),
    ],
)
def test_wrong_callables_are_refused_before_data_are_read(tmp_path, own, words):
    with pytest.raises(fastseg.ConfigError, match=rf"^{next(iter(own))}: .*({words})"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path), **own)
    assert not (tmp_path / "carvana").exists()
