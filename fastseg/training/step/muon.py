"""Muon for the filters of convolutions, AdamW for everything else.

Source: Jordan et al. 2024, Muon (https://kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv:2502.16982) for the
scale of its updates, which lets it share AdamW's learning rate.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BIAS_FACTOR", "MUON", "MUON_FACTOR", "MuonAdamW", "filters_of", "norm_biases_of", "orthogonalise"]

MUON = "muon"  # key of a parameter group: whether its parameters are filters
MUON_FACTOR = 2.0  # of the learning rate: benchmarks/speedrun.py
BIAS_FACTOR = 16.0  # the same for the biases of batch norms (Jordan 2024, arXiv:2404.00498)
MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of the Newton-Schulz iteration
RMS = 0.2  # of AdamW's updates, about


def filters_of(model: nn.Module) -> set[Tensor]:
    """The weights of convolutions of more than one pixel that connect all channels."""
    modules = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return {module.weight for module in modules if module.groups == 1 and math.prod(module.kernel_size) > 1}


def norm_biases_of(model: nn.Module) -> set[Tensor]:
    """The biases of the batch norms."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)  # the latter on several GPUs
    return {module.bias for module in model.modules() if isinstance(module, kinds) and module.affine}


def orthogonalise(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a matrix, approximately: singular values become 0.7 to 1.2.

    Args:
        matrix: (M, N); it is computed with in bfloat16 on a GPU.

    Returns:
        (M, N), of the same dtype.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    x = _iterate(x) if matrix.is_cuda else _iterate_gram(x)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


def _iterate(x: Tensor) -> Tensor:
    """The Newton-Schulz iteration. bfloat16 is too coarse for `_iterate_gram`."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor) -> Tensor:
    """The same in float32, on the small matrix x @ x.T alone: less than half of the arithmetic for a UNet's filters."""
    a, b, c = COEFFICIENTS
    gram, factor = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        gram, factor = polynomial @ gram @ polynomial, polynomial @ factor  # factor @ x is x after this step
    return factor @ x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with a true `MUON` are updated by Muon: filters (O, I, H, W) as (O, I * H * W).

    torch.optim.Muon takes matrices only, which a filter in channels-last memory is no view of.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self._step_supports_amp_scaling = False  # the gradient scaler divides before this step, not within it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        filters = [(p, p.grad, group) for group in self.param_groups if group.get(MUON) for p in group["params"]]
        for parameter, gradient, group in filters:
            if gradient is not None:
                self._update_filter(parameter, gradient, group["lr"], group["weight_decay"])
            parameter.grad = None  # AdamW passes over it
        inspect.unwrap(torch.optim.AdamW.step)(self)
        for parameter, gradient, _ in filters:
            parameter.grad = gradient

    def _update_filter(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # which AdamW expects when it loads a state
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        matrix = orthogonalise(gradient.lerp(momentum, MOMENTUM).flatten(1))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(matrix.view(parameter.shape), alpha=-lr * RMS * math.sqrt(max(matrix.shape)))
