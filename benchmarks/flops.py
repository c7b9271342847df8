"""What a network costs, and what the hardware can do: FLOPs counted by torch, and the rate of a large matrix product.

`limit_pct` in training.py and model.py is the first over the second: the share of the arithmetic that the hardware
reaches on what it does best.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "matmul_flops_per_s", "synchronise"]

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMUL_TIMES = 10  # the fastest counts: a limit is what can be reached


def count_flops(make: Callable[[], nn.Module], height: int, width: int) -> dict[str, int]:
    """FLOPs of one picture through a network, and its parameters; on the meta device, so nothing is computed.

    A multiplication and an addition are two. Only convolutions and matrix products count.

    Args:
        make: the network, for (1, 3, height, width).

    Returns:
        `forward`, `forward_backward` and `parameters`.
    """
    with torch.device("meta"):
        model = make()
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as forward:
        logits = model(image)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return {
        "forward": forward.get_total_flops(),
        "forward_backward": forward.get_total_flops() + backward.get_total_flops(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large square matrix product on all threads; float32 in TF32 on a GPU, as cuDNN convolves it."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    seconds = []
    for _ in range(1 + MATMUL_TIMES):
        synchronise(device)
        started = time.perf_counter()
        left @ right
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / min(seconds[1:])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
