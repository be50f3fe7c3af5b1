"""DC and DSA: gradients against plain double backward in float64, the network, runs, refusals."""

from functools import partial

import few_classes
import pytest
import torch
from few_classes import (
    CLASSES,
    GROUPS,
    IMAGES,
    LABELS,
    LEARNED,
    SEED,
    SHAPE,
    TRAIN,
)
from numerics import relative_error
from short_runs import assert_cut_off_goes_on_alike, records
from torch.nn import functional as F

import distill_att
from scripts.results.runs import read_run
from utils.compute.batches import draw_batches
from utils.compute.cost import network_cost
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data import augment
from utils.methods.gradient_distances import GRADIENT_DISTANCES
from utils.methods.gradient_matching import GradientMatching, Loops, count_work
from utils.options import DistillOptions

fresh = partial(few_classes.fresh, model="ConvNetD1")
theta_0 = partial(few_classes.theta_0, model="ConvNetD1")
make_classes = partial(few_classes.make_classes, name="dc")


def make(loops=(1, 1), *, model="ConvNetD1", dsa_groups=GROUPS, metric="ours", **keywords):
    settings = {"lr_net": 0.1, "batch_syn": 4, "seed": SEED} | keywords
    return GradientMatching(
        partial(fresh, model=model),
        make_classes(dsa_groups),
        LABELS,
        Loops(*loops),
        distance=GRADIENT_DISTANCES[metric],
        dsa_groups=dsa_groups,
        **settings,
    )


def distance(found, wanted, metric):
    """The published formula, parameter by parameter and row by row."""

    def one_minus_cos(a, b):
        return 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-6)

    if metric == "ours":
        pairs = [pair for pair in zip(found, wanted, strict=True) if pair[0].dim() > 1]
        return sum(
            one_minus_cos(a.flatten(), b.flatten())
            for pair in pairs
            for a, b in zip(*pair, strict=True)
        )
    found, wanted = flatten(found), flatten(wanted)
    return (found - wanted).square().sum() if metric == "mse" else one_minus_cos(found, wanted)


def by_double_backward(theta, iteration, *, model="ConvNetD1", dsa_groups=GROUPS, metric="ours"):
    """J and dJ/dimages, class by class, with the graph of the synthetic images' gradient kept."""
    network, classes = FlatNetwork(fresh(0, model=model)), make_classes(dsa_groups)
    leaf, loss = IMAGES.clone().requires_grad_(), 0
    params = [
        part.view(shape).requires_grad_()
        for part, shape in zip(
            theta.split([shape.numel() for shape in network.shapes]), network.shapes, strict=True
        )
    ]

    def gradient(x, label, **keep):
        targets = torch.full((len(x),), label)
        value = F.cross_entropy(network(flatten(params), x), targets)
        return torch.autograd.grad(value, params, **keep)

    for label in range(CLASSES):
        real, synthetic = classes.draw(iteration, label)
        assert (TRAIN.labels[real.indices] == label).all()
        wanted = gradient(augment.apply(TRAIN.images[real.indices], real.augmentation), label)
        seen = augment.apply(leaf[synthetic.indices], synthetic.augmentation)
        loss = loss + distance(gradient(seen, label, create_graph=True), wanted, metric)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_step(step, reference):
    for value, wanted in zip((step.loss, step.grads["images"]), reference, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < 1e-12


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ({}, {}),
        ({"model": "MLP"}, {}),
        ({"model": "ConvNetW32"}, {"micro_batch": 3}),
        ({"dsa_groups": None}, {"micro_batch": 1}),
        ({"metric": "mse"}, {}),
        ({"metric": "cos"}, {"micro_batch": 2}),
        *[({"dsa_groups": (group,)}, {}) for group in GROUPS],
        ({}, {"execution": Execution(vectorised=True), "micro_batch": 4}),
        pytest.param({}, {"execution": Execution(compiled=True)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_double_backward(what, way):
    reference = by_double_backward(theta_0(0, model=what.get("model", "ConvNetD1")), 3, **what)
    assert_step(make(**what, **way).step(3, LEARNED), reference)


def test_a_gradient_of_zero_has_a_distance_with_a_finite_slope():
    shapes = [torch.Size([2, 3]), torch.Size([2])]
    wanted = torch.tensor([[1.0, 2, 3, 0, 0, 0, 9, 9]])
    for metric, rest in GRADIENT_DISTANCES.items():
        found = torch.zeros_like(wanted).requires_grad_()
        value = rest(found, wanted, shapes)
        assert value.item() == {"ours": 2, "mse": 14 + 162, "cos": 1}[metric]
        assert torch.autograd.grad(value.sum(), found)[0].isfinite().all()


@pytest.mark.parametrize("dsa_groups", [None, GROUPS])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_the_network_trains_on_the_images_between_outer_steps(batch_syn, dsa_groups):
    """On the images as they are in the step; each of a batch has its own parameters of DSA."""
    method, network = (
        make((3, 2), batch_syn=batch_syn, dsa_groups=dsa_groups),
        FlatNetwork(fresh(0)),
    )
    theta, per_epoch = theta_0(0), 1 if batch_syn is None else 2
    for iteration in range(3):
        step = method.step(iteration, LEARNED)
        if iteration:
            generator = stream(SEED, "student", iteration)
            batches = draw_batches(
                torch.arange(len(IMAGES)), batch_syn or len(IMAGES), dsa_groups, generator
            )
            for _ in range(2 * per_epoch):
                draw = next(batches)
                chosen = draw.indices if batch_syn else torch.arange(len(IMAGES))
                theta.requires_grad_()
                logits = network(theta, augment.apply(IMAGES[chosen], draw.augmentation))
                (g,) = torch.autograd.grad(F.cross_entropy(logits, LABELS[chosen]), theta)
                theta = theta.detach() - 0.1 * g
        reference = by_double_backward(theta, iteration, dsa_groups=dsa_groups)
        for value, wanted in zip((step.loss, step.grads["images"]), reference, strict=True):
            assert relative_error(value, wanted) < 1e-10
        assert step.record == {"network": 0}


def test_a_fresh_network_follows_and_one_outer_step_trains_none():
    method = make((2, 3))
    numbers = [method.step(i, LEARNED).record["network"] for i in range(5)]
    assert numbers == [0, 0, 1, 1, 2]
    assert (method.state_dict()["number"], method.state_dict()["position"]) == (2, 1)
    single = make((1, 3))
    for iteration in range(3):
        reference = by_double_backward(theta_0(iteration), iteration)
        assert_step(single.step(iteration, LEARNED), reference)


def test_a_state_goes_on_to_the_last_bit():
    whole, other = make((3, 2)), make((3, 2))
    for iteration in range(2):
        whole.step(iteration, LEARNED)
    kept = whole.state_dict()
    theta = kept["theta"].clone()
    expected = [whole.step(iteration, LEARNED) for iteration in range(2, 5)]
    assert torch.equal(kept["theta"], theta)  # later steps do not write to it
    other.load_state_dict(kept)
    for iteration, step in zip(range(2, 5), expected, strict=True):
        again = other.step(iteration, LEARNED)
        assert torch.equal(again.grads["images"], step.grads["images"])
        assert again.record == step.record


@pytest.mark.parametrize("world", [2, 4])
def test_processes_divide_the_classes(monkeypatch, world):
    whole = make().step(1, LEARNED)
    monkeypatch.setattr(ranks, "world", lambda: world)
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda tensor: tensor)
    parts = []
    for rank in range(min(world, CLASSES)):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(make().step(1, LEARNED))
    assert relative_error(sum(p.grads["images"] for p in parts), whole.grads["images"]) < 1e-12
    assert relative_error(sum(part.loss for part in parts), whole.loss) < 1e-12


def test_steps_lower_the_loss():
    """On networks that the steps do not see."""
    method, images = make(dsa_groups=None), IMAGES.clone()

    def mean_loss():
        losses = [make(dsa_groups=None, seed=9).step(i, {"images": images}).loss for i in range(4)]
        return torch.stack(losses).mean()

    before = mean_loss()
    for iteration in range(20):
        images -= 0.1 * method.step(iteration, {"images": images}).grads["images"]
    assert mean_loss() < 0.8 * before


@pytest.mark.parametrize(
    ("flags", "loops"),
    [
        ({"ipc": 1}, (1, 1)),
        ({"ipc": 10}, (10, 50)),
        ({"ipc": 50}, (50, 10)),
        ({"ipc": 7}, (10, 50)),
        ({"ipc": 25}, (20, 25)),  # as near to 30
        ({"ipc": 500}, (50, 10)),
        ({"ipc": 10, "outer_loop": 3}, (3, 50)),
        ({"ipc": 10, "inner_loop": 0}, (10, 0)),
    ],
    ids=str,
)
def test_loops_are_the_published_ones_of_the_nearest_ipc(flags, loops):
    assert Loops.of(DistillOptions(method="dc", **flags)) == Loops(*loops)


def test_an_outer_step_is_counted():
    """Ten steps of a network have nine times 50 epochs between them, of two batches each."""
    cost = network_cost("ConvNetD1", **SHAPE)
    options = DistillOptions(method="dsa", ipc=10, batch_real=64, batch_syn=60)
    work = count_work(options, cost, classes=10)
    assert work.flop == (10 * (3 * 64 + 11 * 10) + 45 * 100 * 3) * cost.flop
    assert work.passes == 2 * 4 + 45 * 2
    assert (work.students, work.batch, work.keeps_train) == (8, 64, True)
    half = count_work(options, cost, 2, classes=10)
    assert half.flop == work.flop // 2 and half.students == 5
    with pytest.raises(UserError, match="11 processes are more than the 10 classes"):
        count_work(options, cost, 11, classes=10)


SHORT_DSA = (
    "--method dsa --dataset digits --model ConvNetD1 --ipc 2 --Iteration 6 --eval_it 3 --num_eval 1"
    " --epoch_eval_train 1 --compile off --run_name run --batch_real 20 --outer_loop 4 "
    "--inner_loop 2 --batch_syn 15"
).split()


def distil(folder, *flags):
    """A short run; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT_DSA, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc2/run"


@pytest.fixture(scope="module")
def dsa_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("dsa"))


def test_a_run_says_what_it_does(dsa_run, tmp_path, capsys):
    assert [record["network"] for record in records(dsa_run, "step")] == [0, 0, 0, 0, 1, 1]
    state = torch.load(dsa_run / "checkpoint.pt", weights_only=True)["method"]
    assert (state["number"], state["position"]) == (1, 2)
    content = torch.load(dsa_run / "distilled_last.pt", weights_only=True)
    assert content["syn_lr"] == 0.01 and content["config"]["outer_loop"] == 4
    assert read_run(dsa_run).method == "DSA"
    argv = "--method dc --dataset folder --ipc 7 --data_path".split()
    with pytest.raises(UserError):
        distill_att.main([*argv, str(tmp_path)])
    said = "1000 outer steps, 10 of each network, which trains for 50 epochs between two"
    assert f"{said}, as published for --ipc 10\n" in capsys.readouterr().out


def test_dc_begins_with_noise_and_does_not_augment(dsa_run, tmp_path):
    """With DC's settings given by hand `dsa` is the same method, and is called so."""
    dc = read_run(distil(tmp_path / "dc", "--method", "dc"))
    assert dc.method == "DC"
    by_hand = distil(tmp_path / "hand", "--no_aug", "--pix_init", "noise")
    assert read_run(by_hand).method == "DC"
    losses = [[step["loss"] for step in records(run, "step")] for run in (dc.path, by_hand)]
    assert losses[0] == losses[1]
    assert losses[0][0] != records(dsa_run, "step")[0]["loss"]


def test_a_run_that_is_cut_off_goes_on_alike(dsa_run, tmp_path, monkeypatch):
    """In the middle of a network, whose parameters go on, too."""
    cut = assert_cut_off_goes_on_alike(lambda: distil(tmp_path), dsa_run, monkeypatch)
    ours, theirs = (
        torch.load(run / "checkpoint.pt", weights_only=True)["method"] for run in (dsa_run, cut)
    )
    assert torch.equal(ours.pop("theta"), theirs.pop("theta")) and ours == theirs


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--outer_loop", "0"], ["--outer_loop", "at least 1"]),
        (["--inner_loop", "-1"], ["--inner_loop", "at least 0"]),
        (["--dis_metric", "l2"], ["--dis_metric", "'l2'", "ours, mse, cos"]),
        (["--syn_steps", "2"], ["--syn_steps", "dc", "--outer_loop"]),
        (["--unroll", "autograd"], ["--unroll", "dc"]),
        (["--method", "dm", "--outer_loop", "2"], ["--outer_loop", "dm"]),
        (["--method", "att", "--dis_metric", "mse"], ["--dis_metric", "att"]),
        (["--pix_init", "samples_predicted_correctly"], ["--pix_init", "dc"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    argv = ["--method", "dc", "--dataset", "digits", "--save_path", str(tmp_path)]
    with pytest.raises(UserError) as error:
        distill_att.main([*argv, *flags])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)
