"""A network as a function of one flat vector: same values, same derivatives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils.compute.flat import (
    FlatNetwork,
    TrainingNetwork,
    flatten,
    unflatten,
    without_batch_counts,
)

MODELS = ["MLP", "LeNet", "AlexNet", "ConvNetW32", "ConvNetBN", "ConvNetLN", "ResNet18"]
SIZE = 12  # ResNet18 needs 9


def build(model: str) -> nn.Module:
    network = build_network(model, channels=1, num_classes=4, image_size=SIZE, seed=0)
    return network.double().train()


def theta_of(network: nn.Module) -> Tensor:
    return flatten(network.parameters()).detach().requires_grad_()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 3])


def test_flatten_keeps_the_order():
    parts = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor(5.0), torch.tensor([6.0])]
    assert flatten(parts).tolist() == [1, 3, 2, 4, 5, 6]
    again = unflatten(flatten(parts), [part.shape for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True))


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


def train_state(model: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A module in train mode, its theta, and running statistics that are not the initial ones."""
    network = build(model)
    generator = torch.Generator().manual_seed(3)
    statistics = [value for value in network.buffers() if value.is_floating_point()]
    for value in statistics:
        value += torch.rand(value.shape, generator=generator, dtype=torch.float64)
    flat = flatten([torch.empty(0, dtype=torch.float64), *statistics]).clone()
    return network, theta_of(network), flat


@pytest.mark.parametrize("model", MODELS)
def test_a_training_network_is_the_module_in_train_mode(model, images):
    """Logits, gradient and running statistics, over two batches."""
    network, theta, statistics = train_state(model)
    assert (len(statistics) > 0) == (model == "ConvNetBN")
    training = TrainingNetwork(build(model))
    for batch in (images, 5 + 3 * images):
        logits, statistics = training(theta, statistics, batch)
        expected = network(batch)
        torch.testing.assert_close(logits, expected)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), theta)
        by_param = torch.autograd.grad(
            F.cross_entropy(expected, LABELS), list(network.parameters())
        )
        torch.testing.assert_close(gradient, flatten(by_param))
        running = [value for value in network.buffers() if value.is_floating_point()]
        torch.testing.assert_close(statistics, flatten([theta.new_empty(0), *running]))
    assert not statistics.requires_grad


def test_a_training_network_keeps_no_state(images):
    _, theta, statistics = train_state("ConvNetBN")
    training, before = TrainingNetwork(build("ConvNetBN")), statistics.clone()
    logits, after = training(theta, statistics, images)
    assert torch.equal(statistics, before)
    assert not torch.equal(after, before)
    training(theta, statistics, 5 + 3 * images)
    again = training(theta, statistics, images)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], after)
    assert not torch.equal(training(theta + 0.1, statistics, images)[0], logits)


def test_without_counters_all_buffers_are_statistics():
    network = build("ConvNetBN")
    names = [name for name, _ in without_batch_counts(network).named_buffers()]
    assert len(names) == 6
    assert all(name.endswith(("running_mean", "running_var")) for name in names)


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
