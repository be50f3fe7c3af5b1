"""Architecture search on a small set: does it order networks as the whole training set does?

As by Zhao et al. (DC, ICLR 2021), who correlate a grid of 720 ConvNets; here each of these networks
differs from the common one by one thing.
"""

from collections.abc import Mapping

from scipy import stats

GRID = (
    "ConvNetD1 ConvNetD2 ConvNetD3 ConvNetD4 ConvNetW32 ConvNetW64 ConvNetW256 ConvNetAS ConvNetAL "
    "ConvNetNN ConvNetBN ConvNetLN ConvNetGN ConvNetNP ConvNetMP"
).split()


def correlations(on_set: Mapping[str, float], on_all: Mapping[str, float]) -> tuple[float, float]:
    """Spearman's and Kendall's rank correlation of the networks' accuracies."""
    pairs = [(on_set[name], on_all[name]) for name in on_set]
    ours, theirs = zip(*pairs, strict=True)
    return (
        float(stats.spearmanr(ours, theirs).statistic),
        float(stats.kendalltau(ours, theirs).statistic),
    )
