"""How functions run: networks with channels innermost, pruned graphs, captures that fail."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from numerics import relative_error
from torch import nn
from torch.nn import functional as F

from networks import build_network
from utils.compute import execution
from utils.compute.channels_last import with_channels_last
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.methods.unroll.steps import Steps, _forward_over_reverse

CUDA = torch.device("cuda")
BUILD = {"channels": 3, "num_classes": 4, "image_size": 32, "seed": 0}


@pytest.mark.parametrize("model", ["ConvNetD3", "ConvNetBN", "ConvNetNN", "VGG11", "ResNet18"])
def test_channels_last_is_the_same_function(model):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = build_network(model, **BUILD).double()
    last = with_channels_last(copy.deepcopy(plain))
    assert any(type(module) is not nn.Conv2d for module in last.modules() if _is_conv(module))
    torch.testing.assert_close(last(images), plain(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["ConvNetLN", "ConvNetGN"])
def test_norms_over_several_channels_keep_their_order(model):
    network = with_channels_last(build_network(model, **BUILD))
    assert all(type(module) is nn.Conv2d for module in network.modules() if _is_conv(module))


def _is_conv(module):
    return isinstance(module, nn.Conv2d)


def make_loss(how):
    network = how.adapt(build_network("ConvNetW32", **BUILD | {"image_size": 8}).double())
    theta = flatten(network.parameters()).detach()
    flat = FlatNetwork(network)
    return (lambda theta, x, y: F.cross_entropy(flat(theta, x), y)), theta


@pytest.mark.parametrize("rows", [1, 2])
def test_channels_last_has_the_same_derivatives(rows):
    """Row by row and under vmap, which knows no memory formats."""
    torch.manual_seed(0)
    x = torch.randn(rows, 4, 3, 8, 8, dtype=torch.float64)
    y = torch.randint(4, (rows, 4))
    results = []
    for how in (PLAIN, Execution(channels_last=True)):
        loss, theta = make_loss(how)
        thetas = theta + 0.1 * torch.linspace(-1, 1, rows)[:, None]
        lam = torch.linspace(-1, 1, theta.numel(), dtype=torch.float64).expand_as(thetas)
        gradient, adjoint = (torch.func.vmap(each) for each in _forward_over_reverse(loss))
        results.append([*gradient(thetas, x, y), *adjoint(thetas, x, y, lam)])
    for plain, last in zip(*results, strict=True):
        assert relative_error(last, plain) < 1e-10


@pytest.mark.slow
def test_a_pruned_graph_computes_the_same():
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 3, 8, 8, dtype=torch.float64), torch.randint(4, (1, 4))
    results = []
    for how in (PLAIN, Execution(compiled=True, channels_last=True, pruned=True)):
        loss, theta = make_loss(how)
        lam = torch.linspace(-1, 1, theta.numel(), dtype=torch.float64)
        with torch.no_grad():
            results.append(Steps.of(loss, how).adjoint(theta[None], x, y, lam[None]))
    for plain, pruned in zip(*results, strict=True):
        assert relative_error(pruned, plain) < 1e-10


def test_a_cuda_device_gets_what_suits_it():
    short, long = (Execution.on(CUDA, compiled=compiled) for compiled in (False, True))
    assert short == Execution(cuda_graphs="auto", vectorised=True)
    assert long.channels_last and long.combined and long.pruned and long.branched
    assert Execution.on(CUDA, compiled=True, cuda_graphs="off") == replace(long, cuda_graphs="off")


class Refusing:
    """Stands for a capture that fails; calls of the function itself are counted."""

    def __init__(self, monkeypatch, error):
        self.calls, self.error = 0, error
        monkeypatch.setattr(execution, "_warm_up", lambda function, inputs: None)
        monkeypatch.setattr(execution._Graph, "of", self.capture)

    def capture(self, function, inputs):
        raise self.error

    def __call__(self, x):
        self.calls += 1
        return (2 * x,)


def test_where_capturing_fails_calls_go_on_without(monkeypatch, caplog):
    function = Refusing(monkeypatch, RuntimeError("operation not permitted\nwhile capturing"))
    replayed = Execution(cuda_graphs="auto").prepare(function)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(replayed(torch.ones(1, 2))[0], torch.full((1, 2), 2.0))
    assert function.calls == 3
    (record,) = caplog.records
    assert record.getMessage().endswith("capturing failed: operation not permitted")


def test_a_capture_that_is_asked_for_must_succeed(monkeypatch):
    function = Refusing(monkeypatch, RuntimeError("operation not permitted"))
    with pytest.raises(RuntimeError, match="not permitted"):
        Execution(cuda_graphs="on").prepare(function)(torch.ones(1, 2))


@pytest.mark.parametrize("hidden", [False, True])
def test_no_memory_for_a_capture_is_told_to_the_caller(monkeypatch, hidden):
    """Ending the capture may fail for its own reasons and hide that memory ran out."""
    error = torch.OutOfMemoryError("no memory")
    if hidden:
        error, error.__context__ = RuntimeError("capture was invalidated"), error
    function = Refusing(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError):
        Execution(cuda_graphs="auto").prepare(function)(torch.ones(1, 2))
