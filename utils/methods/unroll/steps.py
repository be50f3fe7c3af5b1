r"""The inner step and its adjoint, in pieces of a batch, as functions that a device can prepare.

Both come from `loss`, the training loss whose gradient by theta is g. Several students are rows of
one call, several steps may be taken in one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from utils.compute.execution import Execution, Function
from utils.compute.optimisers import PLAIN_SGD, Optimiser, with_zeros

# (theta (P,), x (B, C, H, W), y (B, ...)) -> the scalar training loss, a mean over the batch
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Adds a tensor up over processes; the identity where there is one.
Sum = Callable[[Tensor], Tensor]


def itself(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class Pieces:
    """How a step works through its share of a batch of `whole` images, `size` at a time."""

    whole: int
    size: int | None
    sum_over_ranks: Sum

    def __call__(self, x: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Pieces of x (K, B, C, H, W) and y (K, B, ...) with their weights, so that the weighted
        sum of the pieces' mean losses over all processes is the mean loss of the whole batch.
        """
        size = self.size or max(1, x.shape[1])
        for x_part, y_part in zip(x.split(size, 1), y.split(size, 1), strict=True):
            if x_part.shape[1] > 0:
                yield x_part.shape[1] / self.whole, x_part, y_part


@dataclass(frozen=True)
class Steps:
    """The inner step and its adjoint, as functions of stacks with K rows.

    gradient: (theta, x, y) -> (g,)
    adjoint:  (theta, x, y, lam) -> (<g, lam>, H lam, d<g, lam>/dx[, d<g, lam>/dy])

    The last product is there where `by_labels`, for labels that are learned. `at_once` steps are at
    most taken in one call, which `capture` prepares.
    """

    gradient: Function
    adjoint: Function
    at_once: int = 1
    capture: Callable[[Function], Function] = lambda function: function
    by_labels: bool = False
    optimiser: Optimiser = PLAIN_SGD
    _prepared: dict[Any, Function] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        loss: Loss,
        execution: Execution,
        *,
        rows: int = 1,
        one_by_one: bool = False,
        by_labels: bool = False,
        optimiser: Optimiser = PLAIN_SGD,
    ) -> "Steps":
        """Build both from `loss`. Compiled: forward over reverse, whose unused outputs the compiler
        removes. Not compiled: reverse over reverse, which is faster there.

        CUDA graphs capture several steps with all that is between them; `one_by_one` where
        processes talk to each other within a step.
        """
        of_loss = _double_reverse if execution.is_plain(rows) else _forward_over_reverse
        gradient, adjoint = of_loss(loss, by_labels=by_labels)
        if one_by_one:
            gradient, adjoint = (execution.prepare(each, rows=rows) for each in (gradient, adjoint))
            return cls(gradient, adjoint, by_labels=by_labels, optimiser=optimiser)
        return cls(
            execution.in_rows(gradient, rows),
            execution.in_rows(adjoint, rows),
            execution.calls_at_once,
            execution.capture,
            by_labels,
            optimiser,
        )

    def forward(self, pieces: Pieces) -> Function:
        """(state, rates (T,), times (T,), T batches, their labels) -> the state after each of the T
        steps.
        """
        return self._once(_forward, self, pieces)

    def back(self, pieces: Pieces, *, exact: bool) -> Function:
        """(lam, lam_n, n (K,) counted from the first of the T steps, rates (T,), times (T,), T
        states, T batches, their labels) -> (lam before the steps, dJ/drates (T,), T times dJ/dx[, T
        times dJ/dy]).
        """
        return self._once(_back, self, pieces, exact)

    def _once(self, function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> Function:
        """A function with its first arguments, prepared at the first call."""
        key = (function, *arguments[1:])
        if key not in self._prepared:
            self._prepared[key] = self.capture(partial(function, *arguments))
        return self._prepared[key]


def _forward(
    steps: Steps, pieces: Pieces, state: Tensor, rates: Tensor, times: Tensor, *batches: Tensor
) -> tuple[Tensor, ...]:
    states = []
    for rate, time, x, y in zip(rates.unbind(), times.unbind(), *_split(batches, 2), strict=True):
        g = gradient_step(steps, pieces, state, x, y)
        state = steps.optimiser.update(state, g, rate, time)
        states.append(state)
    return tuple(states)


def _back(
    steps: Steps,
    pieces: Pieces,
    exact: bool,
    lam: Tensor,
    lam_n: Tensor,
    ends: Tensor,
    rates: Tensor,
    times: Tensor,
    *given: Tensor,
) -> tuple[Tensor, ...]:
    """Invariant: lam = dJ/ds_t, K rows; it is zero for students whose n is below t. Each pass turns
    it into dJ/ds_{t-1}. Of SGD, whose state is theta:

        dJ/deta_t += -<g_t, lam>
        dJ/dx_t    = -eta_t d<g_t, lam>/dx_t      (then through augmentation to the images)
        dJ/dy_t    = -eta_t d<g_t, lam>/dy_t      (likewise to the labels)
        lam       += -eta_t H_t lam,              H_t lam = d<g_t, lam>/dtheta_t

    Another optimiser says what lam is multiplied with in place of it (`Back`). The approximate
    gradient leaves out the last line's product.
    """
    optimiser, of_rates, of_inputs = steps.optimiser, [], []
    size = lam.shape[1] // optimiser.vectors
    visited = zip(rates.unbind(), times.unbind(), *_split(given, 3), strict=True)
    for t, (rate, time, state, x, y) in reversed([*enumerate(visited)]):
        lam = torch.where(_beside(ends == t + 1, lam), lam_n, lam)
        remembers = optimiser.vectors > 1
        g = gradient_step(steps, pieces, state, x, y) if remembers else None
        back = optimiser.back(state, g, rate, time, lam)
        # A part of a larger tensor is copied: the compiler cannot differentiate forward along it.
        theta = state[:, :size].clone() if remembers else state
        products = adjoint_step(steps, pieces, theta, x, y, back.direction)
        # Behind its n a student may have diverged: its numbers are dropped, not multiplied.
        behind = ends <= t
        g_lam, hessian_lam, *by_inputs = (_without(each, behind) for each in products)
        if back.by_rate is None:
            of_rates.append(-g_lam.sum())
        else:  # g is that of the whole batch: this process has its part of it
            of_rates.append(_without(back.by_rate, behind).sum() * (x.shape[1] / pieces.whole))
        scale = 1 if back.scale is None else back.scale
        of_inputs.append([scale * each for each in by_inputs])
        lam = _without(back.state, behind) if remembers else back.state
        if exact:
            through = scale * pieces.sum_over_ranks(hessian_lam)
            lam = lam + with_zeros(through, optimiser.vectors)
    by_kind = zip(*of_inputs[::-1], strict=True)
    return lam, torch.stack(of_rates[::-1]), *(each for kind in by_kind for each in kind)


def _without(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor` (K, ...) with zeros in `rows`, a mask (K,)."""
    return tensor.masked_fill(_beside(rows, tensor), 0)


def gradient_step(steps: Steps, pieces: Pieces, state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """g (K, P) of the whole batch, added up over the pieces of x and over processes."""
    theta = state[:, : state.shape[1] // steps.optimiser.vectors]
    parts = [(weight, steps.gradient(theta, *part)[0]) for weight, *part in pieces(x, y)]
    return pieces.sum_over_ranks(_weighted_sum(parts, like=theta))


def adjoint_step(
    steps: Steps, pieces: Pieces, theta: Tensor, x: Tensor, y: Tensor, lam: Tensor
) -> list[Tensor]:
    """<g, lam> (K,), H lam (K, P), d<g, lam>/dx and, where labels are learned, d<g, lam>/dy; added
    up over the pieces of x.
    """
    parts = [(weight, steps.adjoint(theta, *part, lam)) for weight, *part in pieces(x, y)]
    sums = [
        _weighted_sum([(weight, each[i]) for weight, each in parts], like=like)
        for i, like in enumerate((lam[:, 0], lam))
    ]
    for i, like in enumerate((x, y) if steps.by_labels else (x,), start=2):
        found = [each[i] if weight == 1 else weight * each[i] for weight, each in parts]
        sums.append(found[0] if len(found) == 1 else torch.cat([like[:, :0], *found], 1))
    return sums


def _split(tensors: Sequence[Tensor], kinds: int) -> list[Sequence[Tensor]]:
    """Tensors that follow each other kind by kind, by kind."""
    count = len(tensors) // kinds
    return [tensors[kind * count : (kind + 1) * count] for kind in range(kinds)]


def _beside(row: Tensor, tensor: Tensor) -> Tensor:
    """`row` (K,), to stand beside a tensor (K, ...)."""
    return row.view(-1, *[1] * (tensor.dim() - 1))


def _forward_over_reverse(loss: Loss, *, by_labels: bool = False) -> tuple[Function, Function]:
    by = (0, 1, 2) if by_labels else (0, 1)

    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(loss)(theta, x, y),)

    def adjoint(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        def gradients(theta: Tensor) -> tuple[Tensor, ...]:
            by_each, value = torch.func.grad_and_value(loss, by)(theta, x, y)
            return value, *by_each

        return torch.func.jvp(gradients, (theta,), (lam,))[1]

    return gradient, adjoint


def _double_reverse(loss: Loss, *, by_labels: bool = False) -> tuple[Function, Function]:
    @torch.enable_grad()
    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        theta = theta.detach().requires_grad_()
        return grad(loss(theta, x, y), theta)

    @torch.enable_grad()
    def adjoint(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        theta, x = theta.detach().requires_grad_(), x.detach().requires_grad_()
        inputs = [theta, x]
        if by_labels:
            y = y.detach().requires_grad_()
            inputs.append(y)
        (g,) = grad(loss(theta, x, y), theta, create_graph=True)
        g_lam = g @ lam
        return g_lam.detach(), *grad(g_lam, inputs)

    return gradient, adjoint


def _weighted_sum(parts: Sequence[tuple[float, Tensor]], *, like: Tensor) -> Tensor:
    """The sum of weight * value; zeros like `like` where there is none. A whole costs nothing."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    total = torch.zeros_like(like)
    for weight, value in parts:
        total += weight * value
    return total
