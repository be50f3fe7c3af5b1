"""PP, dataset distillation using parameter pruning: what is hard to match does not count.

Li et al., IEICE Transactions E107-A(6), 2024.
"""

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
