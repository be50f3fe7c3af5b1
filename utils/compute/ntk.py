r"""Neural tangent kernels of infinitely wide ReLU networks (Jacot et al., 2018), in closed form.

S is the covariance of two images' activations, T their tangent kernel, layer by layer, with
W_std^2 = 2 and b_std^2 = 0.01:

    linear:  S <- 2 mix(S) + 0.01,    T <- S + 2 mix(T)      with the new S; T = 0 before the first
    ReLU:    T <- T k0(S),            S <- k1(S)

mix is the identity of a fully connected layer, the mean over the 3x3 window of a convolution, over
the positions where these become one vector. With a and b the images' own S, c = S / sqrt(ab) and
t = arccos c the arc-cosine kernels (Cho & Saul, 2009) are

    k1 = sqrt(ab) (sin t + (pi - t) c) / (2 pi),    k0 = (pi - t) / (2 pi)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT, BIAS = 2.0, 0.01  # W_std^2, b_std^2
# d k0 / dc grows without bound where two images become one. There c = 1 - 1e-6 has to do.
LEAST_SINE = math.sqrt(2e-6)
ROUNDING = 32  # in machine epsilons: a c that is so near to 1 is 1
WORD = 8  # bytes of a float64

# For one pair of images, in units of what a layer has for it: tensors that a piece holds at most
# without and with a graph, and arithmetic. Nearly all of it is elementwise and waits for memory, so
# it counts as many FLOP as fit into its time: measured on a busy CPU, rough.
COPIES, GRAPH_COPIES = 11, 23
FLOP_A_NUMBER, GRAPH_FLOP_A_NUMBER = 7_000, 18_000


class PairCost(NamedTuple):
    """What a kernel costs for one pair of images: arithmetic, and bytes at most."""

    flop: int
    bytes: int


class Kernel(Protocol):
    """A function of two sets of images (n, C, H, W), (m, C, H, W) to (n, m), differentiable once.

    As text it is its name in tables.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

    def pair_cost(self, shape: Sequence[int], *, graph: bool) -> PairCost:
        """Count a pair of images (C, H, W) in float64; with `graph` also the way back."""
        ...


@dataclass(frozen=True)
class FullyConnected:
    """The kernel of a network with `depth` hidden layers."""

    depth: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(1), y.flatten(1)
        s, t = x @ y.T / x.shape[1], None
        a, b = (torch.einsum("nd,nd->n", own, own) / own.shape[1] for own in (x, y))
        a = a[:, None]
        for _ in range(self.depth):
            s, t = _linear(s, t)
            a, b = (_linear(own)[0] for own in (a, b))
            s, slope = _relu(s, a, b)
            t, a, b = t * slope, a / 2, b / 2
        return _linear(s, t)[1]

    def __str__(self) -> str:
        return f"NTK-FC{self.depth}"

    def pair_cost(self, shape: Sequence[int], *, graph: bool) -> PairCost:
        cost = _elementwise(self.depth, graph=graph)
        products = 2 * math.prod(shape) * (3 if graph else 1)
        kept = GRAPH_COPIES * (self.depth - 1) * graph  # of the other layers
        return PairCost(cost.flop + products, cost.bytes + WORD * kept)


@dataclass(frozen=True)
class Convolutional:
    """The kernel of a ConvNet: a 3x3 convolution (padded by zeros) with ReLU, then `depth` blocks
    of convolution, ReLU and 2x2 average pooling, then one linear layer on all positions (Nguyen et
    al., 2021).

    S and T belong to pairs of positions p of one image and q of the other. Behind the last pooling
    only q = p counts, so before it offsets q - p of up to 1, before that one up to 3, then up to 7:
    a band, (n, m, 2r + 1, 2r + 1, H, W), offsets first, then p. That is exact. What lies outside
    the image counts as 0 in every convolution.
    """

    depth: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """ValueError where the images are smaller than `least_side`."""
        if min(x.shape[-2:]) < self.least_side:
            raise ValueError(f"images of {tuple(x.shape[-2:])} are below {self.least_side} pixels")
        radius = self.least_side - 1
        channels = x.shape[1]
        shifted = _shifted(y, radius)
        s, t = torch.einsum("nchw,mcijhw->nmijhw", x, shifted) / channels, None
        a, b = (_own_band(images, radius) for images in (x, y))
        for block in range(self.depth + 1):
            window = partial(_window, inside=_inside(radius, s))
            s, t = _linear(s, t, window)
            a, b = (_linear(own, None, window)[0] for own in (a, b))
            here = _centre(a)[:, None, None, None]
            there = _shifted(_centre(b), radius, 1.0)
            s, slope = _relu(s, here, there)
            t = t * slope
            a, b = (_relu_of_own(own, radius) for own in (a, b))
            if block:
                radius = (radius - 1) // 2
                s, t, a, b = (_pool(each) for each in (s, t, a, b))
        return _linear(s, t, lambda band: _centre(band).mean((-2, -1)))[1]

    def __str__(self) -> str:
        return f"NTK-ConvD{self.depth}"

    @property
    def least_side(self) -> int:
        """Pixels that an image must have, so that one is left behind the last pooling."""
        return 2**self.depth

    def pair_cost(self, shape: Sequence[int], *, graph: bool) -> PairCost:
        # Behind the first pooling a band has a sixteenth of the numbers, which the constants cover.
        numbers = (2 * self.least_side - 1) ** 2 * math.prod(shape[1:])
        cost = _elementwise(2, graph=graph)
        return PairCost(numbers * cost.flop, numbers * cost.bytes)


KERNELS: Mapping[str, Callable[[int], Kernel]] = {"fc": FullyConnected, "conv": Convolutional}


def _elementwise(layers: int, *, graph: bool) -> PairCost:
    """What `layers` cost for each of their numbers."""
    flop, copies = (GRAPH_FLOP_A_NUMBER, GRAPH_COPIES) if graph else (FLOP_A_NUMBER, COPIES)
    return PairCost(flop * layers, WORD * copies)


def _linear(
    s: Tensor, t: Tensor | None = None, mix: Callable[[Tensor], Tensor] = lambda band: band
) -> tuple[Tensor, Tensor]:
    """A linear layer; t is None before the first."""
    s = WEIGHT * mix(s) + BIAS
    return s, s if t is None else s + WEIGHT * mix(t)


class _ArcCosine(torch.autograd.Function):
    """(s, a, b) -> (k1, k0), which broadcast, with their derivatives by hand: that of k1 is finite
    everywhere, that of k0 is limited.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(s, a, b)
        root = (a * b).sqrt()
        c, sine, k0 = _angle(s, root)
        return root * (sine / (2 * math.pi) + k0 * c), k0

    @staticmethod
    def backward(ctx: Any, by_k1: Tensor, by_k0: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        s, a, b = ctx.saved_tensors
        root = (a * b).sqrt()
        c, sine, k0 = _angle(s, root)
        by_c = by_k0 / (2 * math.pi * sine.clamp(min=LEAST_SINE))  # through k0
        by_s = by_k1 * k0 + by_c / root
        # Of a and b the logarithms: c falls by half as much as they grow.
        by_log = (by_k1 * root * sine / (2 * math.pi) - by_c * c) / 2
        wanted = ctx.needs_input_grad
        return (
            by_s if wanted[0] else None,
            (by_log / a).sum_to_size(a.shape) if wanted[1] else None,
            (by_log / b).sum_to_size(b.shape) if wanted[2] else None,
        )


def _angle(s: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, sin t and k0."""
    c = (s / root).clamp(-1, 1)
    near = 1 - ROUNDING * torch.finfo(c.dtype).eps
    c = torch.where(c > near, 1.0, c)
    return c, ((1 - c) * (1 + c)).sqrt(), 0.5 - c.acos() / (2 * math.pi)


def _relu(s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """S behind a ReLU and what T is multiplied with, from S and the images' own a and b."""
    return _ArcCosine.apply(s, a, b)


def _relu_of_own(band: Tensor, radius: int) -> Tensor:
    """The same of the S (n, k, k, H, W) of images with themselves."""
    here = _centre(band)
    return _relu(band, here[:, None, None], _shifted(here, radius, 1.0))[0]


def _centre(band: Tensor) -> Tensor:
    """Where q = p: (..., H, W) of a band (..., k, k, H, W)."""
    middle = band.shape[-3] // 2
    return band[..., middle, middle, :, :]


def _shifted(images: Tensor, radius: int, outside: float = 0.0) -> Tensor:
    """(..., k, k, H, W) of images (..., H, W): at offset o, position p what they have at p + o."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [radius] * 4, value=outside)
    return padded.unfold(-2, height, 1).unfold(-2, width, 1)


def _own_band(images: Tensor, radius: int) -> Tensor:
    """S (n, k, k, H, W) of images (n, C, H, W) with themselves."""
    shifted = _shifted(images, radius)
    return torch.einsum("nchw,ncijhw->nijhw", images, shifted) / images.shape[1]


def _inside(radius: int, like: Tensor) -> Tensor:
    """1 where q lies inside the image, else 0: (k, k, H, W)."""
    return _shifted(like.new_ones(like.shape[-2:]), radius)


def _window(band: Tensor, *, inside: Tensor) -> Tensor:
    """The mean over the 3x3 shifts of p and q together."""
    planes = (band * inside).flatten(0, -3)
    return F.avg_pool2d(planes, 3, stride=1, padding=1).view(band.shape)


def _pool(band: Tensor) -> Tensor:
    """The mean over the 4x4 pairs of positions in two 2x2 windows, one axis after the other."""
    for _ in range(2):
        band = _pool_rows(band).transpose(-4, -3).transpose(-2, -1)
    return band


def _pool_rows(band: Tensor) -> Tensor:
    """Along the first axis: p = 2 P + i and q = 2 Q + j lie 2 (Q - P) + j - i apart."""
    offsets, rows = band.shape[-4] // 2, band.shape[-2] // 2
    parts = [
        band[..., 1 + j - i :: 2, :, i::2, :][..., :offsets, :, :rows, :]
        for i in (0, 1)
        for j in (0, 1)
    ]
    return torch.stack(parts).mean(0)
