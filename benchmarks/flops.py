"""The cost of a network, and the rate of the hardware: FLOPs counted by torch, and a large matrix product.

`limit_pct` in training.py and model.py is the network's FLOPs per second as a share of that rate.
"""

from collections.abc import Callable

import torch
from measure import time_calls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "matmul_flops_per_s"]

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMUL_REPEATS = 10  # the fastest counts: it is a limit


def count_flops(make: Callable[[], nn.Module], height: int, width: int) -> dict[str, int]:
    """FLOPs of one image through a network, and its parameters; on the meta device, so nothing is computed.

    A multiplication and an addition are two. Only convolutions and matrix products count.

    Args:
        make: returns the network, which takes (1, 3, height, width).

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
    """The rate of a large square matrix product on all threads; float32 uses TF32 on a GPU, as cuDNN does."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    seconds = time_calls(lambda: left @ right, device, warm_up=1, repeat=MATMUL_REPEATS)
    torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / min(seconds)
