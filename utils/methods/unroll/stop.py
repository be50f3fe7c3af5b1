"""Which theta_n of an unrolled training run is taken, from the distances to a target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Distances (T,) of theta_1 ... theta_T to the target -> the step that is taken, in 1 ... T
LengthPolicy = Callable[[Tensor], int]
# Of each theta (T, P) to the target, (P,) or one for each (T, P): (T,)
Distance = Callable[[Tensor, Tensor], Tensor]

NOTHING: Mapping[str, Distance] = {}


def squared_l2(thetas: Tensor, target: Tensor) -> Tensor:
    """||theta - target||^2 of each theta."""
    return (thetas - target).square().sum(1)


@dataclass(frozen=True)
class Stop:
    """Which theta_n is taken: `policy` picks n from the distances to the target by `distance`. The
    distances by the functions `watched` are measured beside it. Without a target n is N_S.
    """

    policy: LengthPolicy = len
    distance: Distance = squared_l2
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

    def length(self, distances: Tensor, target: Tensor | None, *, first: int = 0) -> int:
        """n from the distances (N_S,), above `first`."""
        return len(distances) if target is None else first + self.policy(distances[first:])


LAST_STEP = Stop()
