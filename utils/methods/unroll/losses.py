"""Training losses of students, and losses of what they end as."""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.compute.labels import cross_entropy, likeliest
from utils.methods.unroll.steps import Loss


def training_loss(network: FlatNetwork, form: str | None = None) -> Loss:
    """The mean cross-entropy with labels y (B,), or with soft ones (B, C) of a `form`."""
    return lambda theta, x, y: cross_entropy(network(theta, x), y, form)


class Found(NamedTuple):
    """A mean loss of each of K students, its gradient by theta, and how many answers are wrong."""

    values: Tensor  # (K,)
    slopes: Tensor  # (K, P)
    wrong: Tensor  # (K,), whole numbers


class BatchLoss:
    """The mean cross-entropy of `network` on a batch, in pieces, with its gradient.

    Labels are classes, or soft ones of a `form`. Compiled and vectorised as `execution` says, for
    `rows` students.
    """

    def __init__(
        self, network: FlatNetwork, execution: Execution, *, rows: int, form: str | None = None
    ) -> None:
        def loss(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(theta, x)
            wrong = (logits.argmax(1) != likeliest(y, form)).sum()
            return cross_entropy(logits, y, form), wrong

        def by_func(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            slope, (value, wrong) = torch.func.grad_and_value(loss, has_aux=True)(theta, x, y)
            return value, slope, wrong

        @torch.enable_grad()
        def by_autograd(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            theta = theta.detach().requires_grad_()
            value, wrong = loss(theta, x, y)
            return value.detach(), torch.autograd.grad(value, theta)[0], wrong

        is_plain = execution.is_plain(rows)
        self._all = execution.prepare(by_autograd if is_plain else by_func, rows=rows)

    def with_slope(
        self, theta: Tensor, x: Tensor, y: Tensor, *, whole: int, size: int | None
    ) -> Found:
        """The part of x (B, C, H, W), y (B, ...) in the mean over `whole` images, `size` images at
        a time, for theta (K, P).
        """
        values, slopes = theta.new_zeros(len(theta)), torch.zeros_like(theta)
        wrong = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        for part, labels in zip(x.split(size or len(x)), y.split(size or len(y)), strict=True):
            value, slope, missed = self._all(
                theta,
                part.expand(len(theta), *part.shape),
                labels.expand(len(theta), *labels.shape),
            )
            values += value * (len(part) / whole)
            slopes += slope * (len(part) / whole)
            wrong += missed
        return Found(values, slopes, wrong)
