"""Sharpness-aware steps, with which FTD trains experts whose trajectories are flat (`--flat`).

The steps are GSAM's (Zhuang et al., ICLR 2022) in the adaptive form; that experts take them, and
how far, is FTD's (Du et al., CVPR 2023). With g the gradient at theta, a step goes along

    d = g_s - alpha (g - <g, u> u)      g_s = gradient at theta + e,   u = g_s / (||g_s|| + EPS)
    e = rho theta^2 g / (|| |theta| g || + EPS)

instead of g, at twice the cost. The norms are over all parameters together.
"""

from dataclasses import dataclass

from torch import Tensor

EPS = 1e-12


@dataclass(frozen=True)
class Sharpness:
    """How far a step looks around, `rho`, and how much of g's orthogonal part it takes away,
    `alpha`.
    """

    rho: float
    alpha: float

    def beside(self, theta: Tensor, g: Tensor) -> Tensor:
        """theta + e (P,), where the loss is higher."""
        return theta + self.rho / ((theta * g).norm() + EPS) * theta.square() * g

    def direction(self, g: Tensor, g_s: Tensor) -> Tensor:
        """d (P,), from the gradients at theta and beside it."""
        u = g_s / (g_s.norm() + EPS)
        return g_s - self.alpha * (g - (g @ u) * u)
