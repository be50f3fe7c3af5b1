r"""Kernel ridge regression: what a kernel predicts of images from others with labels.

    prediction = K_ts (K_ss + reg tr(K_ss) / n I)^-1 y_s

s are the n images with labels, t those that are asked about. Labels are real numbers, one for each
class: a class is 1 for itself and 0 for the others, minus 1 / C.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.compute.ntk import Kernel
from utils.core import ranks

PIECE_BYTES = 2**28  # of a kernel that is only looked at


def regression_dtype(device: torch.device) -> torch.dtype:
    """What kernels are computed in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def centred(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Classes (N,) as labels (N, C) whose sum is 0."""
    return F.one_hot(labels, num_classes).to(dtype) - 1 / num_classes


def regularised(k_ss: Tensor, reg: float) -> Tensor:
    """K_ss + reg tr(K_ss) / n I."""
    identity = torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    return k_ss + reg * k_ss.trace() / len(k_ss) * identity


def predict(k_ts: Tensor, k_ss: Tensor, labels: Tensor, *, reg: float) -> Tensor:
    """The labels (m, C) of others, from those (n, C) that are known; NaN where that fails."""
    return k_ts @ torch.linalg.solve_ex(regularised(k_ss, reg), labels)[0]


def rows_at_once(kernel: Kernel, shape: Sequence[int], columns: int) -> int:
    """How many rows of that many columns a kernel of images of `shape` computes together."""
    return max(1, PIECE_BYTES // (columns * kernel.pair_cost(shape, graph=False).bytes))


@torch.no_grad()
def rows_of(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """K (len(x), len(y)) without a graph, in the type of y, in pieces."""
    pieces = x.split(rows_at_once(kernel, y.shape[1:], len(y)))
    return torch.cat([kernel(piece.to(y), y) for piece in pieces])


def own_pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Where pieces of this process's part of `count` rows begin and end."""
    first, last = (part * count // ranks.world() for part in (ranks.rank(), ranks.rank() + 1))
    return ((start, min(start + size, last)) for start in range(first, last, size))


def least_squares(
    pieces: Iterable[tuple[Tensor, Tensor]], like: Tensor, *, columns: int
) -> tuple[Tensor, Tensor]:
    """The W (n, C) with the least ||K W - y||^2 over K (m, n) and y (m, C), and that square. They
    come in `pieces`, of which each process has its own, in the type of `like` (0, n + C); `columns`
    is n.

    By one QR after another, of what the last one left and the next piece: as exact as that of all.
    W is the shortest where there are many.
    """
    triangle = like
    for k, y in pieces:
        triangle = _triangle(torch.cat([triangle, torch.cat([k, y], 1)]))
    if ranks.world() > 1:
        width = like.shape[1]
        parts = like.new_zeros(ranks.world(), width, width)
        parts[ranks.rank(), : len(triangle)] = triangle
        triangle = _triangle(ranks.sum_over_ranks(parts).flatten(0, 1))
    k, y = triangle[:, :columns], triangle[:, columns:]
    weights = torch.linalg.pinv(k) @ y
    return weights, (k @ weights - y).square().sum()


def _triangle(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows, mode="r")[1]
