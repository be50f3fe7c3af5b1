"""The adjoint engine against the full graph, finite differences and a closed form, in float64."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from networks.convnet import ConvNet
from utils import unroll
from utils.augment import parse_strategy
from utils.flat_params import FlatNetwork, flatten
from utils.matching import draw_problem
from utils.trajectory_length import DISTANCES, att, fixed
from utils.unroll import Problem, adjoint, autograd

CLASSES, IPC, SIZE = 3, 2, 8
GROUPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
L2 = DISTANCES["l2"]


def make_problem(
    *, syn_steps, batch_syn=None, strategy=None, activation="relu", seed=0, device="cpu"
):
    """A small ConvNet problem in float64 with its images and syn_lr; drawn on the CPU."""
    torch.manual_seed(seed)
    network = ConvNet(1, CLASSES, SIZE, depth=2, width=4, activation=activation).double()
    theta_0 = flatten(network.parameters()).detach()
    theta_star = theta_0 + 0.1 * torch.randn_like(theta_0)
    images = torch.randn(CLASSES * IPC, 1, SIZE, SIZE, dtype=torch.float64)
    problem = draw_problem(
        FlatNetwork(network).to(device),
        theta_0.to(device),
        theta_star.to(device),
        torch.arange(CLASSES, device=device).repeat_interleave(IPC),
        syn_steps=syn_steps,
        batch_syn=batch_syn,
        dsa_groups=parse_strategy(strategy) if strategy else None,
        generator=torch.Generator().manual_seed(seed),
    )
    return problem, images.to(device), torch.tensor(0.3, dtype=torch.float64, device=device)


def stop_at(step):
    return lambda distances: step


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def assert_equal(problem, images, syn_lr, policy):
    fast = adjoint(problem, images, syn_lr, L2, policy)
    slow = autograd(problem, images, syn_lr, L2, policy)
    assert fast.length == slow.length
    for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
        assert relative_error(getattr(fast, name), getattr(slow, name)) < 1e-9, name
        assert not getattr(fast, name).requires_grad


@pytest.mark.parametrize("syn_steps", [1, 2, 5, 9])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_adjoint_equals_full_graph(syn_steps, batch_syn):
    """With chunks of 4 of 6 images, every image is seen again and again, in batches of 4 and 2."""
    assert_equal(*make_problem(syn_steps=syn_steps, batch_syn=batch_syn), fixed)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_adjoint_equals_full_graph_at_every_length(length):
    assert_equal(*make_problem(syn_steps=6), stop_at(length))


@pytest.mark.parametrize("group", GROUPS)
def test_adjoint_equals_full_graph_under_dsa(group):
    assert_equal(*make_problem(syn_steps=4, batch_syn=4, strategy=group), fixed)


def test_adjoint_equals_full_graph_with_att():
    problem, images, syn_lr = make_problem(syn_steps=8, strategy="_".join(GROUPS))
    # A target on the student's way, so that the nearest step is neither the first nor the last.
    thetas = unroll._forward(problem, images, syn_lr)
    problem = replace(problem, theta_star=thetas[5] + 1e-3 * torch.randn_like(thetas[5]))
    assert adjoint(problem, images, syn_lr, L2, att).length == 5
    assert_equal(problem, images, syn_lr, att)


@pytest.mark.parametrize("strategy", [None, *GROUPS])
def test_gradients_equal_finite_differences(strategy):
    """gradcheck of J through unroll, augmentation and gather; a sigmoid network has no kinks."""
    problem, images, syn_lr = make_problem(
        syn_steps=3, batch_syn=4, strategy=strategy, activation="sigmoid"
    )

    class Objective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, syn_lr):
            matching = adjoint(problem, images, syn_lr, L2, fixed)
            ctx.save_for_backward(matching.grad_images, matching.grad_syn_lr)
            return matching.loss

        @staticmethod
        def backward(ctx, grad_loss):
            return tuple(grad_loss * grad for grad in ctx.saved_tensors)

    inputs = images.requires_grad_(), syn_lr.requires_grad_()
    assert torch.autograd.gradcheck(
        Objective.apply, inputs, eps=1e-6, atol=1e-8, rtol=1e-5, fast_mode=True
    )


def quadratic_problem(steps):
    """l = ||theta - x||^2 / 2, whose student is theta_n = x + (1 - eta)^n (theta_0 - x)."""
    theta_0, theta_star, x = torch.randn(3, 5, dtype=torch.float64).unbind(0)

    def loss(theta, x, y):
        return 0.5 * (theta - x).square().sum()

    problem = Problem(loss, theta_0, theta_star, [lambda images: images] * steps, [None] * steps)
    return problem, x


@pytest.mark.parametrize("engine", [adjoint, autograd])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_quadratic_has_its_closed_form(engine, n):
    torch.manual_seed(n)
    problem, x = quadratic_problem(steps=7)
    eta = torch.tensor(0.2, dtype=torch.float64)
    shrink = (1 - eta) ** n
    theta_n = x + shrink * (problem.theta_0 - x)
    scale = (problem.theta_0 - problem.theta_star).square().sum()
    by_theta_n = 2 * (theta_n - problem.theta_star) / scale
    by_eta = by_theta_n @ (n * (1 - eta) ** (n - 1) * (x - problem.theta_0))

    matching = engine(problem, x, eta, L2, stop_at(n))

    torch.testing.assert_close(matching.loss, (theta_n - problem.theta_star).square().sum() / scale)
    torch.testing.assert_close(matching.grad_images, (1 - shrink) * by_theta_n)
    torch.testing.assert_close(matching.grad_syn_lr, by_eta)


def test_dropping_the_hessian_is_noticed(monkeypatch):
    """Without H lambda (TESLA's approximation) the gradient differs far beyond the tolerance."""
    problem, images, syn_lr = make_problem(syn_steps=5)
    exact = autograd(problem, images, syn_lr, L2, fixed)
    with_hessian = unroll._step_adjoint

    def without_hessian(*arguments):
        g_lam, hessian_lam, mixed = with_hessian(*arguments)
        return g_lam, torch.zeros_like(hessian_lam), mixed

    monkeypatch.setattr(unroll, "_step_adjoint", without_hessian)
    approximate = adjoint(problem, images, syn_lr, L2, fixed)
    assert relative_error(approximate.grad_images, exact.grad_images) > 1e-3
    with pytest.raises(AssertionError, match="grad_images"):
        assert_equal(problem, images, syn_lr, fixed)


class SavedBytes:
    """Counts the bytes that autograd graphs keep alive: now and at the most."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Saved(self, tensor.detach())  # attached, it would keep its own graph alive

    def unpack(self, saved):
        return saved.tensor


class _Saved:
    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        self.bytes = tensor.numel() * tensor.element_size()
        counter.now += self.bytes
        counter.peak = max(counter.peak, counter.now)

    def __del__(self):
        self.counter.now -= self.bytes


def peak_saved_bytes(engine, syn_steps):
    problem, images, syn_lr = make_problem(syn_steps=syn_steps)
    counter = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        engine(problem, images, syn_lr, L2, fixed)
    return counter.peak


def test_graph_memory_does_not_grow_with_syn_steps():
    assert peak_saved_bytes(adjoint, 16) == peak_saved_bytes(adjoint, 4)
    assert peak_saved_bytes(autograd, 16) > 3 * peak_saved_bytes(autograd, 4)


def test_steps_behind_the_chosen_one_are_not_visited_again():
    problem, images, syn_lr = make_problem(syn_steps=6)
    visits = []

    def counted(t):
        return lambda images: visits.append(t) or problem.batches[t](images)

    counting = replace(problem, batches=[counted(t) for t in range(6)])
    adjoint(counting, images, syn_lr, L2, stop_at(2))
    assert visits == [0, 1, 2, 3, 4, 5, 1, 0]


def test_inputs_are_left_alone():
    problem, images, syn_lr = make_problem(syn_steps=3)
    before = images.clone(), syn_lr.clone(), problem.theta_0.clone()
    adjoint(problem, images, syn_lr, L2, fixed)
    for tensor, copy in zip((images, syn_lr, problem.theta_0), before, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_recomputation_replays_the_same_augmentation():
    problem, images, _ = make_problem(syn_steps=30, batch_syn=4, strategy="_".join(GROUPS))
    assert {batch.augmentation.group for batch in problem.batches} == set(GROUPS)
    for batch in problem.batches:
        assert torch.equal(batch(images), batch(images))


def test_loss_is_the_mean_cross_entropy():
    problem, images, _ = make_problem(syn_steps=1)
    network = ConvNet(1, CLASSES, SIZE, depth=2, width=4).double()
    offset = 0
    for param in network.parameters():
        param.data = problem.theta_0[offset : offset + param.numel()].view(param.shape)
        offset += param.numel()
    expected = F.cross_entropy(network(images), problem.labels[0])
    torch.testing.assert_close(problem.loss(problem.theta_0, images, problem.labels[0]), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", [adjoint, autograd])
@pytest.mark.parametrize("strategy", [None, *GROUPS])
def test_a_cuda_device_gives_the_same(engine, strategy):
    settings = {"syn_steps": 4, "batch_syn": 4, "strategy": strategy}
    on_cpu = engine(*make_problem(**settings), L2, fixed)
    on_gpu = engine(*make_problem(**settings, device="cuda"), L2, fixed)
    for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
        assert relative_error(getattr(on_gpu, name).cpu(), getattr(on_cpu, name)) < 1e-9, name
