"""Membership inference by a threshold on the loss (Yeom et al., CSF 2018).

Members are the images that a network, or the set that it was trained on, was made from; test images
are none. Dong et al. (ICML 2022) find that networks trained on a distilled set give less away;
Carlini et al. (arXiv 2209.14987) doubt it: an attack by a threshold says only what is easy to see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
