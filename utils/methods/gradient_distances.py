r"""Distances of gradients, as DC and DSA match them (Zhao et al., ICLR 2021).

g (K, P) are flat gradients of K classes, cut into tensors by the shapes of the parameters. A
distance maps found and wanted gradients to (K,), differentiably.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# In denominators, as in the published code.
EPSILON = 1e-6

GradientDistance = Callable[[Tensor, Tensor, Sequence[torch.Size]], Tensor]


def by_rows(found: Tensor, wanted: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Add up 1 - cos over the rows of all tensors: a row is what leads to one output, a tensor
    (O, ...) has O of them. Those of one dimension, biases and norms' weights, count nothing.
    """
    sizes = [shape.numel() for shape in shapes]
    total = found.new_zeros(len(found))
    parts = zip(found.split(sizes, 1), wanted.split(sizes, 1), shapes, strict=True)
    for ours, theirs, shape in parts:
        if len(shape) > 1:
            rows = (each.unflatten(1, (shape[0], -1)) for each in (ours, theirs))
            total = total + _cosine_distance(*rows).sum(1)
    return total


def squared(found: Tensor, wanted: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Add up the squared differences of all numbers."""
    return (found - wanted).square().sum(1)


def cosine(found: Tensor, wanted: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """1 - cos of the whole gradients."""
    return _cosine_distance(found, wanted)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - <a, b> / (|a| |b| + epsilon) along the last dimension; 1 where one of them is zero."""
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPSILON)


# By the names of the published code.
GRADIENT_DISTANCES: Mapping[str, GradientDistance] = {
    "ours": by_rows,
    "mse": squared,
    "cos": cosine,
}
