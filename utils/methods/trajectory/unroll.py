r"""The unroll engine: students' trajectories on the images, and the exact gradient through them.

    theta_{t+1} = theta_t - eta g(theta_t, x_t, y_t)        t = 0 ... N_S - 1
    J           = ||theta_n - theta*||^2 / ||theta_0 - theta*||^2

g is the gradient of `loss` by theta (P,), eta the synthetic learning rate, x_t the augmented batch
of step t, and n the step that the length policy picks from the distances of theta_1 ... theta_{N_S}
to theta*. K students go side by side, each with its own theta_0, theta*, batches and n; J and its
gradients are the means over them. Two engines return the same numbers:

`adjoint` keeps parameters and no graph. Backwards it rebuilds one step at a time, so its graph is
that of a single step (or of a piece of its batch) whatever N_S is, and steps behind n cost nothing.
`autograd`, its plain twin, is differentiation through the whole graph, whose memory grows with N_S.

Everything is a pure function of its arguments: no randomness, no state, no logging.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from utils.compute.execution import Execution, Function
from utils.methods.trajectory.lengths import Distance, LengthPolicy, att

# (theta (P,), x (B, C, H, W), y (B,)) -> the scalar training loss, a mean over the batch
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# (theta_n (K, P), theta* (K, P)) -> the weights (K, P) of the parameters in J
Weights = Callable[[Tensor, Tensor], Tensor]
# Adds a tensor up over processes; the identity where there is one.
Sum = Callable[[Tensor], Tensor]

# Parameters are kept of so many steps at the most; those between are computed again. No row of
# the paper has more, so that only longer unrolls pay (N_S = 200: a sixth more arithmetic) and
# memory stays bounded for any N_S.
KEPT_STEPS = 80

NOTHING: Mapping[str, Distance] = {}


@dataclass(frozen=True)
class Problem:
    """One outer step's data: where K students start, what they see, where they should arrive.

    `batches(images, steps)` makes x_t (K, B_t, C, H, W) for each t of a range; `labels[t]` is
    (K, B_t). B_t may be this process's share of a batch of `batch_sizes[t]`, even none of it.
    """

    theta_0: Tensor  # (K, P)
    theta_star: Tensor  # (K, P)
    batches: Callable[[Tensor, range], Sequence[Tensor]]
    labels: Sequence[Tensor]
    batch_sizes: Sequence[int]
    steps_per_block: int = 1  # how many steps' batches are best made together

    @property
    def syn_steps(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Objective:
    """What is matched: what a method of the family chooses.

    `policy` picks n from the distances by `distance`. `weights` say how much each parameter counts
    in J, above and below the fraction; without them all count alike. Where the gradient is not
    `exact`, it takes each g_t for a function of x_t alone, not of theta_t (TESLA, Cui et al., ICML
    2023): the path from a batch to the later steps is left out.
    """

    distance: Distance
    policy: LengthPolicy
    weights: Weights | None = None
    exact: bool = True


@dataclass(frozen=True)
class Matching:
    """The outcome of one outer step."""

    loss: Tensor  # J, a scalar
    lengths: list[int]  # n of each student
    distances: Tensor  # (K, N_S), to theta*, by the distance that chooses n
    grad_images: Tensor  # dJ/dimages, shaped like the images
    grad_syn_lr: Tensor  # dJ/deta, a scalar
    curves: Mapping[str, Tensor]  # (K, N_S), by the other distances that were asked for

    @property
    def nearest(self) -> list[int]:
        """N_opt of each student: the step that is nearest to its target, matched or not."""
        return [att(row) for row in self.distances.cpu()]


@dataclass(frozen=True)
class Steps:
    """The inner step and its adjoint, as functions of stacks with K rows.

    gradient: (theta, x, y) -> (g,)
    adjoint:  (theta, x, y, lam) -> (<g, lam>, H lam, d<g, lam>/dx)
    """

    gradient: Function
    adjoint: Function

    @classmethod
    def of(cls, loss: Loss, execution: Execution, *, rows: int = 1) -> "Steps":
        """Those of `loss`. Compiled, the adjoint is forward over reverse, where the compiler drops
        what nobody asked for; as it stands, reverse over reverse is the faster form.
        """
        of_loss = _double_reverse if execution.is_plain(rows) else _forward_over_reverse
        gradient, adjoint = of_loss(loss)
        return cls(execution.prepare(gradient, rows=rows), execution.prepare(adjoint, rows=rows))


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
def adjoint(
    problem: Problem,
    images: Tensor,
    syn_lr: Tensor,
    steps: Steps,
    objective: Objective,
    *,
    watched: Mapping[str, Distance] = NOTHING,
    micro_batch: int | None = None,
    sum_over_ranks: Sum = lambda tensor: tensor,
) -> Matching:
    """Match with constant graph memory: forward without a graph, then the exact reverse sweep.

    images (N, C, H, W) and the scalar syn_lr are read, not changed. The distances by the functions
    `watched` are returned as curves. Where the batches are shares of
    larger ones, g_t and H_t lam are added up over the processes by `sum_over_ranks`; `grad_images`
    and `grad_syn_lr` stay those of the own share, for the caller to add up.

    Memory: at most KEPT_STEPS x K x P floats, and one step of double backward on `micro_batch`
    images a student. Time: n steps of about three gradients on top of N_S.
    """
    p, eta = problem, syn_lr
    stride = math.ceil(p.syn_steps / KEPT_STEPS)
    block = p.steps_per_block if stride == 1 else stride

    def walk(theta: Tensor, steps_of_block: range, xs: Sequence[Tensor]) -> Iterator[Tensor]:
        """theta_{t+1} for each t of a block that begins at theta."""
        for t, x in zip(steps_of_block, xs, strict=True):
            parts = [
                (weight, steps.gradient(theta, x_part, y_part)[0])
                for x_part, y_part, weight in _pieces(p, t, x, micro_batch)
            ]
            theta = theta - eta * sum_over_ranks(_weighted_sum(parts, like=theta))
            yield theta

    kept = {0: p.theta_0}
    per_step = []
    for chosen in blocks(p.syn_steps, block):
        xs = p.batches(images, chosen)
        for t, theta in zip(chosen, walk(kept[chosen.start], chosen, xs), strict=True):
            per_step.append(_measure(theta, p.theta_star, objective, watched))
            if (t + 1) % stride == 0:
                kept[t + 1] = theta
    distances, *curves = torch.stack(per_step, -1)
    lengths = [objective.policy(row) for row in distances.cpu()]

    # Invariant: lam = dJ/dtheta_t, K rows; it is zero for students whose n is below t. Each pass
    # turns it into dJ/dtheta_{t-1}, using
    #   dJ/deta   += -<g_t, lam>
    #   dJ/dx_t    = -eta d<g_t, lam>/dx_t        (then through augmentation to the images)
    #   lam       += -eta H_t lam,                H_t lam = d<g_t, lam>/dtheta_t
    # The approximate gradient leaves lam as it is from n on.
    lam = torch.zeros_like(p.theta_0)
    loss, grad_syn_lr = torch.zeros_like(eta), torch.zeros_like(eta)
    ends_at = torch.tensor(lengths, device=lam.device)
    grad_images = torch.zeros_like(images)
    for chosen in reversed(list(blocks(max(lengths), block))):
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            xs = p.batches(leaf, chosen)
        seen = [x.detach() for x in xs]
        thetas = [kept[chosen.start]]
        thetas += [kept[t + 1] for t in chosen if t + 1 in kept]
        if len(thetas) <= len(chosen):
            thetas[1:] = walk(thetas[0], chosen, seen)
        grad_xs = []
        for i, t in reversed(list(enumerate(chosen))):
            x, theta, after = seen[i], thetas[i], thetas[i + 1]
            if rows := [k for k, n in enumerate(lengths) if n == t + 1]:
                ratios, slopes = _mismatch(
                    after[rows], p.theta_0[rows], p.theta_star[rows], objective.weights
                )
                loss += ratios.sum() / len(lengths)
                lam[rows] = slopes / len(lengths)
            g_lam, hessian_lam, grad_x = _adjoint_step(p, steps, t, theta, x, lam, micro_batch)
            if min(lengths) <= t:
                # Behind its n a student may have diverged: its numbers are dropped, not multiplied.
                for product in (g_lam, hessian_lam, grad_x):
                    product[ends_at <= t] = 0
            grad_syn_lr -= g_lam.sum()
            grad_xs.append(-eta * grad_x)
            if objective.exact:
                lam = lam - eta * sum_over_ranks(hessian_lam)
        grad_images += grad(xs, leaf, grad_xs[::-1])[0]
    by_name = dict(zip(watched, curves, strict=True))
    return Matching(loss, lengths, distances, grad_images, grad_syn_lr, by_name)


@torch.enable_grad()
def autograd(
    problem: Problem,
    images: Tensor,
    syn_lr: Tensor,
    loss: Loss,
    objective: Objective,
    *,
    watched: Mapping[str, Distance] = NOTHING,
) -> Matching:
    """The same by differentiating the whole graph of N_S steps: simple, and large in memory."""
    p = problem
    images, syn_lr = images.detach().requires_grad_(), syn_lr.detach().requires_grad_()
    xs = p.batches(images, range(p.syn_steps))
    losses, lengths, measured = [], [], []
    for k, (theta_0, theta_star) in enumerate(zip(p.theta_0, p.theta_star, strict=True)):
        thetas = [theta_0.detach().requires_grad_()]
        for x, y in zip(xs, p.labels, strict=True):
            at = thetas[-1] if objective.exact else thetas[-1].detach().requires_grad_()
            (g,) = grad(loss(at, x[k], y[k]), at, create_graph=True)
            thetas.append(thetas[-1] - syn_lr * g)
        with torch.no_grad():
            each = [_measure(t[None], theta_star, objective, watched) for t in thetas[1:]]
            measured.append(torch.cat(each, 1))
        lengths.append(objective.policy(measured[-1][0]))
        end = thetas[lengths[-1]]
        losses.append(_mismatch(end[None], theta_0[None], theta_star[None], objective.weights)[0])
    mean = torch.cat(losses).mean()
    grad_images, grad_syn_lr = grad(mean, (images, syn_lr))
    distances, *curves = torch.stack(measured, 1)
    by_name = dict(zip(watched, curves, strict=True))
    return Matching(mean.detach(), lengths, distances, grad_images, grad_syn_lr, by_name)


def _measure(
    thetas: Tensor, target: Tensor, objective: Objective, watched: Mapping[str, Distance]
) -> Tensor:
    """The distances of thetas (T, P) to the target, (P,) or (T, P), by that of the objective and by
    those watched: (1 + watched, T).
    """
    return torch.stack([by(thetas, target) for by in (objective.distance, *watched.values())])


def _mismatch(
    theta_n: Tensor, theta_0: Tensor, theta_star: Tensor, weights: Weights | None
) -> tuple[Tensor, Tensor]:
    """J of each student (K,) from parameters (K, P), and dJ/dtheta_n (K, P)."""
    weight = 1 if weights is None else weights(theta_n.detach(), theta_star)
    miss = weight * (theta_n - theta_star)
    scale = (weight * (theta_0 - theta_star).square()).sum(1, keepdim=True)
    return (miss * (theta_n - theta_star)).sum(1) / scale[:, 0], 2 * miss / scale


def blocks(count: int, size: int) -> Iterator[range]:
    """0 ... count - 1 in ranges of `size`; the last may be shorter."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _pieces(
    p: Problem, t: int, x: Tensor, micro_batch: int | None
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The batch x (K, B, C, H, W) of step t in pieces with labels and weights, so that the weighted
    sum of the pieces' mean losses is the mean loss of the whole batch.
    """
    size = micro_batch or max(1, x.shape[1])
    for x_part, y_part in zip(x.split(size, 1), p.labels[t].split(size, 1), strict=True):
        if x_part.shape[1] > 0:
            yield x_part, y_part, x_part.shape[1] / p.batch_sizes[t]


def _adjoint_step(
    p: Problem,
    steps: Steps,
    t: int,
    theta: Tensor,
    x: Tensor,
    lam: Tensor,
    micro_batch: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """<g_t, lam> (K,), H_t lam (K, P) and d<g_t, lam>/dx_t, added up over the pieces of x."""
    parts = [
        (weight, steps.adjoint(theta, x_part, y_part, lam))
        for x_part, y_part, weight in _pieces(p, t, x, micro_batch)
    ]
    g_lam = _weighted_sum([(weight, products[0]) for weight, products in parts], like=lam[:, 0])
    hessian_lam = _weighted_sum([(weight, products[1]) for weight, products in parts], like=lam)
    by_part = [products[2] if weight == 1 else weight * products[2] for weight, products in parts]
    grad_x = by_part[0] if len(by_part) == 1 else torch.cat([x[:, :0], *by_part], 1)
    return g_lam, hessian_lam, grad_x


def _weighted_sum(parts: Sequence[tuple[float, Tensor]], *, like: Tensor) -> Tensor:
    """The sum of weight * value; zeros like `like` where there is none. A whole costs nothing."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    total = torch.zeros_like(like)
    for weight, value in parts:
        total += weight * value
    return total
