"""CAFE against its formula in float64; its loops; runs that go on to the last bit; refusals."""

import math
from functools import partial

import few_classes
import pytest
import torch
from few_classes import (
    CLASSES,
    COUNTS,
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
from torch import nn
from torch.nn import functional as F

import distill_att
from scripts.results.runs import read_run
from utils.compute.batches import draw_batches
from utils.compute.cost import network_cost
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data import augment
from utils.methods.cafe import CAFE, WINDOW, FeatureAlignment, Loop, Loops, count_work
from utils.options import DistillOptions

BETA = 0.3
NEVER = {"lambda_1": 0.0, "lambda_2": 1.0}  # no accuracy is as flat, or moves as far
fresh = partial(few_classes.fresh, model="ConvNetW32")
theta_0 = partial(few_classes.theta_0, model="ConvNetW32")
make_classes = partial(few_classes.make_classes, name="cafe")


def make(loops=None, *, model="ConvNetW32", dsa_groups=GROUPS, **keywords):
    settings = {"beta": BETA, "halve_at": (), "lr_net": 0.1, "batch_syn": 4, "batch_probe": 5}
    return FeatureAlignment(
        partial(fresh, model=model),
        make_classes(dsa_groups),
        LABELS,
        loops or Loops(**NEVER, most=2),
        dsa_groups=dsa_groups,
        seed=SEED,
        **settings | keywords,
    )


def by_formula(theta, iteration, *, model="ConvNetW32", dsa_groups=GROUPS, beta=BETA):
    """J and dJ/dimages, with one graph over all, layer by layer and image by image.

    The features of a layer are what a hook sees behind its activation; the last ones go into the
    linear layer.
    """
    network, classes = fresh(0, model=model).double(), make_classes(dsa_groups)
    nn.utils.vector_to_parameters(theta, network.parameters())
    layers = []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, inputs, output: layers.append(output))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))

    def features(x):
        layers.clear()
        network(x)
        return [each.flatten(1) for each in layers]

    leaf, loss, seen_real, centres = IMAGES.clone().requires_grad_(), 0, [], []
    for label in range(CLASSES):
        real, synthetic = classes.draw(iteration, label)
        assert (TRAIN.labels[real.indices] == label).all()
        of_real = features(augment.apply(TRAIN.images[real.indices], real.augmentation))
        of_seen = features(augment.apply(leaf[synthetic.indices], synthetic.augmentation))
        weights = [0.1] * (len(of_real) - 2) + [1.0, 2.0]
        for w, wanted, found in zip(weights, of_real, of_seen, strict=True):
            loss = loss + w * (wanted.mean(0) - found.mean(0)).square().sum()
        seen_real += [(f.detach(), label) for f in of_real[-1]]
        centres.append(of_seen[-1].mean(0))
    for f, label in seen_real:
        products = torch.stack([f @ centre for centre in centres])
        loss = loss - beta * (products[label] - products.logsumexp(0))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_step(step, reference, within=1e-11):
    for value, wanted in zip((step.loss, step.grads["images"]), reference, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < within


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ({}, {}),
        ({"model": "ConvNetD1"}, {}),
        ({"model": "ConvNetD2"}, {}),
        ({"model": "ConvNetNP"}, {"micro_batch": 2}),
        ({"model": "AlexNet"}, {}),
        ({"dsa_groups": None}, {"micro_batch": 1}),
        *[({"dsa_groups": (group,)}, {"micro_batch": 7}) for group in GROUPS],
        ({}, {"micro_batch": 10}),
        pytest.param(
            {"model": "ConvNetD1"}, {"execution": Execution(compiled=True)}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_formula(what, way):
    reference = by_formula(theta_0(0, model=what.get("model", "ConvNetW32")), 3, **what)
    assert_step(make(**what, **way).step(3, LEARNED), reference)


def test_each_part_of_the_loss_counts():
    both, features = (by_formula(theta_0(0), 3, beta=beta)[1] for beta in (BETA, 0.0))
    assert relative_error(features, both) > 1e-3
    step = make(beta=0.0).step(3, LEARNED)
    assert relative_error(step.grads["images"], features) < 1e-11


def accuracy(theta, iteration, number, count):
    """On `count` random real images of each class, or all where there are fewer."""
    network, right, seen = FlatNetwork(fresh(0)), 0, 0
    for label, members in enumerate(torch.arange(len(TRAIN.labels)).split(COUNTS)):
        generator = stream(SEED, "cafe", iteration, "probe", number, label)
        chosen = members[torch.randperm(len(members), generator=generator)[:count]]
        right += (network(theta, TRAIN.images[chosen]).argmax(1) == label).sum().item()
        seen += len(chosen)
    return right / seen


@pytest.mark.parametrize("dsa_groups", [None, GROUPS])
def test_the_network_trains_on_the_images_between_outer_steps(dsa_groups):
    """Epoch by epoch, on the images as they are in the step; accuracies carry nothing over."""
    method = make(Loops(**NEVER, most=3), dsa_groups=dsa_groups, micro_batch=4)
    network, theta = FlatNetwork(fresh(0)), theta_0(0)
    for iteration in range(3):
        step = method.step(iteration, LEARNED)
        for epoch in range(3 if iteration else 0):
            generator = stream(SEED, "student", iteration, epoch)
            batches = draw_batches(torch.arange(len(IMAGES)), 4, dsa_groups, generator)
            for _ in range(2):
                draw = next(batches)
                theta.requires_grad_()
                logits = network(theta, augment.apply(IMAGES[draw.indices], draw.augmentation))
                (g,) = torch.autograd.grad(F.cross_entropy(logits, LABELS[draw.indices]), theta)
                theta = theta.detach() - 0.1 * g
        assert_step(step, by_formula(theta, iteration, dsa_groups=dsa_groups), 1e-9)
        assert step.record == {
            "network": 0,
            "epochs": 3 if iteration else 0,
            "accuracy": accuracy(theta, iteration, 0, 5),
            "capped": (iteration > 0) + (iteration == 2),
        }
    assert method.step(3, LEARNED).record["network"] == 1


def made(*accuracies):
    loop = Loop()
    for each in accuracies:
        loop = loop.after(each)
    return loop


def test_the_last_ten_accuracies_end_a_loop():
    loops = Loops(lambda_1=0.04, lambda_2=0.03, most=12)
    few = made(*[0.5] * (WINDOW - 1))
    assert math.isnan(few.spread) and not loops.is_flat(few) and not loops.has_moved(few)
    flat = few.after(0.52)
    assert loops.is_flat(flat) and not loops.has_moved(flat)
    moved = few.after(0.55)
    assert loops.has_moved(moved) and not loops.is_flat(moved)
    between = few.after(0.535)  # flat for the outer loop, far enough for the inner one
    assert loops.is_flat(between) and loops.has_moved(between)
    assert loops.is_flat(made(0.1, *[0.5] * WINDOW))  # the first has left the window
    assert [loops.is_full(made(*[0.5] * turns)) for turns in (11, 12)] == [False, True]
    restless, still = made(*[0.1, 0.9] * 6), made(*[0.5] * 12)
    assert loops.capped(Loop(), flat) == 0 == loops.capped(moved, flat)
    assert loops.capped(still, moved) == 1 == loops.capped(moved, restless)
    assert loops.capped(still, restless) == 2


def test_loops_follow_the_accuracy():
    """One that counts as moved at once takes the fewest epochs; as flat, the fewest outer steps."""
    quick = make(Loops(lambda_1=2.0, lambda_2=-1.0, most=100))
    taken = [quick.step(i, LEARNED).record for i in range(WINDOW + 1)]
    assert [record["epochs"] for record in taken] == [0, *[WINDOW] * (WINDOW - 1), 0]
    assert [record["network"] for record in taken] == [*[0] * WINDOW, 1]
    assert not any(record["capped"] for record in taken)


def test_rates_are_halved_on_the_way():
    method = make(Loops(**NEVER, most=1), halve_at=[1, 3])
    assert [method.step(i, LEARNED).factor for i in range(5)] == [1, 0.5, 0.5, 0.25, 0.25]


def test_a_state_goes_on_to_the_last_bit():
    loops = Loops(**NEVER, most=3)
    whole, other = make(loops), make(loops)
    for iteration in range(2):
        whole.step(iteration, LEARNED)
    kept = whole.state_dict()
    theta, latest = kept["theta"].clone(), list(kept["latest"])
    expected = [whole.step(iteration, LEARNED) for iteration in range(2, 5)]
    assert torch.equal(kept["theta"], theta) and kept["latest"] == latest != []
    other.load_state_dict(kept)
    for iteration, step in zip(range(2, 5), expected, strict=True):
        again = other.step(iteration, LEARNED)
        assert torch.equal(again.grads["images"], step.grads["images"])
        assert again.record == step.record


def test_steps_lower_the_loss():
    """On networks that the steps do not see."""
    method, images = make(Loops(**NEVER, most=1), dsa_groups=None), IMAGES.clone()

    def mean_loss():
        losses = []
        for iteration in range(100, 103):
            theta = theta_0(iteration)
            method.load_state_dict({"theta": theta[None], "number": 0, "turns": 0, "latest": []})
            losses.append(method.step(iteration, {"images": images}).loss)
        return torch.stack(losses).mean()

    before = mean_loss()
    for iteration in range(20):
        images -= 2e-2 * method.step(iteration, {"images": images}).grads["images"]
    assert mean_loss() < 0.8 * before


def test_an_outer_step_is_counted():
    """Ten steps of a network have nine times ten epochs between them, each with an accuracy."""
    cost = network_cost("ConvNetD1", **SHAPE)
    options = DistillOptions(method="cafe", ipc=10, batch_real=64, batch_probe=20, batch_syn=60)
    work = count_work(options, cost, classes=10)
    matching, probes, training = 10 * (64 + 3 * 10), 10 * 20 * 10, 9 * 100 * 3
    assert work.flop == (matching + probes + training) * cost.flop
    assert work.passes == 2 + 9 * (1 + 2)
    assert (work.batch, work.students, work.keeps_train) == (640, 1, True)
    half = count_work(options, cost, 2, classes=10)
    assert half.flop == work.flop // 2 and half.batch == 320
    with pytest.raises(UserError, match="11 processes are more than the 10 classes"):
        count_work(options, cost, 11, classes=10)


def test_loops_that_end_at_their_cap_are_counted():
    assert CAFE.stalled([0.0] * 2, [{"capped": 0}] * 2) is None
    complaint = CAFE.stalled([0.0] * 3, [{"capped": 2}, {"capped": 0}, {"capped": 1}])
    assert "last 3 outer steps 3 loops ended at --max_loop" in complaint


SHORT = (
    "--method cafe_dsa --dataset digits --model ConvNetD1 --ipc 2 --Iteration 6 --eval_it 3 "
    "--num_eval 1 --epoch_eval_train 1 --compile off --run_name run --batch_real 20 "
    "--batch_probe 10 --max_loop 4 --batch_syn 15 --lr_net 0.1 --halve_at 2"
).split()


def distil(folder, *flags):
    """A short run; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc2/run"


@pytest.fixture(scope="module")
def cafe_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("cafe"))


def test_a_run_says_what_it_does(cafe_run, tmp_path, capsys):
    steps = records(cafe_run, "step")
    assert [step["network"] for step in steps] == [0, 0, 0, 0, 1, 1]
    assert [step["epochs"] for step in steps] == [0, 4, 4, 4, 0, 4]
    assert all(0 <= step["accuracy"] <= 1 for step in steps)
    state = torch.load(cafe_run / "checkpoint.pt", weights_only=True)["method"]
    assert (state["number"], state["turns"]) == (1, 2)
    assert state["latest"] == [step["accuracy"] for step in steps[4:]]
    content = torch.load(cafe_run / "distilled_last.pt", weights_only=True)
    assert content["syn_lr"] == 0.1 and content["config"]["max_loop"] == 4
    assert read_run(cafe_run).method == "CAFE+DSA"
    with pytest.raises(UserError):
        distill_att.main(["--method", "cafe", "--dataset", "folder", "--data_path", str(tmp_path)])
    said = "20000 outer steps, 10 to 100 of each network, until its accuracy is flat (lambda_1 0.04"
    assert said in capsys.readouterr().out


def test_plain_cafe_does_not_augment(cafe_run, tmp_path):
    """With its setting given by hand `cafe_dsa` is the same method, and is called so."""
    plain = read_run(distil(tmp_path / "plain", "--method", "cafe"))
    by_hand = distil(tmp_path / "hand", "--no_aug")
    assert plain.method == "CAFE" == read_run(by_hand).method
    losses = [[step["loss"] for step in records(run, "step")] for run in (plain.path, by_hand)]
    assert losses[0] == losses[1]
    assert losses[0][0] != records(cafe_run, "step")[0]["loss"]


def test_a_run_that_is_cut_off_goes_on_alike(cafe_run, tmp_path, monkeypatch):
    """In the middle of a network, whose parameters and accuracies go on, too."""
    cut = assert_cut_off_goes_on_alike(lambda: distil(tmp_path), cafe_run, monkeypatch)
    ours, theirs = (
        torch.load(run / "checkpoint.pt", weights_only=True)["method"] for run in (cafe_run, cut)
    )
    assert torch.equal(ours.pop("theta"), theirs.pop("theta")) and ours == theirs


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--max_loop", "0"], ["--max_loop", "at least 1"]),
        (["--lambda_1", "-1"], ["--lambda_1", "at least 0"]),
        (["--halve_at", "-1"], ["--halve_at", "at least 0"]),
        (["--outer_loop", "2"], ["--outer_loop", "cafe", "--max_loop"]),
        (["--syn_steps", "2"], ["--syn_steps", "cafe", "--lambda_1"]),
        (["--unroll", "autograd"], ["--unroll", "cafe"]),
        (["--method", "dsa", "--beta", "2"], ["--beta", "dsa", "--outer_loop"]),
        (["--method", "att", "--lambda_2", "1"], ["--lambda_2", "att"]),
        (["--pix_init", "samples_predicted_correctly"], ["--pix_init", "cafe"]),
        (["--model", "MLP"], ["--model MLP", "--method cafe", "ConvNet"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    argv = ["--method", "cafe", "--dataset", "digits", "--save_path", str(tmp_path)]
    with pytest.raises(UserError) as error:
        distill_att.main([*argv, *flags])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)
