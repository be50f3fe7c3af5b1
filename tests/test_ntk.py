"""Neural tangent kernels: against all pairs of positions, finite networks, finite differences."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from utils.compute.ntk import BIAS, KERNELS, WEIGHT, Convolutional, FullyConnected


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arc_cosine(s, a, b):
    root = (a * b).sqrt()
    c = (s / root).clamp(-1, 1)
    t = c.acos()
    k1 = root * ((1 - c**2).clamp(min=0).sqrt() + (math.pi - t) * c) / (2 * math.pi)
    return k1, (math.pi - t) / (2 * math.pi)


def on_all_pairs(x, y, depth):
    """The twin of Convolutional: S and T (n, m, H, W, H, W) of all pairs of positions."""

    def covariance(x, y):
        return torch.einsum("nchw,mcij->nmhwij", x, y) / x.shape[1]

    def window(s):
        height, width = s.shape[2:4]
        padded = F.pad(s, [1] * 8)
        shifts = [(i, j) for i in range(3) for j in range(3)]
        return sum(
            padded[:, :, i : i + height, j : j + width, i : i + height, j : j + width]
            for i, j in shifts
        ) / len(shifts)

    def pool(s):
        n, m, height, width, _, _ = s.shape
        h, w = height // 2, width // 2
        s = s[:, :, : 2 * h, : 2 * w, : 2 * h, : 2 * w]
        return s.reshape(n, m, h, 2, w, 2, h, 2, w, 2).mean((3, 5, 7, 9))

    def own(s):
        return torch.stack([torch.einsum("hwhw->hw", s[i, i]) for i in range(len(s))])

    s, a, b = covariance(x, y), covariance(x, x), covariance(y, y)
    t = torch.zeros_like(s)
    for block in range(depth + 1):
        s, a, b = (WEIGHT * window(each) + BIAS for each in (s, a, b))
        t = s + WEIGHT * window(t)
        of_x, of_y = own(a), own(b)
        there = slice(None), None, slice(None), slice(None), None, None
        s, slope = arc_cosine(s, of_x[there], of_y[None, :, None, None])
        a = arc_cosine(a, of_x[there], of_x[None, :, None, None])[0]
        b = arc_cosine(b, of_y[there], of_y[None, :, None, None])[0]
        t = t * slope
        if block:
            s, t, a, b = (pool(each) for each in (s, t, a, b))
    s, t = (torch.einsum("nmhwhw->nmhw", each).mean((2, 3)) for each in (s, t))
    return WEIGHT * s + BIAS + WEIGHT * t


@pytest.mark.parametrize(("depth", "side"), [(1, 2), (1, 5), (2, 4), (2, 7), (3, 8), (3, 9)])
def test_a_band_is_as_exact_as_all_pairs(depth, side):
    x, y = some(2, 3, side, side), some(3, 3, side, side, seed=1)
    torch.testing.assert_close(
        Convolutional(depth)(x, y), on_all_pairs(x, y, depth), rtol=0, atol=1e-12
    )


class Scaled(nn.Module):
    """A linear layer or convolution in the parameterisation of the NTK."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(shape[0], dtype=torch.float64))
        self.scale = math.sqrt(WEIGHT / self.weight[0].numel())

    def forward(self, x):
        weight, bias = self.scale * self.weight, math.sqrt(BIAS) * self.bias
        apply = F.linear if weight.ndim == 2 else F.conv2d
        return apply(x, weight, bias) if weight.ndim == 2 else apply(x, weight, bias, padding=1)


def dense_network(depth, width, shape):
    sizes = [math.prod(shape), *[width] * depth]
    hidden = [m for pair in itertools.pairwise(sizes) for m in layer(*pair)]
    return nn.Sequential(nn.Flatten(), *hidden, Scaled(1, width))


def layer(before, width):
    return Scaled(width, before), nn.ReLU()


def conv_network(depth, width, shape):
    channels, side, _ = shape
    layers = [Scaled(width, channels, 3, 3), nn.ReLU()]
    for _ in range(depth):
        layers += [Scaled(width, width, 3, 3), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), Scaled(1, width * (side // 2**depth) ** 2))


def empirical(network, images):
    """The tangent kernel of one network: products of its gradients by image."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        one = jacrev(lambda p, x: functional_call(network, p, (x[None],))[0, 0])
        rows = vmap(one, (None, 0))(parameters, images)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    return flat @ flat.T


@pytest.mark.parametrize(
    ("kernel", "network", "width", "shape"),
    [
        (FullyConnected(1), dense_network, 1024, (1, 4, 4)),
        (FullyConnected(3), dense_network, 512, (1, 4, 4)),
        (Convolutional(1), conv_network, 128, (2, 4, 4)),
        (Convolutional(2), conv_network, 128, (1, 6, 6)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wide_networks_have_that_kernel(kernel, network, width, shape):
    torch.manual_seed(0)
    images = some(3, *shape)
    found = torch.stack([empirical(network(kernel.depth, width, shape), images) for _ in range(40)])
    error = found.std(0) / len(found) ** 0.5
    wanted = kernel(images, images)
    # Beside the error of the mean, what a width leaves, of the order of 1 / width.
    assert ((found.mean(0) - wanted).abs() < 3 * error + 3 / width * wanted.abs()).all()
    assert (error < 0.05 * wanted.diag().mean()).all()


@pytest.mark.parametrize(
    "kernel", [FullyConnected(1), FullyConnected(3), Convolutional(1), Convolutional(2)], ids=str
)
def test_derivatives_are_those_of_finite_differences(kernel):
    x, y = some(2, 1, 4, 4).requires_grad_(), some(2, 1, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(kernel, (x, y))
    assert torch.autograd.gradcheck(lambda x: kernel(x, x), x, atol=1e-4)  # c = 1 on the diagonal


@pytest.mark.parametrize("kernel", [FullyConnected(2), Convolutional(1)], ids=str)
def test_an_image_that_is_its_own_target_has_a_finite_derivative(kernel):
    """k0 has a kink there; on both sides it falls alike, and so does the difference."""
    targets = some(2, 1, 4, 4)
    x = targets[:1].clone().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: kernel(x, targets), x, eps=1e-5, atol=1e-3)


@pytest.mark.parametrize("kernel", [FullyConnected(2), Convolutional(2)], ids=str)
def test_a_kernel_is_symmetric_and_positive(kernel):
    x, y = some(6, 2, 4, 4), some(3, 2, 4, 4, seed=1)
    torch.testing.assert_close(kernel(x, y), kernel(y, x).T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(kernel(x, x)).min() > 0


def test_names_and_least_sizes():
    assert [str(KERNELS[name](3)) for name in ("fc", "conv")] == ["NTK-FC3", "NTK-ConvD3"]
    with pytest.raises(ValueError, match="below 8 pixels"):
        Convolutional(3)(some(1, 1, 7, 7), some(1, 1, 7, 7))


def test_what_a_pair_costs_grows_with_the_band():
    small, large = (Convolutional(3).pair_cost((3, side, side), graph=True) for side in (16, 32))
    assert large.bytes == 4 * small.bytes and large.flop == 4 * small.flop
    without = Convolutional(3).pair_cost((3, 32, 32), graph=False)
    assert without.bytes < large.bytes
    assert FullyConnected(1).pair_cost((3, 32, 32), graph=True).bytes < 1_000
