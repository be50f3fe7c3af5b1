"""Winograd convolutions against torch's own, in float64, with their derivatives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import build_network
from utils.compute.winograd import MIN_CHANNELS, winograd_conv2d, with_winograd


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 8)])
def test_it_is_the_convolution(height, width):
    torch.manual_seed(0)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    expected = F.conv2d(images, weight, padding=1)
    torch.testing.assert_close(winograd_conv2d(images, weight), expected, rtol=1e-12, atol=1e-12)


def test_derivatives_of_second_order():
    torch.manual_seed(0)
    images = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(winograd_conv2d, (images, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(winograd_conv2d, (images, weight), fast_mode=True)


@pytest.mark.parametrize("model", ["ConvNetD3", "VGG11", "ResNet18", "AlexNet"])
@pytest.mark.parametrize("size", [32, 36])
def test_networks_give_the_same_logits(model, size):
    """At 36 the third block of ConvNet sees 9x9 maps, which have no whole tiles."""
    build = {"channels": 3, "num_classes": 4, "image_size": size, "seed": 0}
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    plain, fast = (build_network(model, **build).double().eval() for _ in range(2))
    with_winograd(fast)
    torch.testing.assert_close(fast(images), plain(images), rtol=1e-9, atol=1e-9)


def test_only_suitable_convolutions_change():
    wide, kinds = MIN_CHANNELS, nn.Conv2d
    network = nn.Sequential(
        kinds(wide, wide, 3, padding=1),
        kinds(wide - 1, wide, 3, padding=1),
        kinds(wide, wide, 3, padding=1, stride=2),
        kinds(wide, wide, 5, padding=2),
        kinds(wide, wide, 3),
        kinds(wide, wide, 3, padding=1, groups=2),
    )
    with_winograd(network)
    assert [type(module) is nn.Conv2d for module in network] == [False] + [True] * 5
