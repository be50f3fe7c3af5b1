"""Length policies: from the distances along a student's trajectory to the step that is matched.

A policy maps distances (N_S,), where entry t - 1 is the distance of theta_t to the expert's target,
t = 1 ... N_S, to a step in 1 ... N_S. Step 0 is no candidate: it does not depend on the images.
"""

import torch
from torch import Tensor

from utils.methods.unroll.stop import Distance, LengthPolicy, squared_l2


def att(distances: Tensor) -> int:
    """The step nearest to the target, the first of them on a tie (Eq. 6, Algorithm 1).

    A student that diverged on its way counts as infinitely far from there on.
    """
    return int(distances.nan_to_num(nan=torch.inf).argmin()) + 1


def fixed(distances: Tensor) -> int:
    """The last step, N_S (MTT and all that follow it)."""
    return len(distances)


LENGTH_POLICIES: dict[str, LengthPolicy] = {"att": att, "fixed": fixed}

DISTANCES: dict[str, Distance] = {
    "l2": squared_l2,
    "l1": lambda thetas, target: (thetas - target).abs().sum(1),
}
