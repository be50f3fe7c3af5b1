"""DD: its gradient by hand, its steps on fresh networks, its set and its refusals."""

from functools import partial

import pytest
import torch
from numerics import relative_error
from short_runs import assert_cut_off_goes_on_alike
from torch.nn import functional as F

import distill_att
import eval as evaluation_script
from networks import NETWORKS, build_network
from scripts.results.evaluations import measured
from scripts.results.runs import read_run
from utils.compute.flat import FlatNetwork, flatten
from utils.core.errors import UserError
from utils.core.rng import derive_seed
from utils.data.dataset import Split
from utils.data.distilled import SyntheticSet, batches_in_order
from utils.measure.protocol import LearnedSteps, Protocol, evaluate
from utils.methods.dd import RATES, FixedBatches
from utils.methods.real_loss import BackPropagation

SHAPE = {"channels": 1, "num_classes": 2, "image_size": 8}
LABELS = torch.tensor([0, 0, 1, 1])
STEP_LRS = 0.05 * torch.arange(1.0, 5.0, dtype=torch.float64)  # 2 batches, twice


def some(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)


IMAGES, TRAIN = some(4, 0), Split(some(10, 1), torch.arange(10) % 2)


def fresh(seed, model="ConvNetD1"):
    return build_network(model, **SHAPE, seed=seed)


def make(model="ConvNetD1", students=1, **keywords):
    course = FixedBatches(2, 2, 2, 2, 3, seed=0)
    settings = {"rate": RATES, "inner_opt": "sgd", "batch_target": 100, "clip": 0.0}
    settings |= {"students": students} | keywords
    return BackPropagation(partial(fresh, model=model), TRAIN, LABELS, course, **settings)


def by_hand(method, iteration, model):
    flat = FlatNetwork(fresh(0, model))
    images, rates = IMAGES.clone().requires_grad_(), STEP_LRS.clone().requires_grad_()
    theta = method._theta_0(iteration).double().requires_grad_()
    for t, batch in enumerate([[0, 2], [1, 3]] * 2):
        loss = F.cross_entropy(flat(theta, images[batch]), LABELS[batch])
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rates[t] * g
    loss = F.cross_entropy(flat(theta, TRAIN.images), TRAIN.labels)
    return loss.detach(), *torch.autograd.grad(loss, (images, rates))


@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("ConvNetD1", {"micro_batch": 1}),
        ("ConvNetD1", {"engine": "autograd"}),
        ("AlexCifarNet", {}),
    ],
)
def test_the_gradient_is_that_of_the_loop(model, way):
    method = make(model, **way)
    step = method.step(4, {"images": IMAGES, RATES: STEP_LRS})
    assert step.record["length"] == 4 and step.factor == 0.5
    found = step.loss, step.grads["images"], step.grads[RATES]
    for value, reference in zip(found, by_hand(method, 4, model), strict=True):
        assert relative_error(value, reference) < 1e-9


def test_every_class_is_in_every_batch():
    assert [batch.tolist() for batch in batches_in_order(2, 4, 2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_alexcifarnet_is_the_published_one():
    network = build_network("AlexCifarNet", channels=3, num_classes=10, image_size=32, seed=0)
    assert sum(param.numel() for param in network.parameters()) == 1_756_426
    assert all((param == 0).all() for name, param in network.named_parameters() if "bias" in name)
    assert "AlexCifarNet" in NETWORKS


def test_learned_steps_train_fresh_networks():
    test = Split(some(40, 3), torch.arange(40) % 2)
    accuracies = evaluate(
        IMAGES,
        LABELS,
        test,
        num_classes=2,
        model="ConvNetD1",
        lr=1.0,
        protocol=Protocol(num_eval=2, epochs=1, batch_size=4, dsa_groups=None),
        seed=5,
        own_training=LearnedSteps(batches_in_order(2, 2, 2) * 2, STEP_LRS),
    )
    flat = FlatNetwork(fresh(0))
    for k, acc in enumerate(accuracies.accs):
        theta = flatten(fresh(derive_seed(5, "init", k)).parameters()).detach().double()
        for t, batch in enumerate([[0, 2], [1, 3]] * 2):
            leaf = theta.requires_grad_()
            (g,) = torch.autograd.grad(
                F.cross_entropy(flat(leaf, IMAGES[batch]), LABELS[batch]), leaf
            )
            theta = (theta - STEP_LRS[t] * g).detach()
        assert acc == (flat(theta, test.images).argmax(1) == test.labels).double().mean().item()


SHORT_DD = (
    "--method dd --dataset digits --model ConvNetD1 --ipc 2 --distill_steps 2 --Iteration 4 "
    "--eval_it 2 --num_eval 1 --epoch_eval_train 1 --compile off --run_name run --batch_target 50"
).split()


def distil(folder, *flags):
    assert distill_att.main([*SHORT_DD, "--save_path", str(folder), *flags]) == 0
    return folder / "digits/ConvNetD1/ipc2/run"


@pytest.fixture(scope="module")
def dd_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("dd"))


def test_a_set_has_its_rates_and_is_evaluated_by_its_steps(dd_run, capsys):
    kept = SyntheticSet.load(dd_run / "distilled_last.pt")
    assert kept.step_lrs.shape == (6,) and len(kept.step_lrs.unique()) > 1
    flags = "--num_eval 1 --epoch_eval_train 2 --random".split()
    path = dd_run / "distilled_last.pt"
    assert evaluation_script.main(["--distilled", str(path), *flags]) == 0
    assert "distilled raw, learned steps" in capsys.readouterr().out
    sets = {row["set"] for row in measured(read_run(dd_run))}
    assert {"raw", "raw, learned steps"} <= sets


def test_a_run_that_is_cut_off_goes_on_alike(dd_run, tmp_path, monkeypatch):
    assert_cut_off_goes_on_alike(lambda: distil(tmp_path), dd_run, monkeypatch)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--ipc", "3"], ["--ipc 3", "--distill_steps"]),
        (["--batch_syn", "2"], ["--batch_syn", "dd"]),
        (["--soft_labels"], ["--soft_labels", "dd"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    with pytest.raises(UserError) as error:
        distil(tmp_path, *flags)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"step_lrs": torch.ones(5)}, "2 batches"), ({"step_lrs": -torch.ones(6)}, "not above 0")],
)
def test_damaged_rates_are_named(dd_run, tmp_path, change, problem):
    content = torch.load(dd_run / "distilled_last.pt", weights_only=True) | change
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(UserError, match=problem):
        SyntheticSet.load(tmp_path / "set.pt")
