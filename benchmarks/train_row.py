"""One run of a row of training.py, in a process of its own: its loss and gradients against exact ones, then its time.

`training.py` starts these processes; `trainers.py` builds the rows.
"""

import copy
import math
import time
import warnings
from typing import Any

import numpy as np
import torch
from files import fill_page_cache
from flops import count_flops, matmul_flops_per_s
from measure import PeakMemory, synchronise, time_calls
from torch import Tensor
from trainers import COMPILED, Setting, Trainer, make_network, make_trainer, reader_workers_of

import fastseg
from fastseg.data.host import HostDecoder
from fastseg.network.losses import bce_loss
from fastseg.network.metrics import score_batches
from fastseg.network.normalise import normalise, to_targets

WARM_UP_STEPS = 3  # compile_graphs captures its CUDA graphs in the second
MAX_LOSS_ERROR = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 1e-2,
}  # relative; float32 may use TF32
MAX_GRADIENT_ERROR = {torch.float32: 5e-2, torch.bfloat16: 0.3, torch.float16: 0.1}  # relative, in the 2-norm
LOSS_SCALE = 1024.0  # of the comparison: float16 needs one, and the GradScaler starts with one that overflows


def run_row(name: str, setting: Setting) -> dict[str, Any]:
    """One run of a row: check, warm up, train and score, compare with a resident batch.

    Raises:
        ValueError: the row's loss or gradient is wrong.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, on purpose
    fill_page_cache(setting.train_pairs)
    fill_page_cache(setting.val_pairs)
    trainer = make_trainer(name, setting)
    run, device = trainer.run, trainer.run.runtime.device
    resident = first_batch(setting, device)
    first = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    checked = check_gradients(trainer, *resident)
    warm = [_time_resident(trainer, resident, 1) for _ in range(WARM_UP_STEPS)]
    compile_s = trainer.compile_s + checked.pop("seconds") + sum(warm) - (1 + len(warm)) * min(warm)
    _restart(trainer, *first)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    epochs = [time_epoch(trainer) for _ in range(run.config.num_epochs)]
    dice = score_batches(run.model.eval(), run.val_loader, run.runtime)["dice"]
    run.model.train()
    resident_s, real = [], []
    for _ in range(setting.rounds):  # in turn, so that a disturbance of the machine hits both
        resident_s.append(_time_resident(trainer, resident, len(run.train_loader)))
        real.append(time_epoch(trainer))
    cost = count_flops(lambda: make_network(name, run.config), run.config.image_height, run.config.image_width)
    later = [*epochs[1:], *real]
    return {
        **checked,
        "first_pairs_per_s": epochs[0]["pairs"] / epochs[0]["seconds"],
        "pairs_per_s": [epoch["pairs"] / epoch["seconds"] for epoch in later],
        "data_wait_pct": [100 * epoch["waited"] / epoch["seconds"] for epoch in later],
        "step_ms": [1e3 * seconds / len(run.train_loader) for seconds in resident_s],
        "data_efficiency_pct": [100 * a / b["seconds"] for a, b in zip(resident_s, real, strict=True)],
        "peak_gib": _peak_gib(trainer, resident),
        "compile_s": compile_s if name in COMPILED else None,
        "val_dice": dice,
        "steps": len(epochs) * len(run.train_loader),
        "reader_workers": reader_workers_of(name, setting),
        "dtype": str(run.runtime.dtype).removeprefix("torch."),
        "matmul_tflops": matmul_flops_per_s(device, run.runtime.dtype) / 1e12,
        "gflop_a_pair": cost["forward_backward"] / 1e9,
        "parameters": cost["parameters"],
    }


def first_batch(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first pairs, decoded by our threads in every row, so that all rows get the same pixels."""
    config = setting.config
    decoder = HostDecoder(setting.train_pairs, config.image_height, config.image_width)
    images, masks, _ = next(decoder.decode([np.arange(config.batch_size)]))
    return images.to(device), masks.to(device)


def check_gradients(trainer: Trainer, images: Tensor, masks: Tensor) -> dict[str, float]:
    """Compare BCE and its gradient on a batch with those of the same weights in float32, contiguous and eager.

    Returns:
        `exact_loss`, `loss_error`, `gradient_error`, and the `seconds` of the row's first forward and backward pass.

    Raises:
        ValueError: they differ by more than the dtype explains.
    """
    run = trainer.run
    inputs, targets = normalise(images), to_targets(masks)
    exact = copy.deepcopy(run.model).to(memory_format=torch.contiguous_format)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact_loss = bce_loss(exact(inputs.contiguous()), targets)
        exact_loss.backward()
    synchronise(run.runtime.device)
    started = time.perf_counter()
    with run.runtime.autocast():
        logits = run.forward(inputs.contiguous(memory_format=trainer.layout))
    loss = bce_loss(logits, targets)
    (LOSS_SCALE * loss).backward()
    synchronise(run.runtime.device)
    seconds = time.perf_counter() - started
    gradient, exact_gradient = (
        torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        for model in (run.model, exact)
    )
    gradient_error = (gradient / LOSS_SCALE - exact_gradient).norm() / exact_gradient.norm()
    run.optimizer.zero_grad()
    found = {
        "exact_loss": exact_loss.item(),
        "loss_error": abs(loss.item() / exact_loss.item() - 1),
        "gradient_error": gradient_error.item(),
        "seconds": seconds,
    }
    dtype = run.runtime.dtype
    # Rounding alone changes the gradient of a deep encoder with random weights by half: that of smp is only reported.
    limit = MAX_GRADIENT_ERROR[dtype] if isinstance(run.model, fastseg.UNet) else math.inf
    if not (found["loss_error"] <= MAX_LOSS_ERROR[dtype] and found["gradient_error"] <= limit):
        raise ValueError(f"wrong loss or gradient: {found}")
    return found


def _restart(trainer: Trainer, weights: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Restore the first weights and the first random numbers, after checks and warm-up."""
    run = trainer.run
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(optimizer)
    run.generator.manual_seed(run.config.seed)
    torch.manual_seed(run.config.seed)  # for kornia's classes
    run.step = 0
    run.loss_sum.zero_()


def time_epoch(trainer: Trainer) -> dict[str, float]:
    """Seconds of an epoch, and the seconds in which the host waited for batches."""
    pairs, waited = 0, 0.0
    synchronise(trainer.run.runtime.device)
    asked = started = time.perf_counter()
    for images, masks, _ in trainer.epoch():
        waited += time.perf_counter() - asked
        trainer.step(images, masks)
        pairs += len(images)
        asked = time.perf_counter()
    synchronise(trainer.run.runtime.device)
    return {"pairs": pairs, "waited": waited, "seconds": time.perf_counter() - started}


def _time_resident(trainer: Trainer, batch: tuple[Tensor, Tensor], steps: int) -> float:
    """Seconds of `steps` steps on one batch that is on the device already."""

    def run_steps() -> None:
        for _ in range(steps):
            trainer.step(*batch)

    return time_calls(run_steps, trainer.run.runtime.device)[0]


def _peak_gib(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> float:
    """Peak memory of the device while training; on a CPU that of this process and its workers, in extra steps."""
    device = trainer.run.runtime.device
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30  # allocated would not count a graph's memory
    with PeakMemory() as memory:
        _time_resident(trainer, batch, 2)
    return memory.mib / 1024
