"""Real images instead of synthetic ones, as many for each class: by which rules they are chosen.

A new rule (see Rule) is a function, a line in SELECTIONS and a flag in EvalOptions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.core import ranks
from utils.core.rng import stream
from utils.data.dataset import ImageDataset, Split
from utils.data.real_images import Rule, at_random, choose_of_each_class
from utils.experts.features import ExpertFeatures


def herding(features: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """One by one the image of features (n, F) that brings the mean of the chosen ones nearest to
    the mean of the class; nothing is drawn.

    Herding is Welling's (ICML 2009), this greedy form that of iCaRL (Rebuffi et al., CVPR 2017,
    Algorithm 4), which scales features to length 1; here they are as the network has them.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for count in range(1, ipc + 1):
        distances = _lengths((total + features) / count - mean)
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)


def k_center(features: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """One by one the image of features (n, F) that is farthest from all chosen ones, beginning with
    the one nearest to the mean of the class; nothing is drawn. Memory: O(n F).

    k-Center-Greedy of Sener & Savarese (ICLR 2018, Algorithm 1), which begins with labelled images
    that are there; public code for choosing from nothing begins with a random one.
    """
    chosen = [int(_lengths(features - features.mean(0)).argmin())]
    nearest = features.new_full((len(features),), torch.inf)  # to the nearest of the chosen ones
    while len(chosen) < ipc:
        nearest = torch.minimum(nearest, _lengths(features - features[chosen[-1]]))
        nearest[chosen[-1]] = -1  # even where all that are left lie on chosen ones
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def forgetting(right: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """The images most often forgotten: answered right after one epoch and wrong after the next, by
    right (n, epochs). One that was never right counts as most; among equals it is drawn.

    Toneva et al. (ICLR 2019), who look at an image whenever it comes in a mini-batch, so once an
    epoch as well, but each at another moment; the buffers have the ends of the epochs.
    """
    events = (right[:, :-1] & ~right[:, 1:]).sum(1)
    events[~right.any(1)] = right.shape[1]
    shuffled = torch.randperm(len(events), generator=generator)
    ranks = events.cpu()[shuffled].argsort(descending=True, stable=True)
    return shuffled[ranks[:ipc]]


def lowest_loss(losses: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """The images that the expert finds easiest, by losses (n, 1); nothing is drawn.

    As RDED (Sun et al., CVPR 2024) chooses its crops; here they are whole images with hard labels.
    """
    return losses[:, 0].argsort(stable=True)[:ipc].cpu()


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


@dataclass(frozen=True)
class Selection:
    """A rule, and `view`: how the experts describe all training images to it, one row for each.
    Without a view it has only their labels. `trained_on` is what eval.json calls it.
    """

    trained_on: str
    rule: Rule
    view: Callable[[ExpertFeatures, int, Split], Tensor] | None = None

    def describe(self, expert_features: ExpertFeatures | None, expert: int, train: Split) -> Tensor:
        """A row (N, ...) for each training image, as `expert` of the `expert_features` sees it."""
        if self.view is None:
            return train.labels
        if expert_features is None:
            raise ValueError(f"{self.trained_on} needs experts")
        return self.view(expert_features, expert, train)


# By the name of its flag in EvalOptions.
SELECTIONS = {
    "random": Selection("random real", at_random),
    "herding": Selection("herding", herding, ExpertFeatures.features),
    "k_center": Selection("k-center", k_center, ExpertFeatures.features),
    "forgetting": Selection("forgetting", forgetting, ExpertFeatures.right_answers),
    "lowest_loss": Selection("lowest loss", lowest_loss, ExpertFeatures.losses),
}


def need_experts(names: Sequence[str]) -> bool:
    return any(SELECTIONS[name].view is not None for name in names)


def select(
    name: str,
    data: ImageDataset,
    ipc: int,
    *,
    networks: int,
    seed: int,
    expert_features: ExpertFeatures | None,
) -> list[Tensor]:
    """For each of `networks` networks, `ipc` training images of each class: (num_classes * ipc, C,
    H, W), in order of classes.

    Those of network k follow from `seed` and k; it asks expert k, modulo their number, so that the
    spread of the accuracies is that of the choice as well. Several processes divide the experts.
    UserError where a class has fewer images.
    """
    selection, train = SELECTIONS[name], data.require_train()
    experts = networks if expert_features is None else min(networks, len(expert_features.experts))
    own: dict[int, Tensor] = {}
    for expert in range(ranks.rank(), experts, ranks.world()):
        described = selection.describe(expert_features, expert, train)
        for k in range(expert, networks, experts):
            own[k] = choose_of_each_class(
                data, ipc, selection.rule, described, stream(seed, name, k)
            )
    chosen = {k: indices for part in ranks.gather(own) for k, indices in part.items()}
    return [train.images[chosen[k].to(train.images.device)] for k in range(networks)]
