"""Match students to their targets: the matching loss and its gradients, by either engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.compute.optimisers import PLAIN_SGD, Optimiser
from utils.methods.trajectory.lengths import att
from utils.methods.unroll.engine import unroll, unroll_by_autograd
from utils.methods.unroll.problem import Problem
from utils.methods.unroll.steps import Loss, Steps, Sum, itself
from utils.methods.unroll.stop import NOTHING, Distance, LengthPolicy, Stop

# (theta_n (K, P), theta* (K, P)) -> the weights (K, P) of the parameters in J
Weights = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mismatch:
    """J of each of K students (Eq. 4), over parameters that may count differently:

    J = ||theta_n - theta*||^2 / ||theta_0 - theta*||^2,        ||v||^2 = sum over i of w_i v_i^2
    """

    theta_0: Tensor  # (K, P)
    theta_star: Tensor  # (K, P)
    weights: Weights | None = None  # None: all count alike

    def __call__(self, theta_n: Tensor) -> Tensor:
        """J (K,) of theta_n (K, P), differentiable; the weights count as constants."""
        return self.with_slope(theta_n)[0]

    def with_slope(self, theta_n: Tensor) -> tuple[Tensor, Tensor]:
        """J (K,), and dJ/dtheta_n (K, P) in closed form."""
        weight = 1 if self.weights is None else self.weights(theta_n.detach(), self.theta_star)
        miss = weight * (theta_n - self.theta_star)
        scale = (weight * (self.theta_0 - self.theta_star).square()).sum(1, keepdim=True)
        value = (miss * (theta_n - self.theta_star)).sum(1) / scale[:, 0]
        return value, 2 * miss / scale


@dataclass(frozen=True)
class Objective:
    """What is matched: what a method of the family chooses.

    `policy` picks n from the distances by `distance`. `weights` say how much each parameter counts
    in J; without them all count alike. See `unroll` for `exact`.
    """

    distance: Distance
    policy: LengthPolicy
    weights: Weights | None = None
    exact: bool = True


@dataclass(frozen=True)
class Matching:
    """The outcome of matching K students in one outer step."""

    loss: Tensor  # the mean of J, a scalar
    lengths: list[int]  # n of each student
    distances: Tensor  # (K, N_S), to theta*, by the distance that picks n
    grad_images: Tensor  # dJ/dimages, shaped like the images
    grad_syn_lr: Tensor  # dJ/deta, a scalar
    curves: Mapping[str, Tensor]  # (K, N_S), by the watched distances
    grad_labels: Tensor | None = None  # dJ/dlabels, where they are learned

    @property
    def nearest(self) -> list[int]:
        """N_opt of each student: the step that is nearest to its target, matched or not."""
        return [att(row) for row in self.distances.cpu()]


def match_by_adjoint(
    problem: Problem,
    images: Tensor,
    syn_lr: Tensor,
    labels: Tensor,
    steps: Steps,
    objective: Objective,
    *,
    watched: Mapping[str, Distance] = NOTHING,
    micro_batch: int | None = None,
    sum_over_ranks: Sum = itself,
) -> Matching:
    """Match K students from images (N, C, H, W) with labels (N, ...) at the rate syn_lr, a scalar.

    The distances by the functions `watched` are returned as curves. Memory and the last two
    arguments: see `unroll`.
    """
    unrolled = unroll(
        images,
        syn_lr,
        labels,
        problem,
        steps,
        stop=Stop(objective.policy, objective.distance, watched),
        exact=objective.exact,
        micro_batch=micro_batch,
        sum_over_ranks=sum_over_ranks,
    )
    values, slopes = _mismatch(problem, objective).with_slope(unrolled.theta_n)
    k, lengths = len(values), unrolled.lengths
    loss = torch.zeros_like(syn_lr)
    for n in sorted(set(lengths), reverse=True):  # added up in the order of the sweep
        loss += values[[length == n for length in lengths]].sum() / k
    by = unrolled.pull_back(slopes / k)
    return Matching(
        loss, lengths, unrolled.distances, by.images, by.rates, unrolled.curves, by.labels
    )


def match_by_autograd(
    problem: Problem,
    images: Tensor,
    syn_lr: Tensor,
    labels: Tensor,
    loss: Loss,
    objective: Objective,
    *,
    watched: Mapping[str, Distance] = NOTHING,
    optimiser: Optimiser = PLAIN_SGD,
) -> Matching:
    """Return the same by differentiating J through the graph of all steps of `optimiser`."""
    stop = Stop(objective.policy, objective.distance, watched)
    unrolled = unroll_by_autograd(
        images.detach(),
        syn_lr.detach(),
        labels.detach(),
        problem,
        loss,
        stop=stop,
        exact=objective.exact,
        optimiser=optimiser,
    )
    with torch.enable_grad():
        j = _mismatch(problem, objective)(unrolled.theta_n).mean()
    (slopes,) = torch.autograd.grad(j, unrolled.theta_n, retain_graph=True)
    by = unrolled.pull_back(slopes)
    return Matching(
        j.detach(),
        unrolled.lengths,
        unrolled.distances,
        by.images,
        by.rates,
        unrolled.curves,
        by.labels,
    )


def _mismatch(problem: Problem, objective: Objective) -> Mismatch:
    if problem.theta_star is None:
        raise ValueError("a problem without a target cannot be matched")
    return Mismatch(problem.theta_0, problem.theta_star, objective.weights)
