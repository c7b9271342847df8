"""CUDA graphs: the kernels of the forward and backward pass recorded once and replayed as a whole.

In every step the host launches hundreds of kernels, and a GPU that is faster than that waits for the host. A graph is
one launch. Recording it costs a few steps, where compiling costs most of a minute; but it is the same kernels, unfused.
"""

import copy
import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastseg.runtime.device import Runtime

__all__ = ["record_graphs"]


def record_graphs(model: nn.Module, runtime: Runtime, shapes: Iterable[tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """A function that computes `model(x)`, in training, for x of one of these shapes; gradients reach the parameters.

    Nothing else may use the GPU meanwhile, so this comes before the loader begins. Weights may change afterwards, but
    only in place.

    Args:
        shapes: (B, C, H, W); x is channels last.
    """
    model.train()
    gc.collect()  # what earlier runs left in cycles would free GPU memory when it goes, which ends a recording
    before = copy.deepcopy(model.state_dict())
    graphs: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
    # Recording leaves the gradients' nodes on its own stream. torch puts them in order, and would warn of it.
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:  # not in older versions, which do not warn either
        warn(False)
    with torch.cuda.device(runtime.device):
        for shape in shapes:
            x = torch.zeros(shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
            # Casts of the weights belong into each graph, not into autocast's cache. The copy shares its tensors with
            # the model; only its `forward` becomes the graph's, so that there can be one of each shape.
            with runtime.autocast(cache=False):
                graphs[shape] = torch.cuda.make_graphed_callables(copy.copy(model), (x,))  # type: ignore[assignment]
    model.load_state_dict(before)  # recording runs the network a few times, which batch norms take for data
    return lambda x: graphs[tuple(x.shape)](x)
