"""Networks as pure functions of flat vectors: the parameters, and what batch norm remembers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors in order into one vector (P,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of `vector` (P,) with the given shapes, in order."""
    parts = vector.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class FlatNetwork:
    """`network` as a function (theta, images) -> logits, theta (P,) in `parameters()` order.

    The network's own weights are not used after this. Batch norm, where there is any, works with
    the statistics of the batch and keeps none, since a pure function has no state; other buffers
    are constants, on their device. With `dtype` the network computes in it and returns logits of
    the images' type.
    """

    def __init__(self, network: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._network = replace_all_batch_norm_modules_(network).train()
        self._dtype = dtype
        self._names = [name for name, _ in network.named_parameters()]
        self.shapes = [param.shape for param in network.parameters()]
        self._constants = float_buffers(network)

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        dtype = self._dtype or images.dtype
        state = dict(zip(self._names, unflatten(theta.to(dtype), self.shapes), strict=True))
        state |= {name: value.to(dtype) for name, value in self._constants.items()}
        return functional_call(self._network, state, (images.to(dtype),)).to(images.dtype)


class TrainingNetwork:
    """`network` as it trains: a function (theta, statistics, images) -> (logits, statistics).

    statistics (S,) are the running means and variances of batch norm, and whatever other numbers
    the network keeps in buffers; S is 0 where there are none. Buffers of whole numbers, such as
    indices, are constants, on their device. The network's own weights are not used.
    """

    def __init__(self, network: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._network = without_batch_counts(network).train()
        self._dtype = dtype
        self._names = [name for name, _ in network.named_parameters()]
        self._shapes = [param.shape for param in network.parameters()]
        self._statistics = {name: value.shape for name, value in float_buffers(network).items()}

    def __call__(self, theta: Tensor, statistics: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self._dtype or images.dtype
        state = dict(zip(self._names, unflatten(theta.to(dtype), self._shapes), strict=True))
        if self._statistics:
            parts = unflatten(statistics, list(self._statistics.values()))
            running = [part.to(dtype, copy=True) for part in parts]
            state |= dict(zip(self._statistics, running, strict=True))
        logits = functional_call(self._network, state, (images.to(dtype),)).to(images.dtype)
        if self._statistics:  # batch norm has changed its copies
            statistics = flatten(running).to(statistics.dtype)
        return logits, statistics


def float_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers of floating-point numbers, by name: those that a training may change."""
    return {name: each for name, each in network.named_buffers() if each.is_floating_point()}


def without_batch_counts(network: nn.Module) -> nn.Module:
    """Drop batch norm's counters, whole numbers that nothing reads."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.num_batches_tracked = None
    return network


def without_head(network: nn.Module) -> nn.Module:
    """Replace the last linear layer of `network` by nothing: it then returns what went into it.

    In all of `networks/` that layer gives the logits.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    parent, _, name = names[-1].rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network
