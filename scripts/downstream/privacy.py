"""Membership inference by a threshold on the loss (Yeom et al., CSF 2018).

Members are the images that a network, or the set that it was trained on, was made from; test images
are none. Dong et al. (ICML 2022) find that networks trained on a distilled set give less away;
Carlini et al. (arXiv 2209.14987) doubt it: a threshold shows only what is easy to see.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eval as evaluation
from scripts.downstream.lines import Line
from utils.compute.cohort import outputs


@dataclass(frozen=True)
class Attack:
    """How well losses tell members from others: 0.5 and 0 where they do not."""

    auc: float  # the chance that a member's loss is below another image's
    advantage: float  # the most by which true positives exceed false ones


def attack(members: Tensor, others: Tensor) -> Attack:
    """Attack with the losses (n,) of members and (m,) of others."""
    losses = torch.cat([members, others]).double()
    is_member = torch.cat([torch.ones_like(members), torch.zeros_like(others)]).double()
    values, group = losses.unique(return_inverse=True)  # equal losses fall together
    hits, misses = (
        torch.zeros(len(values), dtype=torch.float64, device=losses.device).index_add(
            0, group, kind
        )
        for kind in (is_member, 1 - is_member)
    )
    true, false = hits.cumsum(0) / len(members), misses.cumsum(0) / len(others)
    rises = misses / len(others)
    auc = (rises * (true - hits / len(members) / 2)).sum()
    return Attack(auc.item(), max(0.0, (true - false).max().item()))


TRAIN, SEEN = "training images", "the images that networks saw"


def attack_networks(
    measurement: evaluation.Measurement, line: Line
) -> Iterator[tuple[str, Attack]]:
    """Train networks on a line and attack each; who counts as a member, and the mean attack."""
    found: defaultdict[str, list[Attack]] = defaultdict(list)
    test, train = measurement.data.test, measurement.data.require_train()
    images, is_real = line.training_set.images, not line.name.startswith("distilled")

    def look(number: int, network: nn.Module) -> None:
        others = _losses(network, test.images, test.labels)
        found[TRAIN].append(attack(_losses(network, train.images, train.labels), others))
        if is_real and isinstance(images, list):  # some of the training images
            own = _losses(network, images[number], line.classes)
            found[SEEN].append(attack(own, others))

    measurement.evaluate(line.training_set, measurement.call.models[0], look=look)
    for members, attacks in found.items():
        auc, advantage = (fmean(each) for each in zip(*map(_pair, attacks), strict=True))
        yield members, Attack(auc, advantage)


def _pair(found: Attack) -> tuple[float, float]:
    return found.auc, found.advantage


def _losses(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy (N,) of each image."""
    return F.cross_entropy(outputs(network, images), labels, reduction="none")
