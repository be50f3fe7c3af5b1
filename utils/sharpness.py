"""Sharpness-aware steps, with which FTD trains experts whose trajectories are flat (`--flat`).

The steps are GSAM's (Zhuang et al., ICLR 2022) in the adaptive form; that experts take them, and
how far, is FTD's (Du et al., CVPR 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EPS = 1e-12
# (theta (P,), statistics (S,), x, y) -> (gradient (P,), anything)
Gradient = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Sharpness:
    """How far a step looks around, `rho`, and how much of the orthogonal part it takes away,
    `alpha`.
    """

    rho: float
    alpha: float


def flat_gradient(gradient: Gradient, sharpness: Sharpness) -> Gradient:
    """The direction of a sharpness-aware step, in place of `gradient` and at twice its cost.

        e   = rho theta^2 g / (|| |theta| g || + EPS)        g   = gradient at theta
        d   = g_s - alpha (g - <g, u> u)                     g_s = gradient at theta + e
                                                             u   = g_s / (||g_s|| + EPS)

    The norms are over all parameters together. What `gradient` returns besides is that at theta.
    """

    def direction(theta: Tensor, *batch: Tensor) -> tuple[Tensor, Any]:
        g, at_theta = gradient(theta, *batch)
        e = sharpness.rho / ((theta * g).norm() + EPS) * theta.square() * g
        g_s, _ = gradient(theta + e, *batch)
        u = g_s / (g_s.norm() + EPS)
        return g_s - sharpness.alpha * (g - (g @ u) * u), at_theta

    return direction
