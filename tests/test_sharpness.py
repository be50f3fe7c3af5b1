"""Sharpness-aware steps against their formula."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.compute.cohort import Cohort, Recipe
from utils.compute.execution import PLAIN, Execution
from utils.compute.sharpness import EPS, Sharpness

RHO, ALPHA = 0.5, 0.4
VECTORISED = Execution(vectorised=True)
IMAGES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(10) % 2


def test_a_quadratic_has_its_closed_form():
    """J = (3 a^2 + b^2) / 2 at (1, -2): every number below is worked out by hand."""
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    curvature = torch.tensor([3.0, 1.0], dtype=torch.float64)
    sharpness = Sharpness(RHO, ALPHA)
    # g = (3, -2), |theta| g = (3, -4) of norm 5, e = 0.1 (3, -8)
    beside = sharpness.beside(theta, curvature * theta)
    torch.testing.assert_close(beside, torch.tensor([1.3, -2.8]).double())
    share = (3 * 3.9 + 2 * 2.8) / (3.9**2 + 2.8**2)  # g_s = (3.9, -2.8)
    expected = [3.9 - ALPHA * (3 - share * 3.9), -2.8 - ALPHA * (-2 + share * 2.8)]
    direction = sharpness.direction(curvature * theta, curvature * beside)
    torch.testing.assert_close(direction, torch.tensor(expected).double())


@pytest.mark.parametrize("sharpness", [Sharpness(0.0, ALPHA), Sharpness(0.0, 0.0)])
def test_without_looking_around_it_is_the_gradient(sharpness):
    theta = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    g = theta.sin()
    assert torch.equal(sharpness.beside(theta, g), theta)
    torch.testing.assert_close(sharpness.direction(g, g), g)


def test_it_is_finite_where_the_gradient_vanishes():
    theta, g = torch.ones(3), torch.zeros(3)
    assert torch.equal(Sharpness(RHO, ALPHA).beside(theta, g), theta)
    assert torch.equal(Sharpness(RHO, ALPHA).direction(g, g), g)


def recipe(model: str, execution: Execution = PLAIN) -> Recipe:
    return Recipe(
        model,
        channels=1,
        num_classes=2,
        image_size=8,
        momentum=0.9,
        weight_decay=5e-4,
        sharpness=Sharpness(RHO, ALPHA),
        execution=execution,
    )


def train_by_hand(network: nn.Module, seed: int, *, lr: float, epochs: int) -> float:
    """GSAM over the parameter tensors, with cosines and norms as its paper has them; the mean loss
    at the weights before each step.
    """
    network.train()
    params = list(network.parameters())
    momenta = [torch.zeros_like(param) for param in params]
    rng = torch.Generator().manual_seed(seed)
    total = 0.0

    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum((tensor.detach() ** 2).sum().item() for tensor in tensors))

    def gradient(batch: Tensor) -> tuple[float, list[Tensor]]:
        loss = F.cross_entropy(network(IMAGES[batch]), LABELS[batch])
        return loss.item(), list(torch.autograd.grad(loss, params))

    for batch in [b for _ in range(epochs) for b in torch.randperm(10, generator=rng).split(4)]:
        loss, g = gradient(batch)
        total += loss * len(batch) / (10 * epochs)
        statistics = [buffer.clone() for buffer in network.buffers()]
        length = norm([param.abs() * part for param, part in zip(params, g, strict=True)])
        pairs = zip(params, g, strict=True)
        e = [RHO * param.detach() ** 2 * part / (length + EPS) for param, part in pairs]
        with torch.no_grad():
            for param, move in zip(params, e, strict=True):
                param += move
        _, g_s = gradient(batch)
        with torch.no_grad():
            for buffer, kept in zip(network.buffers(), statistics, strict=True):
                buffer.copy_(kept)
            inner = sum((a * b).sum().item() for a, b in zip(g, g_s, strict=True))
            cosine = inner / (norm(g) * norm(g_s))
            for param, move, v, a, b in zip(params, e, momenta, g, g_s, strict=True):
                param -= move
                orthogonal = a - cosine * norm(g) * b / norm(g_s)
                v.mul_(0.9).add_(b - ALPHA * orthogonal + 5e-4 * param)
                param -= lr * v
    return total


@pytest.mark.parametrize(
    ("model", "execution"),
    [
        *((model, each) for model in ("ConvNetW32", "ConvNetBN") for each in (PLAIN, VECTORISED)),
        *(
            pytest.param("ConvNetBN", execution, marks=pytest.mark.slow)
            for execution in (Execution(compiled=True), Execution(compiled=True, vectorised=True))
        ),
    ],
)
def test_training_is_the_loop_written_by_hand(model, execution):
    """Running statistics and loss included: both are those at the weights, not beside them."""
    seeds = [3, 4]
    cohort = Cohort(
        recipe(model, execution), seeds, device=torch.device("cpu"), dtype=torch.float64
    )
    progress = cohort.train(
        IMAGES,
        LABELS,
        epochs=2,
        lr=0.05,
        batch_size=4,
        dsa_groups=None,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    for network, seed, loss in zip(cohort.networks, seeds, progress.losses.tolist(), strict=True):
        by_hand = recipe(model).build(seed).double()
        assert loss == pytest.approx(train_by_hand(by_hand, seed, lr=0.05, epochs=2), rel=1e-9)
        theirs = dict(by_hand.state_dict())
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9)
