r"""Inner optimisers: how a student's state follows from its gradient, and the way back.

    s_{t+1} = U(s_t, g_t, eta_t)            theta is the first P numbers of s

U is elementwise, so its derivatives are cheap; what they are multiplied with, the derivatives of
g_t, is the same for every optimiser. A state (K, vectors x P) holds K students.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Back:
    """What lam = dJ/ds_{t+1} means one step before.

    `state` is dJ/ds_t without the path through g_t. dJ/dg_t is scale x direction: a product with
    the derivatives of g_t is made with `direction` and then scaled. `by_rate` (K,) is dJ/deta_t;
    None where it is -<g_t, direction>.
    """

    state: Tensor  # (K, vectors x P)
    direction: Tensor  # (K, P)
    scale: Tensor | None = None  # None: 1
    by_rate: Tensor | None = None


class Optimiser(Protocol):
    """`time` is t + 1, a scalar; the gradient g is (K, P), the rate a scalar."""

    @property
    def vectors(self) -> int:
        """How many times P numbers a state has."""
        ...

    def update(self, state: Tensor, g: Tensor, rate: Tensor, time: Tensor) -> Tensor: ...

    def back(
        self, state: Tensor, g: Tensor | None, rate: Tensor, time: Tensor, lam: Tensor
    ) -> Back:
        """Go back from lam = dJ/ds_{t+1}; g is None where one vector is the whole state."""
        ...


@dataclass(frozen=True)
class SGD:
    """theta' = theta - eta g."""

    vectors: int = 1

    def update(self, state: Tensor, g: Tensor, rate: Tensor, time: Tensor) -> Tensor:
        return state - rate * g

    def back(
        self, state: Tensor, g: Tensor | None, rate: Tensor, time: Tensor, lam: Tensor
    ) -> Back:
        return Back(lam, direction=lam, scale=-rate)


@dataclass(frozen=True)
class Momentum:
    """m' = mu m + g; theta' = theta - eta m'."""

    mu: float = 0.9
    vectors: int = 2

    def update(self, state: Tensor, g: Tensor, rate: Tensor, time: Tensor) -> Tensor:
        theta, m = state.chunk(2, 1)
        m = self.mu * m + g
        return torch.cat([theta - rate * m, m], 1)

    def back(
        self, state: Tensor, g: Tensor | None, rate: Tensor, time: Tensor, lam: Tensor
    ) -> Back:
        return _back_by_vjp(self, state, g, rate, time, lam)


@dataclass(frozen=True)
class Adam:
    """m' = b1 m + (1 - b1) g; v' = b2 v + (1 - b2) g^2;
    theta' = theta - eta m^ / sqrt(v^ + eps^2), with m^ = m' / (1 - b1^t), v^ = v' / (1 - b2^t).

    eps stands under the root, other than in Kingma & Ba (ICLR 2015), so that the derivative exists
    where a gradient has been zero throughout.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    vectors: int = 3

    def update(self, state: Tensor, g: Tensor, rate: Tensor, time: Tensor) -> Tensor:
        theta, m, v = state.chunk(3, 1)
        m = torch.lerp(g, m, self.b1)
        v = torch.lerp(g.square(), v, self.b2)
        mean, square = m / (1 - self.b1**time), v / (1 - self.b2**time)
        return torch.cat([theta - rate * mean / (square + self.eps**2).sqrt(), m, v], 1)

    def back(
        self, state: Tensor, g: Tensor | None, rate: Tensor, time: Tensor, lam: Tensor
    ) -> Back:
        return _back_by_vjp(self, state, g, rate, time, lam)


def _back_by_vjp(
    optimiser: Optimiser, state: Tensor, g: Tensor | None, rate: Tensor, time: Tensor, lam: Tensor
) -> Back:
    """The way back of an update whose gradient g is known."""
    assert g is not None
    with torch.enable_grad():
        state, g, rates = (
            each.detach().requires_grad_() for each in (state, g, rate.expand(len(state), 1))
        )
        end = optimiser.update(state, g, rates, time)
    by_state, by_g, by_rate = torch.autograd.grad(end, (state, g, rates), lam)
    return Back(by_state, by_g, by_rate=by_rate[:, 0])


PLAIN_SGD = SGD()
OPTIMISERS: Mapping[str, Optimiser] = {"sgd": PLAIN_SGD, "momentum": Momentum(), "adam": Adam()}


def first_state(optimiser: Optimiser, theta_0: Tensor) -> Tensor:
    """The state in which training begins from theta_0 (K, P)."""
    return with_zeros(theta_0, optimiser.vectors)


def with_zeros(theta: Tensor, vectors: int) -> Tensor:
    """theta (K, P) as the first part of a state of zeros."""
    return theta if vectors == 1 else F.pad(theta, (0, (vectors - 1) * theta.shape[1]))
