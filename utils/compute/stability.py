r"""The largest stable rate of a network that regresses, from its empirical tangent kernel.

    L(theta) = 1/2 mean over images and classes of (f(theta) - y)^2      utils/compute/labels.py

The part of its Hessian that does not depend on y is J^T J / (N C), with J (N C, P) the derivatives
of the outputs; its eigenvalues are those of the tangent kernel J J^T / (N C). A step of gradient
descent is stable along an eigenvector below the rate of 2 / its eigenvalue.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from utils.compute.flat import flatten, unflatten

ITERATIONS = 20  # of the power method, after which the rate was within 0.3 % on digits


def largest_stable_rate(
    network: nn.Module, images: Tensor, *, piece: int, generator: torch.Generator
) -> float:
    """2 / the largest eigenvalue, by the power method from a vector of the `generator` (CPU).

    images (N, C, H, W) are worked through `piece` at a time; memory is that of a training step on
    twice as many. For networks without batch norm.
    """
    names = [name for name, _ in network.named_parameters()]
    theta = flatten(network.parameters()).detach()
    shapes = [param.shape for param in network.parameters()]

    def outputs_of(x: Tensor) -> Callable[[Tensor], Tensor]:
        def outputs(theta: Tensor) -> Tensor:
            params = dict(zip(names, unflatten(theta, shapes), strict=True))
            return functional_call(network, params, (x,))

        return outputs

    def times_hessian(v: Tensor) -> Tensor:
        """J^T J v / (N C)."""
        product = torch.zeros_like(v)
        for x in images.split(piece):
            outputs = outputs_of(x)
            u = jvp(outputs, (theta,), (v,))[1]
            pull_back = vjp(outputs, theta)[1]
            product += pull_back(u)[0] / (len(images) * u.shape[1])
        return product

    v = torch.randn(len(theta), generator=generator, dtype=theta.dtype).to(theta.device)
    for _ in range(ITERATIONS):
        v = times_hessian(v / v.norm())
    return 2 / v.norm().item()
