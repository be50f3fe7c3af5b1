r"""The unroll engine: students' training runs on the images, differentiable exactly.

    theta_{t+1} = theta_t - eta_t g(theta_t, x_t, y_t)        t = 0 ... N_S - 1

g is the gradient of `loss` by theta (P,), eta_t the synthetic learning rate, x_t and y_t the
augmented batch of step t. This is SGD; other optimisers remember more than theta (`optimisers.py`).
theta_n, the parameters after the step n that a length policy picks from the distances to a target,
is a function of the images, the rates and the labels: any loss of it can stand behind it. K
students run side by side, each with its own theta_0, target, batches and n. Two engines of the same
signature return the same numbers:

`unroll` keeps states and no graph. Backwards it rebuilds one step at a time, so its graph is that
of a single step (or of a piece of its batch) whatever N_S is, and steps behind n cost nothing.
`unroll_by_autograd`, its plain twin, keeps the whole graph, whose memory grows with N_S.

Everything is a pure function of its arguments: no randomness, no state, no logging.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from utils.compute.batches import alike
from utils.compute.optimisers import PLAIN_SGD, Optimiser, first_state, with_zeros
from utils.methods.unroll.problem import Problem, blocks
from utils.methods.unroll.steps import Loss, Pieces, Steps, Sum, itself
from utils.methods.unroll.stop import LAST_STEP, Stop

# States of at most this many steps are kept; those between are computed again. No row of the paper
# has more, so that only longer unrolls pay (N_S = 200: a sixth more arithmetic) and memory stays
# bounded for any N_S.
KEPT_STEPS = 80


class Gradients(NamedTuple):
    """dJ/dimages, dJ/drates and, where labels are learned, dJ/dlabels, each shaped like its own."""

    images: Tensor
    rates: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Unrolled:
    """What K students reached, and the way back.

    `theta_n` is part of the graph where images, rates or labels require gradients. `pull_back` maps
    lam (K, P) = dJ/dtheta_n to the gradients of J.
    """

    theta_n: Tensor  # (K, P)
    lengths: list[int]  # n of each student
    distances: Tensor  # (K, N_S), to the target, by the distance that picks n
    curves: Mapping[str, Tensor]  # (K, N_S), by the other distances
    pull_back: Callable[[Tensor], Gradients]


@torch.no_grad()
def unroll(
    images: Tensor,
    rates: Tensor,
    labels: Tensor,
    problem: Problem,
    steps: Steps,
    *,
    stop: Stop = LAST_STEP,
    exact: bool = True,
    micro_batch: int | None = None,
    sum_over_ranks: Sum = itself,
) -> Unrolled:
    """Train K students on the images and return theta_n, differentiable in images and rates, and in
    labels where `steps` are made for that.

    images (N, C, H, W), labels (N, ...) and rates, a scalar or one rate a step (N_S,), are read,
    not changed. Where the batches are shares of larger ones, g_t and H_t lam are added up over the
    processes by `sum_over_ranks`; the gradients that come back stay those of the own share, for the
    caller to add up. Without `exact` each g_t counts as a function of x_t alone, not of theta_t
    (TESLA, Cui et al., ICML 2023): the path from a batch to the later steps is left out. n is above
    `problem.first`.

    Memory: at most KEPT_STEPS x K states of P floats (momentum 2 P, Adam 3 P), and one step of
    double backward on `micro_batch` images a student. Time: n steps of about three gradients on top
    of N_S, with momentum and Adam of four.
    """
    sweep = _Sweep(images, rates, labels, problem, steps, micro_batch, sum_over_ranks)
    distances, *curves = sweep.forward(stop)
    lengths = [stop.length(row, problem.theta_star, first=problem.first) for row in distances.cpu()]
    ends = torch.stack([sweep.theta(n)[k] for k, n in enumerate(lengths)])

    @torch.no_grad()
    def pull_back(lam: Tensor) -> Gradients:
        return sweep.back(lam, lengths, exact=exact)

    with torch.enable_grad():
        theta_n = _End.apply(ends, images, rates, labels, pull_back)
    by_name = dict(zip(stop.watched, curves, strict=True))
    return Unrolled(theta_n, lengths, distances, by_name, pull_back)


@torch.no_grad()
def train(
    images: Tensor,
    rate: Tensor,
    labels: Tensor,
    problem: Problem,
    steps: Steps,
    *,
    micro_batch: int | None = None,
    sum_over_ranks: Sum = itself,
) -> Tensor:
    """Return theta (K, P) of K students after all steps of the problem; see `unroll`.

    Memory: two states, and one gradient on `micro_batch` images a student.
    """
    return _Sweep(images, rate, labels, problem, steps, micro_batch, sum_over_ranks).end()


class _Sweep:
    """The steps of one problem, forward and then back, with states kept and no graph."""

    def __init__(
        self,
        images: Tensor,
        rates: Tensor,
        labels: Tensor,
        problem: Problem,
        steps: Steps,
        micro_batch: int | None,
        sum_over_ranks: Sum,
    ) -> None:
        self._images = images
        self._rates = rates
        self._labels = labels
        self._ys = problem.labels(labels)
        self._problem = problem
        self._steps = steps
        self._micro_batch = micro_batch
        self._sum_over_ranks = sum_over_ranks
        self._size = problem.theta_0.shape[1]
        self._times = torch.arange(1, problem.syn_steps + 1).to(rates)
        # States are kept of every stride-th step; a block is what is worked on at a time.
        self._seen = range(problem.first, problem.syn_steps)  # backwards, too
        self._stride = math.ceil(len(self._seen) / KEPT_STEPS)
        self._block = problem.steps_per_block if self._stride == 1 else self._stride
        self._kept = {0: first_state(steps.optimiser, problem.theta_0)}

    def forward(self, stop: Stop) -> Tensor:
        """Take all steps; the distances on the way, (1 + watched, K, N_S)."""
        p, measured = self._problem, []
        state = self._kept[0]
        for block in [*blocks(range(p.first), self._block), *blocks(self._seen, self._block)]:
            xs = p.batches(self._images, block)
            for chosen, states in self._walk(state, block, xs):
                thetas = [each[:, : self._size] for each in states]
                measured.append(stop.measure_all(thetas, p.theta_star))
                for t, state in zip(chosen, states, strict=True):
                    at = t + 1 - p.first
                    if at >= 0 and at % self._stride == 0:
                        self._kept[t + 1] = state
        return torch.cat(measured, -1)

    def end(self) -> Tensor:
        """theta (K, P) after all steps; no state is kept."""
        p, state = self._problem, self._kept[0]
        for block in blocks(range(p.syn_steps), p.steps_per_block):
            for _, states in self._walk(state, block, p.batches(self._images, block)):
                state = states[-1]
        return state[:, : self._size]

    def theta(self, n: int) -> Tensor:
        """theta_n (K, P), kept or computed again."""
        if n not in self._kept:
            since = range(n - (n - self._seen.start) % self._stride, n)
            xs = self._problem.batches(self._images, since)
            *_, (_, states) = self._walk(self._kept[since.start], since, xs)
            return states[-1][:, : self._size]
        return self._kept[n][:, : self._size]

    def back(self, lam_n: Tensor, lengths: Sequence[int], *, exact: bool) -> Gradients:
        """The gradients of J from lam_n (K, P) = dJ/dtheta_n."""
        p, lam = self._problem, torch.zeros_like(self._kept[0])
        lam_n = with_zeros(lam_n, self._steps.optimiser.vectors)
        ends = torch.tensor(lengths, device=lam.device)
        grad_images, grad_rates = torch.zeros_like(self._images), torch.zeros_like(self._rates)
        grad_ys = [torch.zeros_like(y) for y in self._ys] if self._steps.by_labels else []
        for block in reversed(list(blocks(self._seen, self._block))):
            calls = [call for call in self._calls(block) if call.start < max(lengths)]
            if not calls:
                continue
            seen = range(block.start, calls[-1].stop)
            with torch.enable_grad():
                leaf = self._images.detach().requires_grad_()
                xs = p.batches(leaf, seen)
            states = self._states(seen, [x.detach() for x in xs])
            grad_xs: list[Tensor] = []
            for chosen in reversed(calls):
                here = slice(chosen.start - block.start, chosen.stop - block.start)
                there = slice(chosen.start, chosen.stop)
                back = self._steps.back(self._pieces(chosen), exact=exact)
                lam, of_rates, *of_inputs = back(
                    lam,
                    lam_n,
                    ends - chosen.start,
                    self._rates_of(chosen),
                    self._times[there],
                    *states[here],
                    *[x.detach() for x in xs[here]],
                    *self._ys[there],
                )
                grad_xs = of_inputs[: len(chosen)] + grad_xs
                if self._steps.by_labels:
                    grad_ys[there] = of_inputs[len(chosen) :]
                if grad_rates.dim() == 0:
                    grad_rates += of_rates.sum()
                else:
                    grad_rates[there] = of_rates
            grad_images += grad(xs, leaf, grad_xs)[0]
        return Gradients(grad_images, grad_rates, self._of_labels(grad_ys))

    def _of_labels(self, grad_ys: Sequence[Tensor]) -> Tensor | None:
        """dJ/dlabels from dJ/dy of every step, where labels are learned."""
        if not self._steps.by_labels:
            return None
        with torch.enable_grad():
            leaf = self._labels.detach().requires_grad_()
            ys = self._problem.labels(leaf)
        return grad(ys, leaf, grad_ys)[0]

    def _walk(
        self, state: Tensor, steps: range, xs: Sequence[Tensor]
    ) -> Iterator[tuple[range, Sequence[Tensor]]]:
        """Call by call of `steps`, which begin at `state`: the states after the steps of it."""
        for chosen in self._calls(steps):
            there = slice(chosen.start, chosen.stop)
            here = slice(chosen.start - steps.start, chosen.stop - steps.start)
            forward = self._steps.forward(self._pieces(chosen))
            states = forward(
                state, self._rates_of(chosen), self._times[there], *xs[here], *self._ys[there]
            )
            yield chosen, states
            state = states[-1]

    def _states(self, steps: range, xs: Sequence[Tensor]) -> list[Tensor]:
        """The state before each step of a block, computed again where it is not kept."""
        if self._stride == 1:
            return [self._kept[t] for t in steps]
        first = self._kept[steps.start]
        later = self._walk(first, steps[:-1], xs[:-1])
        return [first, *(state for _, states in later for state in states)]

    def _calls(self, steps: range) -> Iterator[range]:
        """Those of `steps` that are taken in one call."""
        sizes = [(self._problem.batch_sizes[t], self._ys[t].shape) for t in steps]
        for part in alike(sizes, self._steps.at_once):
            yield steps[part.start : part.stop]

    def _rates_of(self, steps: range) -> Tensor:
        if self._rates.dim() == 0:
            return self._rates.expand(len(steps))
        return self._rates[steps.start : steps.stop]

    def _pieces(self, steps: range) -> Pieces:
        whole = self._problem.batch_sizes[steps.start]
        return Pieces(whole, self._micro_batch, self._sum_over_ranks)


class _End(torch.autograd.Function):
    """theta_n as a function of images, rates and labels, whose gradient is `pull_back`."""

    @staticmethod
    def forward(
        ctx: Any,
        theta_n: Tensor,
        images: Tensor,
        rates: Tensor,
        labels: Tensor,
        pull_back: Callable[[Tensor], Gradients],
    ) -> Tensor:
        ctx.pull_back = pull_back
        return theta_n.view_as(theta_n)

    @staticmethod
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.pull_back(lam), None


@torch.enable_grad()
def unroll_by_autograd(
    images: Tensor,
    rates: Tensor,
    labels: Tensor,
    problem: Problem,
    loss: Loss,
    *,
    stop: Stop = LAST_STEP,
    exact: bool = True,
    optimiser: Optimiser = PLAIN_SGD,
) -> Unrolled:
    """Return the same by differentiating the whole graph of N_S steps: simple, large in memory."""
    p, inputs = problem, [images, rates, *([labels] if labels.is_floating_point() else [])]
    if not any(tensor.requires_grad for tensor in inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        images, rates, *soft = inputs
        labels = soft[0] if soft else labels
    xs, ys = p.batches(images, range(p.syn_steps)), p.labels(labels)
    ends, lengths, measured = [], [], []
    for k, theta_0 in enumerate(p.theta_0):
        target = None if p.theta_star is None else p.theta_star[k]
        state, thetas = first_state(optimiser, theta_0[None]), []
        for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if t == p.first:  # nothing flows back through what came before
                state = state.detach().requires_grad_()
            theta = state[0, : len(theta_0)]
            at = theta if exact and theta.requires_grad else theta.detach().requires_grad_()
            (g,) = grad(loss(at, x[k], y[k]), at, create_graph=True)
            time = rates.new_tensor(t + 1)
            state = optimiser.update(state, g[None], _rate(rates, t), time)
            thetas.append(state[0, : len(theta_0)])
        with torch.no_grad():
            each = [stop.measure(theta[None], target) for theta in thetas]
            measured.append(torch.cat(each, 1))
        lengths.append(stop.length(measured[-1][0], target, first=p.first))
        ends.append(thetas[lengths[-1] - 1])
    theta_n = torch.stack(ends)

    def pull_back(lam: Tensor) -> Gradients:
        by_images, by_rates, *by_labels = grad(
            theta_n, inputs, lam, retain_graph=True, materialize_grads=True
        )
        return Gradients(by_images, by_rates, by_labels[0] if by_labels else None)

    distances, *curves = torch.stack(measured, 1)
    by_name = dict(zip(stop.watched, curves, strict=True))
    return Unrolled(theta_n, lengths, distances, by_name, pull_back)


def _rate(rates: Tensor, t: int) -> Tensor:
    """eta_t, a view: of one rate for all steps, or of one a step."""
    return rates if rates.dim() == 0 else rates[t]
