"""Tests that need a GPU: correct batches under load, constant memory use, and the same result in every dtype.

Skipped without one. `make gpu-check` runs these tests and the benchmarks.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.data.dali.decoder import DaliDecoder
from fastseg.data.loader import Loader, epoch_order
from fastseg.network.unet import UNet
from tests.conftest import write_pair

pytestmark = [pytest.mark.gpu, pytest.mark.dali]

BATCH_SIZE = 16
MAX_ROW_DIFFERENCE = 6.0  # mean grey levels of a row between two JPEG decoders; rows of other images differ by tens


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """64 pairs of Carvana's size, 1918x1280."""
    folder = tmp_path_factory.mktemp("photos")

    def draw(number):
        write_pair(folder, f"car{number // 16}_{number % 16 + 1:02d}", width=1918, height=1280, seed=number)
        path = folder / "images" / f"car{number // 16}_{number % 16 + 1:02d}.jpg"
        with Image.open(path) as photo:  # the walls differ too, so that each row of each image is different
            brightness = (
                np.asarray(photo) * (0.5 + 0.5 * np.abs(np.sin(0.7 * number + np.arange(1280) / 200)))[:, None, None]
            )
        Image.fromarray(brightness.astype(np.uint8)).save(path, quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(64)))
    return fastseg.find_pairs(folder / "images", folder / "masks")


@pytest.fixture(scope="module")
def reference(photos):
    """The pairs decoded on the host, copied to the GPU."""
    loader = Loader(photos, height=160, width=240, batch_size=len(photos), shuffle=False, decoder="host", cache="off")
    images, masks, _ = next(iter(loader))
    return images.cuda().float(), masks.cuda().float()


@pytest.fixture
def training_load():
    """Train a network in another thread, on its own stream, during the test."""
    stop = threading.Event()
    steps = []

    def train():
        model = UNet(32, 4).cuda().to(memory_format=torch.channels_last)
        images = torch.randn(16, 3, 160, 240, device="cuda").to(memory_format=torch.channels_last)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(images).square().mean()
                loss.backward()
                model.zero_grad(set_to_none=True)
                torch.cuda.current_stream().synchronize()
                steps.append(1)

    thread = threading.Thread(target=train)
    thread.start()
    yield steps
    stop.set()
    thread.join()


def row_difference(pixels, exact):
    """The largest mean difference of a row of pixels, so that a strip of another image is found."""
    difference = (pixels.float() - exact).abs()
    return difference.flatten(2).mean(2).max()


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_no_batch_is_torn_or_stale_under_load(photos, reference, training_load, hw_decoder_load):
    """300 batches during training; each image is the requested one."""
    count = 300
    orders = np.concatenate([epoch_order(len(photos), 0, epoch) for epoch in range(-(-count * BATCH_SIZE // 64))])
    decoder = DaliDecoder(photos, 160, 240, num_workers=8, device="cuda", hw_decoder_load=hw_decoder_load)
    worst = torch.zeros(2, device="cuda")
    num_batches, recent = 0, []
    for images, masks, indices in decoder.decode(orders[: count * BATCH_SIZE].reshape(count, BATCH_SIZE)):
        rows = torch.from_numpy(indices).cuda(non_blocking=True)
        recent = [*recent[-4:], (images, masks, rows)]  # the oldest is compared again four batches later
        for value, of in ((images, 0), (masks, 1)):
            difference = row_difference(value, reference[of][rows])
            worst[of] = torch.maximum(worst[of], difference)
        worst[0] = torch.maximum(worst[0], row_difference(recent[0][0], reference[0][recent[0][2]]))
        num_batches += 1
    assert num_batches == count
    assert len(training_load) > 10
    assert worst[0].item() < MAX_ROW_DIFFERENCE
    assert worst[1].item() == 0


@pytest.mark.parametrize("decoder", ["host", "dali"])
def test_memory_use_is_constant_over_fifty_epochs(photos, decoder):
    """Memory of the whole device, including DALI's, after epoch 5 and after epoch 50."""
    loader = Loader(
        photos, height=160, width=240, batch_size=BATCH_SIZE, device="cuda", decoder=decoder, cache="off", num_workers=8
    )
    free = []
    for _ in range(50):
        for images, _, _ in loader:
            images.float().sum()
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[4] - free[-1] < 32 * 2**20


@pytest.fixture(scope="module")
def dice(tmp_path_factory):
    """Train on easy pairs with some precision and `compile`; returns the Dice."""
    folder = tmp_path_factory.mktemp("easy")
    for number in range(24):
        write_pair(folder, f"car{number // 4}_{number % 4 + 1:02d}", width=480, height=320, seed=number)
    common = {
        "train_img_dir": str(folder / "images"),
        "train_mask_dir": str(folder / "masks"),
        "val_img_dir": "",
        "val_fraction": 0.34,
        "base_channels": 16,
        "batch_size": 8,
        "num_epochs": 40,
        "progressive_resizing": 0,  # one size to compile
        "device": "cuda",
        "out_dir": str(folder / "runs"),
    }

    @functools.cache
    def train(precision, compile, **changes):
        settings = {**common, "precision": precision, "compile": compile, **changes}
        return fastseg.train({**settings, "name": "-".join(map(str, (precision, compile, *changes)))}).val_dice

    return train


@pytest.mark.parametrize(
    ("precision", "compile"), [("bf16", "off"), ("fp16", "off"), ("fp16", "graphs"), ("bf16", "on")]
)
def test_every_dtype_and_engine_reaches_the_same_dice(dice, precision, compile):
    """Eager float32 against bf16, fp16 with its scaler, CUDA graphs and compiled code."""
    exact = dice("fp32", "off")
    assert exact > 0.95
    assert dice(precision, compile) == pytest.approx(exact, abs=0.03)


def test_graphs_of_two_sizes_reach_the_same_dice(dice):
    two_sizes = [dice("bf16", compile, progressive_resizing=0.5) for compile in ("off", "graphs")]
    assert two_sizes[0] == pytest.approx(two_sizes[1], abs=0.03)


def test_training_on_the_gpu_resumes_close_to_the_uninterrupted_run(photos, tmp_path):
    """Not bit for bit, because cuDNN sums in no fixed order; the losses must still agree."""
    common = {
        "train_img_dir": photos.image_dir,
        "train_mask_dir": photos.mask_dir,
        "val_img_dir": "",
        "val_fraction": 0.25,
        "base_channels": 8,
        "num_epochs": 6,
        "device": "cuda",
        "precision": "fp32",
        "out_dir": str(tmp_path),
    }
    whole = fastseg.train({**common, "name": "whole"})
    fastseg.train({**common, "name": "halves"}, after_epoch=lambda entry: entry["epoch"] == 3)
    halves = fastseg.train({**common, "name": "halves"})
    losses = [[entry["train_loss"] for entry in run.history] for run in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_partly_cached_epoch_keeps_its_order(photos):
    """Batches from RAM and from the GPU's decoder arrive in the requested order."""
    loader = Loader(
        photos, height=160, width=240, batch_size=8, device="cuda", decoder="dali", cache="memory", num_workers=4
    )
    next(iter(loader))
    state = loader.state_dict() | {"epoch": 1, "step": 0}
    loader.load_state_dict(state)
    seen = np.concatenate([indices for _, _, indices in loader])
    assert seen.tolist() == epoch_order(len(photos), 0, 1).tolist()
