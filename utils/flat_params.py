"""A network as a pure function of one flat parameter vector."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_


def flatten(params: Iterable[Tensor]) -> Tensor:
    """Concatenate parameter tensors in order into one vector (P,)."""
    return torch.cat([param.reshape(-1) for param in params])


class FlatNetwork:
    """`network` as a function (theta, images) -> logits, theta (P,) in `parameters()` order.

    The network's own weights are not used after this. Batch norm, where there is any, works with
    the statistics of the batch and keeps none, since a pure function has no state.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = replace_all_batch_norm_modules_(network).train()
        self._names = [name for name, _ in network.named_parameters()]
        self.shapes = [param.shape for param in network.parameters()]
        self._sizes = [shape.numel() for shape in self.shapes]

    def to(self, device: torch.device | str) -> "FlatNetwork":
        self._network.to(device)
        return self

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        parts = theta.split(self._sizes)
        views = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return functional_call(self._network, dict(zip(self._names, views, strict=True)), (images,))
