"""Which parameters count in the matching loss: not those that are hard to match, or shallow.

PP: Li et al., IEICE Transactions E107-A(6), 2024. PAD: Li et al., 2024.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.methods.trajectory.matching import Weights


def prune_dissimilar(threshold: float) -> Weights:
    """The weights 1 of parameters whose value is similar to the target's, and 0 of the others.

    The similarity of a and b is the smaller by the larger of them, negative where their signs
    differ: ab / max(a^2, b^2), so 1 where they are equal; less than `threshold` is pruned.
    The choice is not differentiated. UserError where nothing is left.
    """

    def weights(theta_n: Tensor, theta_star: Tensor) -> Tensor:
        larger = torch.maximum(theta_n.square(), theta_star.square())
        similar = theta_n * theta_star >= threshold * larger
        if not similar.any(1).all():
            raise UserError(
                f"--prune_threshold {threshold} leaves no parameter to match: choose a lower one"
            )
        return similar.to(theta_n.dtype)

    return weights


def drop_shallow(ratio: float) -> Weights:
    """The weights 0 of the first floor(ratio P) parameters, in `parameters()` order, and 1 of the
    deeper ones (PAD).
    """

    def weights(theta_n: Tensor, theta_star: Tensor) -> Tensor:
        kept = torch.ones_like(theta_n)
        kept[:, : int(ratio * theta_n.shape[1])] = 0
        return kept

    return weights


def all_of(weights: Sequence[Weights]) -> Weights | None:
    """The weights of parameters that count by all of them; None where there are none."""
    if not weights:
        return None

    def product(theta_n: Tensor, theta_star: Tensor) -> Tensor:
        return torch.stack([each(theta_n, theta_star) for each in weights]).prod(0)

    return weights[0] if len(weights) == 1 else product
