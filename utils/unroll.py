r"""The unroll engine: a student's trajectory on the images, and the exact gradient through it.

    theta_{t+1} = theta_t - eta g(theta_t, x_t, y_t)        t = 0 ... N_S - 1
    J           = ||theta_n - theta*||^2 / ||theta_0 - theta*||^2

g is the gradient of `loss` by theta (P,), eta the synthetic learning rate, x_t = x(images, t) the
augmented batch of step t, and n the step that the length policy picks from the distances of
theta_1 ... theta_{N_S} to theta*. Two engines return the same numbers:

`adjoint` keeps the parameters, N_S x P floats, and no graph. Backwards it rebuilds one step at a
time, so its graph is that of a single step whatever N_S is, and steps behind n cost nothing.
`autograd`, its plain twin, is differentiation through the whole graph, whose memory grows with N_S.

Everything is a pure function of its arguments: no randomness, no state, no logging.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from utils.trajectory_length import LengthPolicy

# (theta (P,), x (B, C, H, W), y (B,)) -> the scalar training loss
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# images -> the augmented batch x_t of one step, differentiably
Batch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One outer step's data: where the student starts, what it sees, where it should arrive."""

    loss: Loss
    theta_0: Tensor  # (P,)
    theta_star: Tensor  # (P,)
    batches: Sequence[Batch]  # N_S of them
    labels: Sequence[Tensor]  # N_S of them


@dataclass(frozen=True)
class Matching:
    """The outcome of one outer step."""

    loss: Tensor  # J, a scalar
    length: int  # n
    distances: Tensor  # (N_S,), to theta*, by the distance that chooses n
    grad_images: Tensor  # dJ/dimages, shaped like the images
    grad_syn_lr: Tensor  # dJ/deta, a scalar


# (thetas (T, P), target (P,)) -> (T,)
Distance = Callable[[Tensor, Tensor], Tensor]
Engine = Callable[[Problem, Tensor, Tensor, Distance, LengthPolicy], Matching]


@torch.enable_grad()
def adjoint(
    problem: Problem, images: Tensor, syn_lr: Tensor, distance: Distance, policy: LengthPolicy
) -> Matching:
    """Match with constant graph memory: forward without a graph, then the exact reverse sweep.

    images (N, C, H, W) and the scalar syn_lr are read, not changed. Memory: N_S x P floats and the
    graph of one step of double backward. Time: n steps of about three gradients on top of N_S.
    """
    p, images, syn_lr = problem, images.detach(), syn_lr.detach()
    thetas = _forward(p, images, syn_lr)
    distances = _distances(thetas, p.theta_star, distance)
    length = policy(distances)

    # Invariant: lam = dJ/dtheta_t. Each pass turns it into dJ/dtheta_{t-1}, using
    #   dJ/deta   += -<g_t, lam>
    #   dJ/dx_t    = -eta d<g_t, lam>/dx_t        (then through augmentation to the images)
    #   lam       += -eta H_t lam,                H_t lam = d<g_t, lam>/dtheta_t
    scale = (p.theta_0 - p.theta_star).square().sum()
    miss = thetas[length] - p.theta_star
    lam = 2 * miss / scale
    grad_images, grad_syn_lr = torch.zeros_like(images), torch.zeros_like(syn_lr)
    for t in reversed(range(length)):
        g_lam, hessian_lam, mixed = _step_adjoint(p, thetas[t], images, lam, t)
        grad_syn_lr -= g_lam
        grad_images -= syn_lr * mixed
        lam = lam - syn_lr * hessian_lam
    return Matching(miss.square().sum() / scale, length, distances, grad_images, grad_syn_lr)


@torch.enable_grad()
def autograd(
    problem: Problem, images: Tensor, syn_lr: Tensor, distance: Distance, policy: LengthPolicy
) -> Matching:
    """The same by differentiating the whole graph of N_S steps: simple, and large in memory."""
    p = problem
    images, syn_lr = images.detach().requires_grad_(), syn_lr.detach().requires_grad_()
    thetas = [p.theta_0.detach().requires_grad_()]
    for batch, y in zip(p.batches, p.labels, strict=True):
        (g,) = grad(p.loss(thetas[-1], batch(images), y), thetas[-1], create_graph=True)
        thetas.append(thetas[-1] - syn_lr * g)
    with torch.no_grad():
        distances = _distances(thetas, p.theta_star, distance)
    length = policy(distances)
    scale = (p.theta_0 - p.theta_star).square().sum()
    loss = (thetas[length] - p.theta_star).square().sum() / scale
    grad_images, grad_syn_lr = grad(loss, (images, syn_lr))
    return Matching(loss.detach(), length, distances, grad_images, grad_syn_lr)


ENGINES: dict[str, Engine] = {"adjoint": adjoint, "autograd": autograd}


def _forward(p: Problem, images: Tensor, syn_lr: Tensor) -> list[Tensor]:
    """theta_0 ... theta_{N_S}, without a graph."""
    thetas = [p.theta_0.detach()]
    for batch, y in zip(p.batches, p.labels, strict=True):
        with torch.no_grad():
            x = batch(images)
        theta = thetas[-1].detach().requires_grad_()
        (g,) = grad(p.loss(theta, x, y), theta)
        thetas.append(thetas[-1] - syn_lr * g)
    return thetas


def _distances(thetas: Sequence[Tensor], target: Tensor, distance: Distance) -> Tensor:
    """Distances (N_S,) of theta_1 ... theta_{N_S}, one row at a time to bound the memory."""
    return torch.cat([distance(theta[None], target) for theta in thetas[1:]])


def _step_adjoint(
    p: Problem, theta: Tensor, images: Tensor, lam: Tensor, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """<g_t, lam>, H_t lam and d<g_t, lam>/dimages at theta_t, by reverse over reverse."""
    theta = theta.detach().requires_grad_()
    images = images.detach().requires_grad_()
    (g,) = grad(p.loss(theta, p.batches[t](images), p.labels[t]), theta, create_graph=True)
    g_lam = g @ lam
    hessian_lam, mixed = grad(g_lam, (theta, images))
    return g_lam.detach(), hessian_lam, mixed
