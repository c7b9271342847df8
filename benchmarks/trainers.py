"""The rows of training.py: their parts, ready to step. `train_row.py` measures them.

A row of the waterfall has everything that the rows above it have. From `augmentation` on, a row is fastseg itself:
`build_run` builds it, `train_step` steps it; `fastseg`, `graphs` and `compile` are
`fastseg.train` with compile=off, compile=graphs and compile=on. The rows above are the loop of the tutorials, around
the same network, loss and order of pairs; `build_run` gives them the network, Adam, and our loader where a row has it.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
from torch import Tensor, nn

import fastseg
from fastseg.config import Config
from fastseg.data.loader import epoch_order
from fastseg.network.checkpoint import build_model
from fastseg.network.losses import bce_loss
from fastseg.runtime.device import choose_runtime
from fastseg.runtime.memory import set_retaining_allocator
from fastseg.training.loop import train_step
from fastseg.training.setup import build_run
from fastseg.training.state import Run
from fastseg.training.step.compile import compile_model

WATERFALL = {
    "tutorial": "torch DataLoader, Pillow, kornia's classes, Adam, float32, NCHW",
    "loader": "+ our loader: decodes at 1/8, caches",
    "channels_last": "+ channels-last",
    "autocast": "+ autocast",
    "augmentation": "+ our augmentation",
    "fastseg": "+ Muon and fused AdamW, one cycle, BCE + Dice, freed memory retained: fastseg.train, eager",
    "graphs": "+ CUDA graphs: fastseg.train, captured",
    "compile": "+ torch.compile instead: fastseg.train, compiled",
    "compile_graphs": '+ both: mode="reduce-overhead"',
}
NEED_GPU = ("graphs", "compile_graphs")
COMPILED = {"graphs": "graphs", "compile": "on", "compile_graphs": "on"}  # the rows' `Config.compile`
PEERS = {
    "plain": "torch DataLoader, autocast, channels-last, eager",
    "smp": "the same, segmentation-models-pytorch's Unet with resnet34: another network",
}
PEERS_HAVE = {"channels_last", "autocast"}

Batches = Iterable[tuple[Tensor, Tensor, Any]]


class Setting(NamedTuple):
    """The part that all rows share."""

    train_pairs: fastseg.Pairs
    val_pairs: fastseg.Pairs
    config: Config
    reader: str  # of the DataLoader: a function in peers
    reader_workers: dict[str, int]  # by row
    rounds: int


class Trainer(NamedTuple):
    """A row, ready to step."""

    run: Run
    layout: torch.memory_format
    epoch: Callable[[], Batches]  # uint8 on the device
    step: Callable[[Tensor, Tensor], None]
    compile_s: float  # seconds of compiling or capturing before the first step


def make_trainer(name: str, setting: Setting) -> Trainer:
    """Build a row; the same seed gives every row the same first weights and the same order of pairs."""
    stages = list(WATERFALL)
    has = PEERS_HAVE if name in PEERS else set(stages[: stages.index(name) + 1])
    on_gpu = choose_runtime(setting.config).device.type == "cuda"
    reduced = "fp16" if name in PEERS and on_gpu else "auto"  # with a GradScaler, as in most training loops
    config = setting.config.replace(
        recipe="fast" if "fastseg" in has else "tutorial",
        compile=COMPILED.get(name, "off"),
        precision=reduced if "autocast" in has else "fp32",
    )
    if "fastseg" in has and not on_gpu:
        set_retaining_allocator()
    torch.manual_seed(config.seed)
    model = make_network(name, config)
    run = build_run(config, choose_runtime(config), model, setting.train_pairs, setting.val_pairs)
    layout = torch.channels_last if "channels_last" in has else torch.contiguous_format
    run.model.to(memory_format=layout)
    began = time.perf_counter()
    if name in COMPILED:
        compile_model(run)
    compile_s = time.perf_counter() - began
    if name == "compile_graphs":
        run.forward = torch.compile(run.model, mode="reduce-overhead", dynamic=False)
    if "loader" in has:
        for _ in run.train_loader.decoder.decode([np.arange(config.batch_size)]):  # starts the threads, caches nothing
            pass
        epoch = _our_epochs(run)
    else:
        load = getattr(peers, setting.reader)(setting.train_pairs, reader_workers_of(name, setting), pin_memory=on_gpu)
        epoch = _data_loader_epochs(run, load)
    if "augmentation" in has:
        step = functools.partial(train_step, run)
    else:
        step = _plain_step(run, layout)
    run.model.train()
    return Trainer(run, layout, epoch, step, compile_s)


def reader_workers_of(name: str, setting: Setting) -> int:
    return setting.reader_workers.get(name, setting.config.num_workers)


def make_network(name: str, config: Config) -> nn.Module:
    if name != "smp":
        return build_model(config)
    peers.import_torchvision()
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)


def _our_epochs(run: Run) -> Callable[[], Batches]:
    def epoch() -> Iterator[Any]:
        yield from run.train_loader
        run.epoch, run.step = run.epoch + 1, 0

    return epoch


def _data_loader_epochs(run: Run, load: peers.Epoch) -> Callable[[], Batches]:
    """Epochs of torch's DataLoader, in the order of our loader."""
    numbers, count, size = itertools.count(), len(run.train_loader.pairs), run.config.batch_size

    def order(epoch: int) -> peers.Batches:
        whole = epoch_order(count, run.config.seed, epoch)[: count // size * size]
        return list(whole.reshape(-1, size))

    def epoch() -> Iterator[Any]:
        for images, masks, indices in load(order(next(numbers))):
            device = run.runtime.device
            yield images.to(device, non_blocking=True), masks.to(device, non_blocking=True), indices

    for _ in load(order(0)[:1]):  # starts the workers
        pass
    return epoch


def _plain_step(run: Run, layout: torch.memory_format) -> Callable[[Tensor, Tensor], None]:
    """The tutorials' step: kornia's classes with fastseg's strengths, then Adam on BCE."""
    augment = peers.kornia_augmentation(run.config)

    def step(images: Tensor, masks: Tensor) -> None:
        pixels, targets = augment(images.permute(0, 3, 1, 2).float() / 255, masks[:, None].float() / 255)
        inputs = ((pixels - 0.5) / 0.25).contiguous(memory_format=layout)
        with run.runtime.autocast():
            logits = run.forward(inputs)
        loss = bce_loss(logits, targets)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()

    return step
