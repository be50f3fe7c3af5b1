"""A network as a function of one flat vector: same values, same derivatives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils.flat_params import FlatNetwork, flatten

MODELS = ["MLP", "LeNet", "AlexNet", "ConvNetW32", "ConvNetBN", "ConvNetLN", "ResNet18"]


def build(model: str) -> nn.Module:
    network = build_network(model, channels=1, num_classes=4, image_size=8, seed=0)
    return network.double().train()


def theta_of(network: nn.Module) -> Tensor:
    return flatten(network.parameters()).detach().requires_grad_()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 3])


def test_flatten_keeps_the_order():
    parts = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor(5.0), torch.tensor([6.0])]
    assert flatten(parts).tolist() == [1, 3, 2, 4, 5, 6]


@pytest.mark.parametrize("model", MODELS)
def test_values_and_gradient_are_those_of_the_module(model, images):
    network, flat = build(model), FlatNetwork(build(model))
    theta = theta_of(network)
    assert flat.shapes == [param.shape for param in network.parameters()]

    logits, expected = flat(theta, images), network(images)
    torch.testing.assert_close(logits, expected)

    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), theta)
    by_param = torch.autograd.grad(F.cross_entropy(expected, LABELS), list(network.parameters()))
    torch.testing.assert_close(gradient, flatten(by_param))


def test_theta_alone_decides(images):
    network = build("ConvNetW32")
    flat = FlatNetwork(network)
    theta = theta_of(network)
    before = flat(theta, images)
    with torch.no_grad():
        for param in network.parameters():
            param.zero_()
    assert torch.equal(flat(theta, images), before)
    assert not torch.equal(flat(theta + 0.1, images), before)


def test_batch_norm_keeps_no_state(images):
    flat = FlatNetwork(build("ConvNetBN"))
    theta = theta_of(build("ConvNetBN"))
    before = flat(theta, images)
    flat(theta, 5 + 3 * images)
    assert torch.equal(flat(theta, images), before)
    assert not torch.equal(flat(theta, images[:2]), before[:2])  # the statistics of the batch


@pytest.mark.parametrize("model", ["ConvNetBN", "ConvNetW32"])
def test_forward_over_reverse_is_double_backward(model, images):
    """The product H v by jvp of the gradient, as the engine takes it, and by two backwards."""
    flat = FlatNetwork(build(model))
    theta = theta_of(build(model))
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(theta.shape, generator=generator, dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return F.cross_entropy(flat(theta, images), LABELS)

    gradient, forward = torch.func.jvp(torch.func.grad(loss), (theta.detach(),), (v,))
    (again,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    (backward,) = torch.autograd.grad(again @ v, theta)
    torch.testing.assert_close(gradient, again.detach())
    torch.testing.assert_close(forward, backward)
    assert forward.abs().max() > 1e-3

    step = 1e-6
    slope = torch.func.grad(loss)(theta.detach() + step * v)
    slope -= torch.func.grad(loss)(theta.detach() - step * v)
    torch.testing.assert_close(forward, slope / (2 * step), rtol=1e-3, atol=1e-4)
