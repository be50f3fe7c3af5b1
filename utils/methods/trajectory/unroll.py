r"""The unroll engine: students' training runs on the images, differentiable exactly.

    theta_{t+1} = theta_t - eta_t g(theta_t, x_t, y_t)        t = 0 ... N_S - 1

g is the gradient of `loss` by theta (P,), eta_t the synthetic learning rate, x_t and y_t the
augmented batch of step t. theta_n, the parameters after the step n that a length policy picks from
the distances to a target, is a function of the images and the rates: any loss of it can stand
behind it. K students run side by side, each with its own theta_0, target, batches and n. Two
engines of the same signature return the same numbers:

`unroll` keeps parameters and no graph. Backwards it rebuilds one step at a time, so its graph is
that of a single step (or of a piece of its batch) whatever N_S is, and steps behind n cost nothing.
`unroll_by_autograd`, its plain twin, keeps the whole graph, whose memory grows with N_S.

Everything is a pure function of its arguments: no randomness, no state, no logging.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from utils.compute.batches import alike
from utils.compute.execution import Execution, Function
from utils.methods.trajectory.lengths import DISTANCES, Distance, LengthPolicy, fixed

# (theta (P,), x (B, C, H, W), y (B,)) -> the scalar training loss, a mean over the batch
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Adds a tensor up over processes; the identity where there is one.
Sum = Callable[[Tensor], Tensor]

# Parameters of at most this many steps are kept; those between are computed again. No row of the
# paper has more, so that only longer unrolls pay (N_S = 200: a sixth more arithmetic) and memory
# stays bounded for any N_S.
KEPT_STEPS = 80

NOTHING: Mapping[str, Distance] = {}


@dataclass(frozen=True)
class Problem:
    """Where K students start, what they see, and where they should arrive, if anywhere.

    `batches(images, steps)` makes x_t (K, B_t, C, H, W) for each t of a range, `labels(labels)` y_t
    (K, B_t, ...) for every t. B_t may be this process's share of a batch of `batch_sizes[t]`, even
    none of it.
    """

    theta_0: Tensor  # (K, P)
    batches: Callable[[Tensor, range], Sequence[Tensor]]
    labels: Callable[[Tensor], Sequence[Tensor]]
    batch_sizes: Sequence[int]
    theta_star: Tensor | None = None  # (K, P)
    steps_per_block: int = 1  # how many steps' batches are best made together

    @property
    def syn_steps(self) -> int:
        return len(self.batch_sizes)


@dataclass(frozen=True)
class Stop:
    """Which theta_n is taken: `policy` picks n from the distances to the target by `distance`. The
    distances by the functions `watched` are measured beside it. Without a target n is N_S.
    """

    policy: LengthPolicy = fixed
    distance: Distance = DISTANCES["l2"]
    watched: Mapping[str, Distance] = field(default_factory=dict)

    def measure(self, thetas: Tensor, target: Tensor | None) -> Tensor:
        """The distances of thetas (T, P) to the target, (P,) or (T, P): (1 + watched, T)."""
        if target is None:
            return thetas.new_zeros(1 + len(self.watched), len(thetas))
        return torch.stack([by(thetas, target) for by in (self.distance, *self.watched.values())])

    def measure_all(self, thetas: Sequence[Tensor], target: Tensor | None) -> Tensor:
        """Those of T stacks of K parameters: (1 + watched, K, T)."""
        count = len(thetas)
        if target is not None:
            target = target.expand(count, *target.shape).flatten(0, 1)
        return self.measure(torch.cat(list(thetas)), target).unflatten(1, (count, -1)).mT

    def length(self, distances: Tensor, target: Tensor | None) -> int:
        """n from the distances (N_S,)."""
        return len(distances) if target is None else self.policy(distances)


@dataclass(frozen=True)
class Unrolled:
    """What K students reached, and the way back.

    `theta_n` is part of the graph where the images or rates require gradients. `pull_back` maps
    lam (K, P) = dJ/dtheta_n to dJ/dimages and dJ/drates, shaped like the images and the rates.
    """

    theta_n: Tensor  # (K, P)
    lengths: list[int]  # n of each student
    distances: Tensor  # (K, N_S), to the target, by the distance that picks n
    curves: Mapping[str, Tensor]  # (K, N_S), by the other distances
    pull_back: Callable[[Tensor], tuple[Tensor, Tensor]]


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
    adjoint:  (theta, x, y, lam) -> (<g, lam>, H lam, d<g, lam>/dx)

    `at_once` steps are at most taken in one call, which `capture` prepares.
    """

    gradient: Function
    adjoint: Function
    at_once: int = 1
    capture: Callable[[Function], Function] = lambda function: function
    _prepared: dict[Any, Function] = field(default_factory=dict)

    @classmethod
    def of(
        cls, loss: Loss, execution: Execution, *, rows: int = 1, one_by_one: bool = False
    ) -> "Steps":
        """Build both from `loss`. Compiled: forward over reverse, whose unused outputs the compiler
        removes. Not compiled: reverse over reverse, which is faster there.

        CUDA graphs capture several steps with all that is between them; `one_by_one` where
        processes talk to each other within a step.
        """
        of_loss = _double_reverse if execution.is_plain(rows) else _forward_over_reverse
        gradient, adjoint = of_loss(loss)
        if one_by_one:
            return cls(
                execution.prepare(gradient, rows=rows), execution.prepare(adjoint, rows=rows)
            )
        return cls(
            execution.in_rows(gradient, rows),
            execution.in_rows(adjoint, rows),
            execution.calls_at_once,
            execution.capture,
        )

    def forward(self, pieces: Pieces) -> Function:
        """(theta, rates (T,), T batches, their labels) -> theta after each of the T steps."""
        return self._once(_forward, self.gradient, pieces)

    def back(self, pieces: Pieces, *, exact: bool) -> Function:
        """(lam, lam_n, n (K,) counted from the first of the T steps, rates (T,), T thetas, T
        batches, their labels) -> (lam before the steps, dJ/drates (T,), T times dJ/dx).
        """
        return self._once(_back, self.adjoint, pieces, exact)

    def _once(self, function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> Function:
        """A function with its first arguments, prepared at the first call."""
        key = (function, *arguments)
        if key not in self._prepared:
            self._prepared[key] = self.capture(partial(function, *arguments))
        return self._prepared[key]


def _forward(
    gradient: Function, pieces: Pieces, theta: Tensor, rates: Tensor, *batches: Tensor
) -> tuple[Tensor, ...]:
    thetas = []
    for rate, x, y in zip(rates.unbind(), *_split(batches, 2), strict=True):
        parts = [
            (weight, gradient(theta, x_part, y_part)[0]) for weight, x_part, y_part in pieces(x, y)
        ]
        theta = theta - rate * pieces.sum_over_ranks(_weighted_sum(parts, like=theta))
        thetas.append(theta)
    return tuple(thetas)


def _back(
    adjoint: Function,
    pieces: Pieces,
    exact: bool,
    lam: Tensor,
    lam_n: Tensor,
    ends: Tensor,
    rates: Tensor,
    *states: Tensor,
) -> tuple[Tensor, ...]:
    """Invariant: lam = dJ/dtheta_t, K rows; it is zero for students whose n is below t. Each pass
    turns it into dJ/dtheta_{t-1}, using

        dJ/deta_t += -<g_t, lam>
        dJ/dx_t    = -eta_t d<g_t, lam>/dx_t      (then through augmentation to the images)
        lam       += -eta_t H_t lam,              H_t lam = d<g_t, lam>/dtheta_t

    The approximate gradient leaves lam as it is from n on.
    """
    grad_rates, grad_xs = [], []
    for t, (rate, theta, x, y) in reversed(
        [*enumerate(zip(rates.unbind(), *_split(states, 3), strict=True))]
    ):
        lam = torch.where(_beside(ends == t + 1, lam), lam_n, lam)
        products = _adjoint_step(adjoint, pieces, theta, x, y, lam)
        # Behind its n a student may have diverged: its numbers are dropped, not multiplied.
        g_lam, hessian_lam, grad_x = (
            each.masked_fill(_beside(ends <= t, each), 0) for each in products
        )
        grad_rates.append(-g_lam.sum())
        grad_xs.append(-rate * grad_x)
        if exact:
            lam = lam - rate * pieces.sum_over_ranks(hessian_lam)
    return lam, torch.stack(grad_rates[::-1]), *grad_xs[::-1]


def _adjoint_step(
    adjoint: Function, pieces: Pieces, theta: Tensor, x: Tensor, y: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """<g, lam> (K,), H lam (K, P) and d<g, lam>/dx, added up over the pieces of x."""
    parts = [
        (weight, adjoint(theta, x_part, y_part, lam)) for weight, x_part, y_part in pieces(x, y)
    ]
    g_lam = _weighted_sum([(weight, each[0]) for weight, each in parts], like=lam[:, 0])
    hessian_lam = _weighted_sum([(weight, each[1]) for weight, each in parts], like=lam)
    by_part = [each[2] if weight == 1 else weight * each[2] for weight, each in parts]
    grad_x = by_part[0] if len(by_part) == 1 else torch.cat([x[:, :0], *by_part], 1)
    return g_lam, hessian_lam, grad_x


def _split(tensors: Sequence[Tensor], kinds: int) -> list[Sequence[Tensor]]:
    """Tensors that follow each other kind by kind, by kind."""
    count = len(tensors) // kinds
    return [tensors[kind * count : (kind + 1) * count] for kind in range(kinds)]


def _beside(row: Tensor, tensor: Tensor) -> Tensor:
    """`row` (K,), to stand beside a tensor (K, ...)."""
    return row.view(-1, *[1] * (tensor.dim() - 1))


def _forward_over_reverse(loss: Loss) -> tuple[Function, Function]:
    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(loss)(theta, x, y),)

    def adjoint(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        def gradients(theta: Tensor) -> tuple[Tensor, ...]:
            by_both, value = torch.func.grad_and_value(loss, (0, 1))(theta, x, y)
            return value, *by_both

        return torch.func.jvp(gradients, (theta,), (lam,))[1]

    return gradient, adjoint


def _double_reverse(loss: Loss) -> tuple[Function, Function]:
    @torch.enable_grad()
    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        theta = theta.detach().requires_grad_()
        return grad(loss(theta, x, y), theta)

    @torch.enable_grad()
    def adjoint(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        theta, x = theta.detach().requires_grad_(), x.detach().requires_grad_()
        (g,) = grad(loss(theta, x, y), theta, create_graph=True)
        g_lam = g @ lam
        hessian_lam, mixed = grad(g_lam, (theta, x))
        return g_lam.detach(), hessian_lam, mixed

    return gradient, adjoint


@torch.no_grad()
def unroll(
    images: Tensor,
    rates: Tensor,
    labels: Tensor,
    problem: Problem,
    steps: Steps,
    *,
    stop: Stop = Stop(),
    exact: bool = True,
    micro_batch: int | None = None,
    sum_over_ranks: Sum = itself,
) -> Unrolled:
    """Train K students on the images and return theta_n, differentiable in images and rates.

    images (N, C, H, W), labels (N, ...) and rates, a scalar or one rate a step (N_S,), are read,
    not changed. Where the batches are shares of larger ones, g_t and H_t lam are added up over the
    processes by `sum_over_ranks`; the gradients that come back stay those of the own share, for the
    caller to add up. Without `exact` each g_t counts as a function of x_t alone, not of theta_t
    (TESLA, Cui et al., ICML 2023): the path from a batch to the later steps is left out.

    Memory: at most KEPT_STEPS x K x P floats, and one step of double backward on `micro_batch`
    images a student. Time: n steps of about three gradients on top of N_S.
    """
    sweep = _Sweep(images, rates, labels, problem, steps, micro_batch, sum_over_ranks)
    distances, *curves = sweep.forward(stop)
    lengths = [stop.length(row, problem.theta_star) for row in distances.cpu()]
    ends = torch.stack([sweep.theta(n)[k] for k, n in enumerate(lengths)])

    @torch.no_grad()
    def pull_back(lam: Tensor) -> tuple[Tensor, Tensor]:
        return sweep.back(lam, lengths, exact=exact)

    with torch.enable_grad():
        theta_n = _End.apply(ends, images, rates, pull_back)
    by_name = dict(zip(stop.watched, curves, strict=True))
    return Unrolled(theta_n, lengths, distances, by_name, pull_back)


class _Sweep:
    """The steps of one problem, forward and then back, with parameters kept and no graph."""

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
        self._ys = problem.labels(labels)
        self._problem = problem
        self._steps = steps
        self._micro_batch = micro_batch
        self._sum_over_ranks = sum_over_ranks
        # Parameters are kept of every stride-th step; a block is what is worked on at a time.
        self._stride = math.ceil(problem.syn_steps / KEPT_STEPS)
        self._block = problem.steps_per_block if self._stride == 1 else self._stride
        self._kept = {0: problem.theta_0}

    def forward(self, stop: Stop) -> Tensor:
        """Take all steps; the distances on the way, (1 + watched, K, N_S)."""
        p, measured = self._problem, []
        for block in blocks(p.syn_steps, self._block):
            xs = p.batches(self._images, block)
            for chosen, thetas in self._walk(self._kept[block.start], block, xs):
                measured.append(stop.measure_all(thetas, p.theta_star))
                for t, theta in zip(chosen, thetas, strict=True):
                    if (t + 1) % self._stride == 0:
                        self._kept[t + 1] = theta
        return torch.cat(measured, -1)

    def theta(self, n: int) -> Tensor:
        """theta_n (K, P), kept or computed again."""
        if n in self._kept:
            return self._kept[n]
        since = range(n - n % self._stride, n)
        xs = self._problem.batches(self._images, since)
        *_, (_, thetas) = self._walk(self._kept[since.start], since, xs)
        return thetas[-1]

    def back(self, lam_n: Tensor, lengths: Sequence[int], *, exact: bool) -> tuple[Tensor, Tensor]:
        """dJ/dimages and dJ/drates from lam_n (K, P) = dJ/dtheta_n."""
        p, lam = self._problem, torch.zeros_like(self._problem.theta_0)
        ends = torch.tensor(lengths, device=lam.device)
        grad_images, grad_rates = torch.zeros_like(self._images), torch.zeros_like(self._rates)
        for block in reversed(list(blocks(p.syn_steps, self._block))):
            calls = [call for call in self._calls(block) if call.start < max(lengths)]
            if not calls:
                continue
            seen = range(block.start, calls[-1].stop)
            with torch.enable_grad():
                leaf = self._images.detach().requires_grad_()
                xs = p.batches(leaf, seen)
            thetas = self._thetas(seen, [x.detach() for x in xs])
            grad_xs: list[Tensor] = []
            for chosen in reversed(calls):
                here = slice(chosen.start - block.start, chosen.stop - block.start)
                there = slice(chosen.start, chosen.stop)
                back = self._steps.back(self._pieces(chosen), exact=exact)
                lam, of_rates, *of_xs = back(
                    lam,
                    lam_n,
                    ends - chosen.start,
                    self._rates_of(chosen),
                    *thetas[here],
                    *[x.detach() for x in xs[here]],
                    *self._ys[there],
                )
                grad_xs = of_xs + grad_xs
                if grad_rates.dim() == 0:
                    grad_rates += of_rates.sum()
                else:
                    grad_rates[there] = of_rates
            grad_images += grad(xs, leaf, grad_xs)[0]
        return grad_images, grad_rates

    def _walk(
        self, theta: Tensor, steps: range, xs: Sequence[Tensor]
    ) -> Iterator[tuple[range, Sequence[Tensor]]]:
        """Call by call of `steps`, which begin at theta: theta_{t+1} for each t of the call."""
        for chosen in self._calls(steps):
            there = slice(chosen.start, chosen.stop)
            here = slice(chosen.start - steps.start, chosen.stop - steps.start)
            forward = self._steps.forward(self._pieces(chosen))
            thetas = forward(theta, self._rates_of(chosen), *xs[here], *self._ys[there])
            yield chosen, thetas
            theta = thetas[-1]

    def _thetas(self, steps: range, xs: Sequence[Tensor]) -> list[Tensor]:
        """theta_t for each t of a block, computed again where it is not kept."""
        if self._stride == 1:
            return [self._kept[t] for t in steps]
        first = self._kept[steps.start]
        later = self._walk(first, steps[:-1], xs[:-1])
        return [first, *(theta for _, thetas in later for theta in thetas)]

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
    """theta_n as a function of images and rates, whose gradient is `pull_back`."""

    @staticmethod
    def forward(
        ctx: Any, theta_n: Tensor, images: Tensor, rates: Tensor, pull_back: Callable
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
    stop: Stop = Stop(),
    exact: bool = True,
) -> Unrolled:
    """Return the same by differentiating the whole graph of N_S steps: simple, large in memory."""
    p, inputs = problem, (images, rates)
    if not any(tensor.requires_grad for tensor in inputs):
        images, rates = inputs = images.detach().requires_grad_(), rates.detach().requires_grad_()
    xs, ys = p.batches(images, range(p.syn_steps)), p.labels(labels)
    ends, lengths, measured = [], [], []
    for k, theta_0 in enumerate(p.theta_0):
        target = None if p.theta_star is None else p.theta_star[k]
        thetas = [theta_0.detach().requires_grad_()]
        for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
            at = thetas[-1] if exact else thetas[-1].detach().requires_grad_()
            (g,) = grad(loss(at, x[k], y[k]), at, create_graph=True)
            thetas.append(thetas[-1] - _rate(rates, t) * g)
        with torch.no_grad():
            each = [stop.measure(theta[None], target) for theta in thetas[1:]]
            measured.append(torch.cat(each, 1))
        lengths.append(stop.length(measured[-1][0], target))
        ends.append(thetas[lengths[-1]])
    theta_n = torch.stack(ends)

    def pull_back(lam: Tensor) -> tuple[Tensor, Tensor]:
        grad_images, grad_rates = grad(theta_n, inputs, lam, retain_graph=True)
        return grad_images, grad_rates

    distances, *curves = torch.stack(measured, 1)
    by_name = dict(zip(stop.watched, curves, strict=True))
    return Unrolled(theta_n, lengths, distances, by_name, pull_back)


def _rate(rates: Tensor, t: int) -> Tensor:
    """eta_t, a view: of one rate for all steps, or of one a step."""
    return rates if rates.dim() == 0 else rates[t]


def blocks(count: int, size: int) -> Iterator[range]:
    """0 ... count - 1 in ranges of `size`; the last may be shorter."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _weighted_sum(parts: Sequence[tuple[float, Tensor]], *, like: Tensor) -> Tensor:
    """The sum of weight * value; zeros like `like` where there is none. A whole costs nothing."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    total = torch.zeros_like(like)
    for weight, value in parts:
        total += weight * value
    return total
