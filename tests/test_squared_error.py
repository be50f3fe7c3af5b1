"""Networks that regress on KIP's labels: against autograd, dense Jacobians, and in eval.py."""

import math
from dataclasses import replace

import pytest
import torch
from numerics import relative_error
from short_runs import digits_set
from torch.func import functional_call, jacrev

import eval as evaluation_script
from networks import build_network
from scripts.plan.estimate import row_estimate
from scripts.results.evaluations import SETS
from utils.compute.cohort import Cohort, Recipe
from utils.compute.execution import PLAIN, Execution
from utils.compute.labels import squared_error
from utils.compute.ntk import BIAS, WEIGHT
from utils.compute.regression import centred
from utils.compute.stability import largest_stable_rate
from utils.core.rng import stream
from utils.data.dataset import load_dataset
from utils.data.distilled import SyntheticSet
from utils.data.label_forms import CENTRED
from utils.data.real_images import random_real_images
from utils.measure.record import read_evaluations
from utils.measure.sets import SQUARED
from utils.measure.squared_error import SquaredErrorSteps
from utils.options import DistillOptions, EvalOptions
from utils.plan.machine import A100
from utils.plan.sizes import DataSize

NARROW = "ConvNetKIPW32"
CPU = torch.device("cpu")
SHAPE = {"channels": 1, "num_classes": 3, "image_size": 4}


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, LABELS = some(5, 1, 4, 4), some(5, 3, seed=1)


def narrow(seed):
    return build_network(NARROW, **SHAPE, seed=seed).double()


def stable_rate(network, *, piece=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return largest_stable_rate(network, IMAGES, piece=piece, generator=generator)


def test_the_loss_is_half_of_the_mean_square():
    outputs = some(5, 3, seed=2)
    expected = sum((outputs - LABELS).flatten().tolist()[i] ** 2 for i in range(15)) / (2 * 5 * 3)
    assert squared_error(outputs, LABELS).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("execution", [PLAIN, Execution(vectorised=True)], ids=["rows", "vmap"])
def test_steps_are_those_of_autograd(execution):
    """Also the rate of each step and network, and L2."""
    training = SquaredErrorSteps(batch_size=3, steps=4, factor=0.5)
    recipe = Recipe(NARROW, 1, 3, 4, execution=execution, label_form=CENTRED, **training.optimiser)
    cohort = Cohort(recipe, [3, 4], device=CPU, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    training.train(cohort, IMAGES, LABELS, generators)
    for found, seed, draws in zip(cohort.networks, (3, 4), (7, 8), strict=True):
        network, generator = narrow(seed), torch.Generator().manual_seed(draws)
        first = largest_stable_rate(network, IMAGES, piece=5, generator=generator) / 2
        sgd = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            sgd, lambda t, first=first: first * (1 + math.cos(math.pi * t / 4)) / 2
        )
        for _ in range(4):
            chosen = torch.randperm(5, generator=generator)[:3]
            sgd.zero_grad()
            ((network(IMAGES[chosen]) - LABELS[chosen]) ** 2 / 2).mean().backward()
            sgd.step()
            cosine.step()
        for mine, theirs in zip(found.parameters(), network.parameters(), strict=True):
            assert relative_error(mine, theirs) < 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rate_is_that_of_the_dense_jacobian(seed):
    network = narrow(seed)
    params = {name: param.detach() for name, param in network.named_parameters()}
    rows = jacrev(lambda params: functional_call(network, params, (IMAGES,)))(params)
    jacobian = torch.cat([row.flatten(2) for row in rows.values()], 2).flatten(0, 1)
    largest = torch.linalg.eigvalsh(jacobian @ jacobian.T / jacobian.shape[0])[-1]
    assert 0 <= stable_rate(network) / (2 / largest.item()) - 1 < 0.01  # never too small
    assert stable_rate(network, piece=2) == pytest.approx(stable_rate(network), rel=1e-9)


def test_initial_weights_are_those_of_the_kernels():
    network = build_network("ConvNetKIPW256", channels=3, num_classes=10, image_size=8, seed=0)
    for name, param in network.named_parameters():
        variance = BIAS if param.dim() == 1 else WEIGHT / param[0].numel()
        # Of n normal numbers the variance varies by sqrt(2 / n) of itself.
        tolerance = 5 * math.sqrt(2 / param.numel())
        assert param.square().mean().item() == pytest.approx(variance, rel=tolerance), name


def test_how_long_it_trains():
    few, many = (SquaredErrorSteps.on(count) for count in (10, 150))
    assert (few.batch_size, few.epochs(10)) == (10, 5_000)
    assert (many.batch_size, many.epochs(150)) == (100, 3_334)
    assert {f"distilled raw{SQUARED}", f"distilled ema{SQUARED}"} < set(SETS)


@pytest.fixture
def kip_set(tmp_path, monkeypatch):
    """Real digits, two of each class, as a set of KIP; networks take 150 steps."""
    data = load_dataset("digits")
    config = {"batch_train": 256, "kernel": "fc", "kernel_depth": 1, "reg": 1e-6}
    labels = torch.arange(10).repeat_interleave(2)
    distilled = digits_set(
        data,
        random_real_images(data, 2, stream(0, "test")),
        model="MLP",
        set="raw",
        ipc=2,
        labels=labels,
        soft_labels=centred(labels, 10, torch.float32).roll(1, 1),  # as the next class
        label_form=CENTRED,
        config=config,
    )
    distilled.save(tmp_path / "distilled_x.pt", include_whitening=True)
    monkeypatch.setattr(SquaredErrorSteps, "on", lambda count: SquaredErrorSteps(20, steps=150))
    return tmp_path / "distilled_x.pt"


def evaluate(path, *flags):
    flags = ["--distilled", str(path), "--epoch_eval_train", "1", *flags]
    assert evaluation_script.main(flags) == 0
    return read_evaluations(path.parent / "eval.json")


def test_eval_has_a_line_of_its_own_for_networks_that_regress(kip_set, capsys):
    """On the labels as they are, which here name the next class."""
    found = evaluate(kip_set, *f"--model {NARROW} MLP --num_eval 1".split())
    said = capsys.readouterr().out
    assert f"{NARROW}{SQUARED}: 150 steps of 20 images, from 1 times the largest stable" in said
    lines = [(entry["trained_on"], entry["model"]) for entry in found]
    assert lines == [
        ("distilled raw, kernel regression", "NTK-FC1"),
        (f"distilled raw{SQUARED}", NARROW),
        ("distilled raw", NARROW),
        ("distilled raw", "MLP"),
    ]
    confusion = torch.tensor(found[1]["confusion"])
    assert confusion.roll(-1, 1).diag().sum() > 0.6 * confusion.sum()
    again = evaluate(kip_set, *f"--model {NARROW} --num_eval 2 --no_hard_labels".split())
    assert "(1 of them recorded before)" in capsys.readouterr().out
    assert again[4]["accs"][0] == found[1]["accs"][0] and len(again) == 5


def test_other_networks_and_sets_have_no_such_line(kip_set, capsys):
    evaluate(kip_set, *"--model MLP --num_eval 1".split())
    of_kip, other = SyntheticSet.load(kip_set), kip_set.with_name("other.pt")
    config = {name: value for name, value in of_kip.config.items() if "kernel" not in name}
    of_classes = replace(of_kip, soft_labels=None, label_form=None, config=config)
    of_classes.save(other, include_whitening=True)
    found = evaluate(other, *f"--model {NARROW} --num_eval 1".split())
    assert SQUARED not in capsys.readouterr().out
    assert [entry["trained_on"] for entry in found[2:]] == ["distilled raw"]


def test_its_time_is_planned_for():
    size = DataSize(1, 10, 8, train=1437, test=360)
    options = DistillOptions(method="kip", dataset="digits", ipc=1)
    evaluations = [
        EvalOptions(model=[model], num_eval=1, epoch_eval_train=1)
        for model in ("ConvNetKIP", "ConvNetW1024")
    ]
    more, less = (row_estimate(options, each, res=8).hours for each in evaluations)
    training = size.training("ConvNetKIP", 10, batch=10, epochs=5_000)
    seconds = A100.training_seconds(training, networks=1, at_once=1, compiled=True)
    assert (more - less) * 3600 > 2 * seconds  # the images, and their moving average
