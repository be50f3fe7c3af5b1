"""A pass of torch.compile that leaves out derivatives of convolutions nobody asked for.

The inner step's adjoint differentiates forward over reverse. Autograd then computes gradients by
input and by weight of every convolution, of which some have no user, and convolves tangents that
are zero, because the images have none.
"""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten
_MOVES = (aten.expand.default, aten.permute.default, aten.clone.default)  # of what stays zero


class PruneConvolutions(CustomGraphPass):
    """Narrow the derivatives of every convolution to those used, and convolve no zeros."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is aten.convolution.default:
                images, weight, bias, *_ = _arguments(node)
                if bias is None and _has_zero_factor(images, weight):
                    _replace_by_zeros(node)
            elif node.target is aten.convolution_backward.default:
                _narrow(node)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Which pass it was, for the compiler's cache; count up when the pass changes."""
        return "prune convolutions, 1"


def _narrow(node: fx.Node) -> None:
    """Ask for the outputs of a convolution's derivative that are used and not zero."""
    slope, images, weight, *rest, mask = _arguments(node)
    factors = ((slope, weight), (slope, images), (slope,))  # of the three gradients
    left = [False] * 3
    for user in list(node.users):
        _, which = _arguments(user)
        if not user.users or not mask[which]:
            continue
        if _has_zero_factor(*factors[which]):
            _replace_by_zeros(user)
        else:
            left[which] = True
    node.args = (slope, images, weight, *rest, left)


def _has_zero_factor(*factors: fx.Node) -> bool:
    return any(_is_zero(factor) for factor in factors)


def _is_zero(node: fx.Node) -> bool:
    while node.target in _MOVES:
        node = _arguments(node)[0]
    return node.target is aten.full.default and _arguments(node)[1] == 0


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _replace_by_zeros(node: fx.Node) -> None:
    value = node.meta["val"]
    like = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with node.graph.inserting_before(node):
        zeros = node.graph.call_function(aten.full.default, (list(value.shape), 0), like)
    zeros.meta["val"] = value.new_zeros(value.shape)
    node.replace_all_uses_with(zeros)
