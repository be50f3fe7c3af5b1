"""The scores of DD-Ranking (Li et al., 2025, arXiv 2505.13300), from accuracies as fractions.

Their package (0.2.0) computes the label-robust score from percent, where it leaves [0, 1]; here all
come from fractions, as the paper defines them.
"""

import math

WEIGHT = 0.5  # of the first of two parts, as on the published board


def hard_label_recovery(full: float, synthetic: float) -> float:
    """HLR: what a set, with its classes alone, lacks of all training images. Less is better."""
    return full - synthetic


def improvement_over_random(synthetic: float, random: float) -> float:
    """IOR: what the set brings over as many random real images, trained on in the same way."""
    return synthetic - random


def label_robust_score(*, ior: float, hlr: float) -> float:
    """LRS, in [0, 1]: w IOR - (1 - w) HLR on an exponential scale."""
    return _scaled(WEIGHT * ior - (1 - WEIGHT) * hlr)


def augmentation_robust_score(*, ior: float, ior_unaugmented: float) -> float:
    """ARS, in [0, 1]: the IOR with and without augmentation, on the same scale."""
    return _scaled(WEIGHT * ior + (1 - WEIGHT) * ior_unaugmented)


def _scaled(value: float) -> float:
    """Map [-1, 1] to [0, 1]."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))
