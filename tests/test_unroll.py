"""The adjoint engine against the full graph, finite differences and a closed form, in float64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from numerics import relative_error
from torch.nn import functional as F

from networks.convnet import ConvNet
from utils.compute import batches, execution
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.compute.optimisers import OPTIMISERS, PLAIN_SGD, Adam, first_state
from utils.core.errors import UserError
from utils.data.augment import parse_strategy
from utils.methods.trajectory.lengths import DISTANCES, att, fixed
from utils.methods.trajectory.matching import Objective, match_by_adjoint, match_by_autograd
from utils.methods.trajectory.pruning import all_of, drop_shallow, prune_dissimilar
from utils.methods.unroll import engine
from utils.methods.unroll.losses import training_loss
from utils.methods.unroll.problem import Problem, draw_problem
from utils.methods.unroll.steps import Loss, Steps
from utils.methods.unroll.stop import Stop

CLASSES, IPC, SIZE = 3, 2, 8
GROUPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
L2 = DISTANCES["l2"]


@dataclass(frozen=True)
class Case:
    """A small ConvNet problem in float64, to be matched by either engine."""

    problem: Problem
    loss: Loss
    images: torch.Tensor
    syn_lr: torch.Tensor
    labels: torch.Tensor
    network: FlatNetwork | None = None

    def adjoint(self, objective, *, execution=PLAIN, **keywords):
        steps = Steps.of(self.loss, execution, rows=len(self.problem.theta_0))
        return match_by_adjoint(
            self.problem,
            self.images,
            self.syn_lr,
            self.labels,
            steps,
            as_objective(objective),
            **keywords,
        )

    def autograd(self, objective, **keywords):
        return match_by_autograd(
            self.problem,
            self.images,
            self.syn_lr,
            self.labels,
            self.loss,
            as_objective(objective),
            **keywords,
        )

    def thetas(self, step):
        """theta_step (K, P), by hand."""
        p, thetas = self.problem, self.problem.theta_0
        xs = p.batches(self.images, range(p.syn_steps))
        for x, y in itertools.islice(zip(xs, p.labels(self.labels), strict=True), step):
            gs = [torch.func.grad(self.loss)(*row) for row in zip(thetas, x, y, strict=True)]
            thetas = thetas - self.syn_lr * torch.stack(gs)
        return thetas


def as_objective(objective):
    """A policy alone stands for the exact matching of all parameters."""
    return objective if isinstance(objective, Objective) else Objective(L2, objective)


def make_case(
    *,
    syn_steps,
    batch_syn=None,
    strategy=None,
    activation="relu",
    seed=0,
    device="cpu",
    rows=1,
    first=0,
):
    """Drawn on the CPU; `rows` students."""
    torch.manual_seed(seed)
    network = ConvNet(1, CLASSES, SIZE, depth=2, width=4, activation=activation).double()
    theta_0 = flatten(network.parameters()).detach()
    theta_0 = theta_0 + 0.01 * torch.arange(rows)[:, None] * torch.randn_like(theta_0)
    theta_star = theta_0 + 0.1 * torch.randn_like(theta_0)
    images = torch.randn(CLASSES * IPC, 1, SIZE, SIZE, dtype=torch.float64)
    flat = FlatNetwork(network.to(device))
    problem = draw_problem(
        theta_0.to(device),
        theta_star.to(device),
        images[0],
        count=CLASSES * IPC,
        syn_steps=syn_steps,
        batch_syn=batch_syn,
        dsa_groups=parse_strategy(strategy) if strategy else None,
        generators=[torch.Generator().manual_seed(seed + k) for k in range(rows)],
        first=first,
    )
    syn_lr = torch.tensor(0.3, dtype=torch.float64, device=device)
    labels = torch.arange(CLASSES, device=device).repeat_interleave(IPC)
    return Case(
        problem,
        lambda theta, x, y: F.cross_entropy(flat(theta, x), y),
        images.to(device),
        syn_lr,
        labels,
        flat,
    )


def stop_at(step):
    return lambda distances: step


def assert_same(fast, slow):
    assert fast.lengths == slow.lengths
    for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
        assert relative_error(getattr(fast, name), getattr(slow, name)) < 1e-9, name
        assert not getattr(fast, name).requires_grad


def assert_equal(case, objective, **keywords):
    assert_same(case.adjoint(objective, **keywords), case.autograd(objective))


@pytest.mark.parametrize("syn_steps", [1, 2, 5, 9])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_adjoint_equals_full_graph(syn_steps, batch_syn):
    """With chunks of 4 of 6 images, every image is seen again and again, in batches of 4 and 2."""
    assert_equal(make_case(syn_steps=syn_steps, batch_syn=batch_syn), fixed)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_adjoint_equals_full_graph_at_every_length(length):
    assert_equal(make_case(syn_steps=6), stop_at(length))


@pytest.mark.parametrize("group", GROUPS)
def test_adjoint_equals_full_graph_under_dsa(group):
    assert_equal(make_case(syn_steps=4, batch_syn=4, strategy=group), fixed)


def on_the_way(case, step):
    """The same with targets on the students' way, so that the nearest step is neither the first
    nor the last.
    """
    thetas = case.thetas(step)
    near = thetas + 1e-3 * torch.randn_like(thetas)
    return replace(case, problem=replace(case.problem, theta_star=near))


def test_adjoint_equals_full_graph_with_att():
    case = on_the_way(make_case(syn_steps=8, strategy="_".join(GROUPS)), 5)
    assert case.adjoint(att).lengths == [5]
    assert_equal(case, att)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_pieces_of_batches_add_up(micro_batch, batch_syn):
    case = make_case(syn_steps=5, batch_syn=batch_syn, strategy="_".join(GROUPS))
    assert_equal(case, fixed, micro_batch=micro_batch)


def only(p, k):
    """The problem of student k alone."""
    row = slice(k, k + 1)
    return replace(
        p,
        theta_0=p.theta_0[row],
        theta_star=p.theta_star[row],
        batches=lambda images, steps: [x[row] for x in p.batches(images, steps)],
        labels=lambda labels: [y[row] for y in p.labels(labels)],
    )


@pytest.mark.parametrize(
    "execution", [Execution(), Execution(vectorised=True)], ids=["one by one", "vmap"]
)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 4, 1)])
def test_several_students_give_the_mean(execution, lengths):
    case = make_case(syn_steps=4, batch_syn=4, strategy="_".join(GROUPS), rows=3)
    remaining = itertools.cycle(lengths)
    assert_equal(case, lambda distances: next(remaining), execution=execution, micro_batch=3)

    remaining = itertools.cycle(lengths)
    together = case.adjoint(lambda distances: next(remaining), execution=execution)
    images, syn_lr = torch.zeros_like(case.images), torch.zeros_like(case.syn_lr)
    for k, length in enumerate(lengths):
        matching = replace(case, problem=only(case.problem, k)).autograd(stop_at(length))
        images += matching.grad_images / 3
        syn_lr += matching.grad_syn_lr / 3
    assert relative_error(together.grad_images, images) < 1e-9
    assert relative_error(together.grad_syn_lr, syn_lr) < 1e-9


@pytest.mark.parametrize("at_once", [2, 4, 16])
@pytest.mark.parametrize("lengths", [(11, 11), (3, 8), (1, 2)])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_several_steps_may_be_taken_in_one_call(monkeypatch, at_once, lengths, batch_syn):
    """As CUDA graphs capture them; the last call of the sweep back may begin before n and end
    behind it.
    """
    case = make_case(syn_steps=11, batch_syn=batch_syn, strategy="_".join(GROUPS), rows=2)
    case = replace(case, problem=replace(case.problem, steps_per_block=8))
    remaining = itertools.cycle(lengths)
    calls = []
    monkeypatch.setattr(execution, "CAPTURED_CALLS", at_once)
    monkeypatch.setattr(
        Execution, "capture", lambda self, step: lambda *inputs: calls.append(1) or step(*inputs)
    )
    assert_equal(case, lambda _: next(remaining), execution=Execution(cuda_graphs="on"))
    by_size = {2: [4, 1, 1], 4: [2, 1, 1], 16: [1, 1, 1]}[at_once]  # 8 of a block, then 2 and 1
    if batch_syn is None:
        walked_back = sum(by_size) if max(lengths) > 8 else -(-max(lengths) // min(at_once, 8))
        assert len(calls) == sum(by_size) + walked_back


@pytest.mark.parametrize("vectorised", [False, True])
def test_a_student_that_diverges_behind_its_step_does_no_harm(vectorised):
    """Two students with their own targets; one is matched at step 1 and then goes to infinity."""
    case = on_the_way(make_case(syn_steps=6, rows=2), 1)
    theta_star = case.problem.theta_star.clone()
    theta_star[1] = case.thetas(6)[1]
    case = replace(case, problem=replace(case.problem, theta_star=theta_star))
    loss, chosen = case.loss, iter([1, 6])

    def explosive(theta, x, y):
        """The first student's third step is one to infinity."""
        first = (theta - case.thetas(2)[0]).abs().max() < 1e-9
        return torch.where(first, torch.inf, 1.0) * loss(theta, x, y)

    matching = replace(case, loss=explosive).adjoint(
        lambda distances: next(chosen), execution=Execution(vectorised=vectorised)
    )
    assert not matching.distances[0].isfinite().all()
    assert matching.grad_images.isfinite().all()
    assert matching.grad_syn_lr.isfinite()


@pytest.mark.parametrize(("syn_steps", "length"), [(7, 7), (7, 6), (6, 5), (6, 1)])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_parameters_that_were_not_kept_are_computed_again(monkeypatch, kept, syn_steps, length):
    case = make_case(syn_steps=syn_steps, batch_syn=4, strategy="_".join(GROUPS))
    expected = case.autograd(stop_at(length))
    monkeypatch.setattr(engine, "KEPT_STEPS", kept)
    assert_same(case.adjoint(stop_at(length)), expected)


@pytest.mark.parametrize("steps_per_block", [1, 2, 3, 100])
def test_batches_may_be_made_together(steps_per_block):
    case = make_case(syn_steps=5, batch_syn=4, strategy="_".join(GROUPS))
    problem = replace(case.problem, steps_per_block=steps_per_block)
    assert_equal(replace(case, problem=problem), stop_at(4))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_steps_give_the_same(rows):
    case = make_case(syn_steps=3, batch_syn=4, strategy="_".join(GROUPS), rows=rows)
    assert_equal(case, fixed, execution=Execution(compiled=True))


@pytest.mark.parametrize("strategy", [None, *GROUPS])
def test_gradients_equal_finite_differences(strategy):
    """gradcheck of J through unroll, augmentation and gather; a sigmoid network has no kinks."""
    case = make_case(syn_steps=3, batch_syn=4, strategy=strategy, activation="sigmoid")

    class J(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, syn_lr):
            matching = replace(case, images=images, syn_lr=syn_lr).adjoint(fixed)
            ctx.save_for_backward(matching.grad_images, matching.grad_syn_lr)
            return matching.loss

        @staticmethod
        def backward(ctx, grad_loss):
            return tuple(grad_loss * grad for grad in ctx.saved_tensors)

    inputs = case.images.requires_grad_(), case.syn_lr.requires_grad_()
    assert torch.autograd.gradcheck(J.apply, inputs, eps=1e-6, atol=1e-8, rtol=1e-5, fast_mode=True)


def quadratic_case(steps):
    """l = ||theta - x||^2 / 2, whose student is theta_n = x + (1 - eta)^n (theta_0 - x)."""
    theta_0, theta_star, x = torch.randn(3, 5, dtype=torch.float64).unbind(0)

    def loss(theta, x, y):
        return 0.5 * (theta - x.flatten()).square().sum()

    def batches(images, steps):
        return [images[None]] * len(steps)

    def labels(labels):
        return [labels[None]] * steps

    problem = Problem(theta_0[None], batches, labels, [1] * steps, theta_star[None])
    eta = torch.tensor(0.2, dtype=torch.float64)
    return Case(problem, loss, x.view(1, 5, 1, 1), eta, torch.zeros(1)), theta_0, theta_star, x


@pytest.mark.parametrize("engine", ["adjoint", "autograd"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_quadratic_has_its_closed_form(engine, n):
    torch.manual_seed(n)
    case, theta_0, theta_star, x = quadratic_case(steps=7)
    eta = case.syn_lr
    shrink = (1 - eta) ** n
    theta_n = x + shrink * (theta_0 - x)
    scale = (theta_0 - theta_star).square().sum()
    by_theta_n = 2 * (theta_n - theta_star) / scale
    by_eta = by_theta_n @ (n * (1 - eta) ** (n - 1) * (x - theta_0))

    matching = getattr(case, engine)(stop_at(n))

    torch.testing.assert_close(matching.loss, (theta_n - theta_star).square().sum() / scale)
    torch.testing.assert_close(matching.grad_images.flatten(), (1 - shrink) * by_theta_n)
    torch.testing.assert_close(matching.grad_syn_lr, by_eta)


def tesla_by_its_formula(case):
    """d/dx_i of 2 (eta (theta* - theta_0) + eta^2 sum_j g_j) . g_i / ||theta* - theta_0||^2, all
    else than that g_i held; and the same for eta. One student.
    """
    p, eta = case.problem, case.syn_lr
    theta_0, theta_star = p.theta_0[0], p.theta_star[0]
    images = case.images.clone().requires_grad_()
    xs = p.batches(images, range(p.syn_steps))
    gs, thetas = [], [theta_0]
    for x, y in zip(xs, p.labels(case.labels), strict=True):
        at = thetas[-1].detach().requires_grad_()
        gs += torch.autograd.grad(case.loss(at, x[0], y[0]), at, create_graph=True)
        thetas.append(thetas[-1] - eta * gs[-1].detach())
    total = sum(g.detach() for g in gs)
    scale = (theta_star - theta_0).square().sum()
    held = 2 * (eta * (theta_star - theta_0) + eta**2 * total) / scale
    (by_images,) = torch.autograd.grad(sum(held @ g for g in gs), images)
    by_eta = 2 * total @ (theta_star - theta_0 + eta * total) / scale
    return by_images, by_eta


@pytest.mark.parametrize("engine", ["adjoint", "autograd"])
def test_tesla_has_its_formula(engine):
    """It differs from the exact gradient far beyond the tolerance that these are compared with."""
    case = make_case(syn_steps=5, batch_syn=4, strategy="_".join(GROUPS))
    tesla = getattr(case, engine)(Objective(L2, fixed, exact=False))
    by_images, by_eta = tesla_by_its_formula(case)
    assert relative_error(tesla.grad_images, by_images) < 1e-9
    assert relative_error(tesla.grad_syn_lr, by_eta) < 1e-9
    exact = case.autograd(fixed)
    assert torch.equal(tesla.distances, getattr(case, engine)(fixed).distances)
    assert relative_error(tesla.grad_images, exact.grad_images) > 1e-3


def test_tesla_of_one_step_is_exact():
    case = make_case(syn_steps=1)
    assert_same(case.adjoint(Objective(L2, fixed, exact=False)), case.autograd(fixed))


@pytest.mark.parametrize("rows", [1, 3])
def test_tesla_in_pieces_and_rows(rows):
    case = make_case(syn_steps=4, rows=rows)
    assert_equal(case, Objective(L2, att, exact=False), micro_batch=2)


@pytest.mark.parametrize("engine", ["adjoint", "autograd"])
def test_pruned_parameters_do_not_count(engine):
    """J and its gradients are those of the kept parameters alone, by finite differences too."""
    case = make_case(syn_steps=4, rows=2, activation="sigmoid")
    theta_star, ends = case.problem.theta_star, case.thetas(4)
    similar = ends * theta_star / torch.maximum(ends**2, theta_star**2) >= 0.9
    assert 0 < similar.sum() < similar.numel()
    pruned = Objective(L2, fixed, weights=prune_dissimilar(0.9))

    def j(ends):
        misses = (similar * (ends - theta_star) ** 2).sum(1)
        return (misses / (similar * (case.problem.theta_0 - theta_star) ** 2).sum(1)).mean()

    matching = getattr(case, engine)(pruned)
    torch.testing.assert_close(matching.loss, j(ends))
    direction = torch.randn_like(case.images)
    step = 1e-6 * direction
    moved = [replace(case, images=case.images + s * step).thetas(4) for s in (1, -1)]
    slope = (j(moved[0]) - j(moved[1])) / 2e-6
    torch.testing.assert_close((matching.grad_images * direction).sum(), slope)


def test_a_threshold_that_prunes_everything_is_named():
    with pytest.raises(UserError, match=r"--prune_threshold 1 .*lower"):
        make_case(syn_steps=1).adjoint(Objective(L2, fixed, weights=prune_dissimilar(1)))


@pytest.mark.parametrize("engine", ["adjoint", "autograd"])
def test_shallow_parameters_do_not_count(engine):
    """J is that of the deeper ones; beside PP those count that both keep."""
    case = make_case(syn_steps=3, rows=2)
    theta_star, ends = case.problem.theta_star, case.thetas(3)
    deep = torch.arange(ends.shape[1]) >= int(0.3 * ends.shape[1])
    miss, span = ((end - theta_star)[:, deep] for end in (ends, case.problem.theta_0))
    j = (miss.square().sum(1) / span.square().sum(1)).mean()
    matching = getattr(case, engine)(Objective(L2, fixed, weights=drop_shallow(0.3)))
    torch.testing.assert_close(matching.loss, j)
    both = all_of([drop_shallow(0.3), prune_dissimilar(0.5)])(ends, theta_star)
    assert torch.equal(both, prune_dissimilar(0.5)(ends, theta_star) * deep)
    assert all_of([]) is None


def test_similarity():
    theta_n, theta_star = torch.tensor([[1.0, 2, -2, 4, 0, 0], [3.0, 1, 9, 4, 0, 1]]).split(1)
    kept = [prune_dissimilar(t)(theta_n, theta_star)[0].tolist() for t in (-1, 0, 0.4, 1)]
    assert kept == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 1],
        [0, 1, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
    ]


@pytest.mark.parametrize("engine", ["adjoint", "autograd"])
def test_watched_distances_and_the_nearest_step(engine):
    """They do not depend on what is matched: the fixed length here."""
    case = on_the_way(make_case(syn_steps=6, rows=2), 4)
    matching = getattr(case, engine)(fixed, watched=DISTANCES)
    assert matching.lengths == [6, 6] and matching.nearest == [4, 4]
    thetas = torch.stack([case.thetas(t) for t in range(1, 7)], 1)
    misses = thetas - case.problem.theta_star[:, None]
    torch.testing.assert_close(matching.curves["l1"], misses.abs().sum(2))
    torch.testing.assert_close(matching.curves["l2"], misses.square().sum(2))
    assert torch.equal(matching.curves["l2"], matching.distances)


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
    case = make_case(syn_steps=syn_steps)
    counter = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        getattr(case, engine)(fixed)
    return counter.peak


def test_graph_memory_does_not_grow_with_syn_steps(monkeypatch):
    monkeypatch.setitem(batches.BLOCK_BYTES, "cpu", 1)  # each step's images by themselves
    assert peak_saved_bytes("adjoint", 16) == peak_saved_bytes("adjoint", 4)
    assert peak_saved_bytes("autograd", 16) > 3 * peak_saved_bytes("autograd", 4)


def test_steps_behind_the_chosen_one_are_not_visited_again():
    case = make_case(syn_steps=6)
    visits = []

    def counted(images, steps):
        visits.extend(steps)
        return case.problem.batches(images, steps)

    replace(case, problem=replace(case.problem, batches=counted)).adjoint(stop_at(2))
    assert visits == [0, 1, 2, 3, 4, 5, 0, 1]


def test_inputs_are_left_alone():
    case = make_case(syn_steps=3)
    before = case.images.clone(), case.syn_lr.clone(), case.problem.theta_0.clone()
    case.adjoint(fixed)
    for tensor, copy in zip((case.images, case.syn_lr, case.problem.theta_0), before, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_recomputation_replays_the_same_augmentation():
    case = make_case(syn_steps=30, batch_syn=4, strategy="_".join(GROUPS))
    once, again = (case.problem.batches(case.images, range(30)) for _ in range(2))
    for x, y in zip(once, again, strict=True):
        assert torch.equal(x, y)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_a_cuda_device_gives_the_same(rows, compiled, cuda_graphs):
    settings = {"syn_steps": 5, "batch_syn": 4, "strategy": "_".join(GROUPS), "rows": rows}
    on_cpu = make_case(**settings).autograd(fixed)
    on_gpu = make_case(**settings, device="cuda")
    execution = Execution.on(torch.device("cuda"), compiled=compiled, cuda_graphs=cuda_graphs)
    for matching in (on_gpu.autograd(fixed), on_gpu.adjoint(fixed, execution=execution)):
        for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
            assert relative_error(getattr(matching, name).cpu(), getattr(on_cpu, name)) < 1e-9, name


def any_loss(theta_n):
    """A loss that has nothing to do with a target."""
    weights = torch.linspace(-1, 1, theta_n.numel(), dtype=torch.float64).view_as(theta_n)
    return (weights * theta_n).sum().tanh() + theta_n.square().mean()


def unroll_both(
    case,
    images,
    rates,
    labels=None,
    *,
    optimiser=PLAIN_SGD,
    execution=PLAIN,
    micro_batch=None,
    **on,
):
    """theta_n by the sweep and by its twin, both differentiable in what requires gradients."""
    labels = case.labels if labels is None else labels
    steps = Steps.of(
        case.loss,
        execution,
        rows=len(case.problem.theta_0),
        by_labels=labels.requires_grad,
        optimiser=optimiser,
    )
    arguments = images, rates, labels, case.problem
    swept = engine.unroll(*arguments, steps, micro_batch=micro_batch, **on)
    return swept, engine.unroll_by_autograd(*arguments, case.loss, optimiser=optimiser, **on)


def assert_same_ends(swept, twin, inputs):
    """Also the gradients of some loss behind them, by the inputs."""
    assert swept.lengths == twin.lengths
    assert relative_error(swept.theta_n.detach(), twin.theta_n.detach()) < 1e-12
    by_call, by_twin = (torch.autograd.grad(any_loss(end.theta_n), inputs) for end in (swept, twin))
    for value, reference in zip(by_call, by_twin, strict=True):
        assert value.shape == reference.shape and reference.abs().sum() > 0
        assert relative_error(value, reference) < 1e-9


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("one_a_step", [False, True])
def test_any_loss_stands_behind_the_unroll(rows, one_a_step):
    case = make_case(syn_steps=5, batch_syn=4, strategy="_".join(GROUPS), rows=rows)
    rates = 0.3 + 0.01 * torch.arange(5.0, dtype=torch.float64) if one_a_step else case.syn_lr
    inputs = case.images.clone().requires_grad_(), rates.clone().requires_grad_()
    swept, twin = unroll_both(case, *inputs, stop=Stop(stop_at(4)))
    assert swept.lengths == twin.lengths == [4] * rows
    assert relative_error(swept.theta_n.detach(), twin.theta_n.detach()) < 1e-12
    lam = torch.autograd.grad(any_loss(twin.theta_n), twin.theta_n)[0]
    by_call = torch.autograd.grad(any_loss(swept.theta_n), inputs)
    by_twin = torch.autograd.grad(any_loss(twin.theta_n), inputs)
    for value, same, reference in zip(by_call, swept.pull_back(lam)[:2], by_twin, strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < 1e-9
        assert relative_error(same, reference) < 1e-9
    if one_a_step:
        assert by_call[1][4] == 0  # a step behind n


def test_without_a_target_the_last_step_is_taken():
    case = make_case(syn_steps=3)
    case = replace(case, problem=replace(case.problem, theta_star=None))
    for end in unroll_both(case, case.images, case.syn_lr, stop=Stop(att)):
        assert end.lengths == [3]
        assert relative_error(end.theta_n.detach(), case.thetas(3)) < 1e-12


def test_unroll_passes_gradcheck_in_images_and_rates():
    """A sigmoid network has no kinks."""
    case = make_case(syn_steps=3, batch_syn=4, strategy="color", activation="sigmoid")
    steps = Steps.of(case.loss, PLAIN)

    def end(images, rates):
        return engine.unroll(images, rates, case.labels, case.problem, steps).theta_n

    rates = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    inputs = case.images.requires_grad_(), rates
    assert torch.autograd.gradcheck(end, inputs, eps=1e-6, atol=1e-8, rtol=1e-5, fast_mode=True)


def soft(case, form):
    """The case with labels that say something of every class, as probabilities or logits."""
    torch.manual_seed(5)
    logits = torch.randn(len(case.labels), CLASSES, dtype=torch.float64)
    labels = logits if form == "logits" else logits.softmax(1)
    loss = training_loss(case.network, form)
    return replace(case, loss=loss), labels.requires_grad_()


def rates_of(case, one_a_step=True):
    steps = torch.arange(case.problem.syn_steps, dtype=torch.float64)
    rates = case.syn_lr * (1 + 0.05 * steps if one_a_step else torch.ones(()))
    return rates.clone().requires_grad_()


@pytest.mark.parametrize("form", ["probabilities", "logits"])
@pytest.mark.parametrize(
    ("rows", "micro_batch", "execution"),
    [(1, None, PLAIN), (2, 3, PLAIN), (2, None, Execution(vectorised=True))],
)
def test_labels_are_learned(form, rows, micro_batch, execution):
    case = make_case(syn_steps=5, batch_syn=4, strategy="_".join(GROUPS), rows=rows)
    case, labels = soft(case, form)
    inputs = case.images.clone().requires_grad_(), rates_of(case, one_a_step=False), labels
    on = {"execution": execution, "micro_batch": micro_batch, "stop": Stop(stop_at(4))}
    assert_same_ends(*unroll_both(case, *inputs, **on), inputs)


def test_soft_labels_of_one_class_are_hard_labels():
    case = make_case(syn_steps=4, batch_syn=4)
    probabilities = F.one_hot(case.labels, CLASSES).double()
    loss = training_loss(case.network, "probabilities")
    hard, soft = case.adjoint(fixed), replace(case, loss=loss, labels=probabilities).adjoint(fixed)
    assert_same(soft, hard)


# The gradients of biases in front of an instance norm are rounding errors, which Adam would make as
# large as all others.
TAMED = OPTIMISERS | {"adam": Adam(eps=1e-4)}


@pytest.mark.parametrize("optimiser", TAMED)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    ("rows", "micro_batch", "execution", "length"),
    [(1, None, PLAIN, 6), (2, 3, PLAIN, 5), (3, None, Execution(vectorised=True), 6)],
)
def test_any_optimiser_is_differentiated(optimiser, first, rows, micro_batch, execution, length):
    """The whole run, or a window of it; labels and rates are learned as well."""
    case = make_case(syn_steps=6, batch_syn=4, strategy="_".join(GROUPS), rows=rows, first=first)
    case, labels = soft(case, "logits")
    case = replace(case, syn_lr=0.1 * case.syn_lr)
    inputs = case.images.clone().requires_grad_(), rates_of(case), labels
    on = {"execution": execution, "micro_batch": micro_batch}
    ends = unroll_both(
        case,
        *inputs,
        optimiser=TAMED[optimiser],
        stop=Stop(stop_at(length - first)),
        **on,
    )
    assert ends[0].lengths == [length] * rows
    assert_same_ends(*ends, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", TAMED)
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_steps_of_any_optimiser_and_soft_labels(rows, optimiser):
    case = make_case(syn_steps=4, batch_syn=4, strategy="_".join(GROUPS), rows=rows, first=1)
    case, labels = soft(case, "logits")
    case = replace(case, syn_lr=0.1 * case.syn_lr)
    inputs = case.images.clone().requires_grad_(), rates_of(case), labels
    on = {"optimiser": TAMED[optimiser], "execution": Execution(compiled=True)}
    assert_same_ends(*unroll_both(case, *inputs, **on), inputs)


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("first", [0, 3])
def test_states_that_were_not_kept_are_computed_again(monkeypatch, optimiser, kept, first):
    case = make_case(syn_steps=8, batch_syn=4, first=first)
    case = replace(case, syn_lr=0.1 * case.syn_lr)
    monkeypatch.setattr(engine, "KEPT_STEPS", kept)
    inputs = case.images.clone().requires_grad_(), rates_of(case)
    on = {"optimiser": TAMED[optimiser], "stop": Stop(stop_at(7 - first))}
    assert_same_ends(*unroll_both(case, *inputs, **on), inputs)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_a_window_is_the_run_from_where_it_begins(optimiser):
    """Of SGD the gradient of a window is that of a run which starts there; what is remembered from
    before counts as given.
    """
    whole = make_case(syn_steps=6, batch_syn=4)
    windowed = replace(whole, problem=replace(whole.problem, first=2))
    inputs = whole.images.clone().requires_grad_(), rates_of(whole)
    window, _ = unroll_both(windowed, *inputs, optimiser=OPTIMISERS[optimiser])
    everything, _ = unroll_both(whole, *inputs, optimiser=OPTIMISERS[optimiser])
    assert torch.equal(window.theta_n, everything.theta_n)
    (of_rates,) = torch.autograd.grad(any_loss(window.theta_n), inputs[1])
    (of_all,) = torch.autograd.grad(any_loss(everything.theta_n), inputs[1])
    assert torch.equal(of_rates[:2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(of_rates[2:], of_all[2:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    [
        ("sgd", lambda params: torch.optim.SGD(params, 0.1), 1e-12),
        ("momentum", lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), 1e-12),
        ("adam", lambda params: torch.optim.Adam(params, 0.1), 1e-5),  # eps stands elsewhere
    ],
)
def test_optimisers_are_those_of_torch(name, theirs, rtol):
    torch.manual_seed(0)
    optimiser, theta = OPTIMISERS[name], torch.randn(1, 7, dtype=torch.float64)
    param = theta.clone().requires_grad_()
    reference, state = theirs([param]), first_state(optimiser, theta)
    for time in range(1, 6):
        param.grad = torch.randn_like(theta)
        rate, now = torch.tensor([0.1, time], dtype=torch.float64)
        state = optimiser.update(state, param.grad, rate, now)
        reference.step()
    torch.testing.assert_close(state[:, :7], param.detach(), rtol=rtol, atol=0)


def test_adam_is_differentiable_where_gradients_are_zero():
    """As of a unit that no image ever activates."""
    g = torch.tensor([[0.0, 0.3]], dtype=torch.float64, requires_grad=True)
    state = first_state(OPTIMISERS["adam"], torch.ones(1, 2, dtype=torch.float64))
    end = OPTIMISERS["adam"].update(state, g, torch.tensor(0.1), torch.tensor(1.0))
    assert torch.autograd.grad(end.sum(), g)[0].isfinite().all()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_gradcheck_of_labels_rates_and_images(optimiser):
    case = make_case(syn_steps=3, batch_syn=4, strategy="color", activation="sigmoid")
    case, labels = soft(case, "logits")
    steps = Steps.of(case.loss, PLAIN, by_labels=True, optimiser=TAMED[optimiser])

    def end(images, rates, labels):
        return engine.unroll(images, rates, labels, case.problem, steps).theta_n

    rates = (0.1 * rates_of(case)).detach().requires_grad_()
    inputs = case.images.requires_grad_(), rates, labels
    assert torch.autograd.gradcheck(end, inputs, eps=1e-6, atol=1e-7, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_graph_memory_is_flat_for_every_optimiser(monkeypatch, optimiser):
    monkeypatch.setitem(batches.BLOCK_BYTES, "cpu", 1)
    peaks = []
    for syn_steps in (4, 16):
        case, labels = soft(make_case(syn_steps=syn_steps), "logits")
        steps = Steps.of(case.loss, PLAIN, by_labels=True, optimiser=OPTIMISERS[optimiser])
        counter = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
            arguments = case.images, case.syn_lr, labels.detach(), case.problem
            end = engine.unroll(*arguments, steps)
            end.pull_back(torch.ones_like(end.theta_n))
        peaks.append(counter.peak)
    assert peaks[0] == peaks[1] > 0
