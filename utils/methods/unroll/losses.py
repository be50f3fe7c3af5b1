"""Training losses of students, and losses of what they end as."""

import torch
from torch import Tensor

from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.compute.labels import cross_entropy
from utils.methods.unroll.steps import Loss


def training_loss(network: FlatNetwork, form: str | None = None) -> Loss:
    """The mean cross-entropy with labels y (B,), or with soft ones (B, C) of a `form`."""
    return lambda theta, x, y: cross_entropy(network(theta, x), y, form)


class BatchLoss:
    """The mean cross-entropy on a batch of real images as a loss behind an unroll, in pieces.

    Compiled and vectorised as `execution` says, for `rows` students.
    """

    def __init__(self, loss: Loss, execution: Execution, *, rows: int) -> None:
        def value_and_slope(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            slope, value = torch.func.grad_and_value(loss)(theta, x, y)
            return value, slope

        @torch.enable_grad()
        def by_autograd(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            theta = theta.detach().requires_grad_()
            value = loss(theta, x, y)
            return value.detach(), torch.autograd.grad(value, theta)[0]

        is_plain = execution.is_plain(rows)
        self._both = execution.prepare(by_autograd if is_plain else value_and_slope, rows=rows)

    def with_slope(
        self, theta: Tensor, x: Tensor, y: Tensor, *, whole: int, size: int | None
    ) -> tuple[Tensor, Tensor]:
        """The part of x (B, C, H, W), y (B,) in the mean over `whole` images, (K,), and its
        gradient by theta (K, P); `size` images at a time.
        """
        value, slope = theta.new_zeros(len(theta)), torch.zeros_like(theta)
        for part, labels in zip(x.split(size or len(x)), y.split(size or len(y)), strict=True):
            both = self._both(
                theta,
                part.expand(len(theta), *part.shape),
                labels.expand(len(theta), *labels.shape),
            )
            value += both[0] * (len(part) / whole)
            slope += both[1] * (len(part) / whole)
        return value, slope
