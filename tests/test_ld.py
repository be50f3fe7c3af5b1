"""LD: its gradient and its network by hand, its restarts, its own evaluation and its refusals."""

from functools import partial

import pytest
import torch
from numerics import relative_error
from short_runs import assert_cut_off_goes_on_alike, images, records
from torch.nn import functional as F

import distill_att
import eval as evaluation_script
from networks import build_network
from scripts.results.evaluations import measured
from scripts.results.runs import read_run
from utils.compute.cost import network_cost
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.core.errors import UserError
from utils.core.rng import derive_seed, stream
from utils.data.dataset import Split
from utils.data.distilled import SyntheticSet
from utils.measure.protocol import AdamSteps, EvalExecution, Protocol, evaluate
from utils.methods.base import Learned, Step
from utils.methods.ld import LabelDistillation, Training, as_probabilities, count_ld, train_steps
from utils.methods.outer_state import OuterState
from utils.options import DistillOptions

SHAPE = {"channels": 1, "num_classes": 2, "image_size": 8}


def some(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)


IMAGES, TRAIN = some(4, 0), Split(some(10, 1), torch.arange(10) % 2)
LABELS = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3]], dtype=torch.float64)
LEARNED = {"images": IMAGES, "labels": LABELS}


def fresh(seed, model="ConvNetD1"):
    return build_network(model, **SHAPE, seed=seed)


def make(model="ConvNetD1", **keywords):
    settings = {"batch_syn": 3, "batch_target": 100, "lr_inner": 0.1, "lr_adam": 0.01}
    settings |= {"restart_after": 50, "seed": 0} | keywords
    return LabelDistillation(partial(fresh, model=model), TRAIN, **settings)


def theta_0(number, model="ConvNetD1"):
    network = fresh(derive_seed(0, "bptt", number, "init"), model)
    return flatten(network.parameters()).detach().double()


def batch_of(iteration, size=3):
    return torch.randperm(4, generator=stream(0, "student", iteration))[:size]


def soft_loss(logits, labels):
    return -(labels * logits.log_softmax(1)).sum(1).mean()


def by_hand(theta, iteration, model="ConvNetD1"):
    """J, dJ/dlabels and the wrong answers behind one step from theta, by the whole graph."""
    flat, labels = FlatNetwork(fresh(0, model)), LABELS.clone().requires_grad_()
    theta, chosen = theta.requires_grad_(), batch_of(iteration)
    loss = soft_loss(flat(theta, IMAGES[chosen]), labels[chosen])
    (g,) = torch.autograd.grad(loss, theta, create_graph=True)
    logits = flat(theta - 0.1 * g, TRAIN.images)
    loss = F.cross_entropy(logits, TRAIN.labels)
    wrong = (logits.argmax(1) != TRAIN.labels).sum().item()
    return loss.detach(), torch.autograd.grad(loss, labels)[0], wrong


@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("ConvNetD1", {}),
        ("ConvNetD1", {"micro_batch": 2}),
        ("ConvNetD1", {"engine": "autograd"}),
        pytest.param("ConvNetD1", {"execution": Execution(compiled=True)}, marks=pytest.mark.slow),
        ("AlexCifarNet", {"micro_batch": 1}),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_whole_graph(model, way):
    step = make(model, **way).step(4, LEARNED)
    loss, by_labels, wrong = by_hand(theta_0(0, model), 4, model)
    assert set(step.grads) == {"labels"} and not step.grads["labels"][batch_of(4)].eq(0).any()
    assert relative_error(step.loss, loss) < 1e-9
    assert relative_error(step.grads["labels"], by_labels) < 1e-9
    assert step.record == {"error": wrong / 10, "network": 0}


def test_the_target_is_drawn_and_the_same_for_all_methods():
    step = make(batch_target=4).step(4, LEARNED)
    chosen = torch.randperm(10, generator=stream(0, "bptt", 4, "target"))[:4]
    part = Split(TRAIN.images[chosen], TRAIN.labels[chosen])
    whole = LabelDistillation(
        fresh,
        part,
        batch_syn=3,
        batch_target=4,
        lr_inner=0.1,
        lr_adam=0.01,
        restart_after=50,
        seed=0,
    ).step(4, LEARNED)
    assert relative_error(step.grads["labels"], whole.grads["labels"]) < 1e-9


def test_the_network_trains_by_adam_on_the_labels_before_the_update():
    method, flat = make(), FlatNetwork(fresh(0))
    theta = theta_0(0).requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.01)
    for iteration in range(4):
        reference = by_hand(theta.detach().clone(), iteration)
        step = method.step(iteration, LEARNED)
        assert relative_error(step.grads["labels"], reference[1]) < 1e-4
        chosen = batch_of(iteration)
        adam.zero_grad()
        soft_loss(flat(theta, IMAGES[chosen]), LABELS[chosen]).backward()
        adam.step()
    found = method.state_dict()["state"][0, : len(theta)]
    assert relative_error(found, theta.detach()) < 1e-5  # eps stands elsewhere in Adam


def test_training_ends_when_the_moving_average_falls_no_more():
    """Sums over two: -, 9, 7, 6, 6, 12, 10: the smallest is first reached after 4 steps."""
    training, best = Training(), []
    for wrong in (5, 4, 3, 3, 3, 9):
        training = training.after(wrong, 2)
        best.append(training.best)
        assert not training.is_over(2)
    assert best == [0, 2, 3, 4, 4, 4]
    training = training.after(1, 2)
    assert training.is_over(2) and (training.steps, training.best) == (7, 4)
    assert training.after(0, 2).best == 8  # a new minimum


def test_a_window_that_is_not_full_ends_nothing():
    training = Training()
    for wrong in range(9):
        training = training.after(wrong, 10)
    assert not training.is_over(10) and training.best == 0


def test_a_fresh_network_follows_and_the_counts_are_noted():
    method = make(restart_after=1)
    running = method._running
    g = torch.ones(1, len(theta_0(0)), dtype=torch.float64)
    noted = []
    for wrong in (3, 2, 2, 2, 1, 1, 1, 5, 5, 5, 4, 3, 2, 2, 2):
        number = running.number
        running = method._after(running, g, wrong)
        if running.number > number:
            noted.append(running.noted)
            assert torch.equal(running.state[0, : g.shape[1]], theta_0(running.number))
            assert (running.state[0, g.shape[1] :] == 0).all()
            assert running.training == Training()
    assert noted == [(2,), (2, 1), (2, 1, 1), (1, 1, 3)]  # the last three


@pytest.mark.parametrize(
    ("noted", "steps", "expected"),
    [([5, 9, 11], 3, 8), ([4, 7], 3, 5), ([7], 3, 7), ([], 3, 3), ([], 0, None)],
)
def test_steps_are_the_mean_of_what_was_noted(noted, steps, expected):
    assert train_steps({"noted": noted, "training": {"steps": steps}}) == expected


def test_labels_stay_probabilities():
    labels = torch.tensor([[0.5, -1.0, 2.0], [-1.0, 0.0, -0.1], [0.2, 0.2, 0.4]])
    found = as_probabilities(labels)
    expected = torch.tensor([[1 / 3, 0, 2 / 3], [1 / 3, 1 / 3, 1 / 3], [0.25, 0.25, 0.5]])
    torch.testing.assert_close(found, expected)
    assert as_probabilities(torch.full((1, 2), torch.nan)).isnan().all()  # and is not hidden


def test_an_update_is_projected_and_images_that_are_not_learned_stay():
    learned = [
        Learned(
            "labels",
            torch.full((1, 2), 0.5),
            0.3,
            "lr_y",
            adam=(0.9, 0.999),
            project=as_probabilities,
        )
    ]
    state = OuterState(learned, images=IMAGES, syn_lr=0.1, ema_decay=0.9, if_not_finite="")
    state.update(Step(torch.tensor(1.0), {"labels": torch.tensor([[1.0, -1.0]])}, {}))
    torch.testing.assert_close(state.soft_labels, torch.tensor([[0.2, 0.8]]))  # Adam: by lr_y
    state.update(Step(torch.tensor(1.0), {"labels": torch.tensor([[1.0, 1.0]])}, {}))
    torch.testing.assert_close(state.soft_labels.sum(), torch.tensor(1.0))
    assert torch.equal(state.images, IMAGES) and torch.equal(state.ema_images, IMAGES)


def test_an_outer_step_is_counted():
    options = DistillOptions(method="ld", ipc=5, batch_syn=4, batch_target=50)
    cost = network_cost("ConvNetD1", **SHAPE)
    work = count_ld(options, cost, classes=2)
    assert work.flop == (4 * (3 + 8 + 3) + 50 * 3) * cost.flop
    assert (work.batch, work.whole_batch, work.keeps_train) == (50, 50, True)
    half = count_ld(options, cost, 2, classes=2)
    assert half.flop == work.flop // 2 and half.divides_batches and half.batch == 25
    with pytest.raises(UserError, match="5 processes are more than the 4 images"):
        count_ld(options, cost, 5, classes=2)


@pytest.mark.parametrize("at_once", [1, 2])
def test_own_evaluation_is_adam_on_random_batches(at_once):
    test = Split(some(40, 3), torch.arange(40) % 2)
    accuracies = evaluate(
        IMAGES,
        LABELS,
        test,
        num_classes=2,
        model="ConvNetD1",
        lr=1.0,
        protocol=Protocol(num_eval=3, epochs=1, batch_size=4, dsa_groups=None),
        seed=5,
        label_form="probabilities",
        own_training=AdamSteps(steps=9, batch_size=3, lr=0.02),
        run=EvalExecution(at_once),
    )
    flat = FlatNetwork(fresh(0))
    for k, acc in enumerate(accuracies.accs):
        network = fresh(derive_seed(5, "init", k))
        theta = flatten(network.parameters()).detach().double().requires_grad_()
        adam, generator = torch.optim.Adam([theta], lr=0.02), stream(5, "minibatch", k)
        for _ in range(9):
            chosen = torch.randperm(4, generator=generator)[:3]
            adam.zero_grad()
            soft_loss(flat(theta, IMAGES[chosen]), LABELS[chosen]).backward()
            adam.step()
        assert acc == (flat(theta, test.images).argmax(1) == test.labels).double().mean().item()


SHORT_LD = (
    "--method ld --dataset digits --model ConvNetD1 --ipc 2 --Iteration 6 --eval_it 3 "
    "--num_eval 1 --epoch_eval_train 1 --compile off --run_name run --batch_target 50 "
    "--batch_syn 5 --restart_after 1 --lr_adam 0.1"
).split()


def distil(folder, *flags):
    """A short run; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT_LD, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc2/run"


@pytest.fixture(scope="module")
def ld_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("ld"))


def test_a_run_learns_labels_of_images_that_stay(ld_run):
    first, last = (SyntheticSet.load(ld_run / f"distilled_{tag}.pt") for tag in ("0", "last"))
    assert torch.equal(first.images, last.images)
    assert (first.soft_labels == 0.1).all() and not torch.equal(first.soft_labels, last.soft_labels)
    torch.testing.assert_close(last.soft_labels.sum(1), torch.ones(20))
    assert (last.label_form, first.train_steps) == ("probabilities", None)
    state = torch.load(ld_run / "checkpoint.pt", weights_only=True)["method"]
    assert state["noted"] and last.train_steps == train_steps(state)
    assert records(ld_run, "step")[-1]["network"] > 0
    assert not list(ld_run.glob("*ema*"))  # what does not move needs no average
    assert {record["set"] for record in records(ld_run, "eval")} == {"raw"}
    config = torch.load(ld_run / "distilled_last.pt", weights_only=True)["config"]
    assert not {"lr_img", "ema_decay", "mom_y", "syn_steps"} & set(config)


def test_it_is_evaluated_by_its_own_training_in_a_column_of_its_own(ld_run, capsys):
    flags = "--num_eval 1 --epoch_eval_train 2 --random".split()
    path = ld_run / "distilled_last.pt"
    assert evaluation_script.main(["--distilled", str(path), *flags]) == 0
    lines = [line[:27].strip() for line in capsys.readouterr().out.splitlines()]
    for name in ("raw, Adam steps", "raw, soft labels", "raw"):
        assert f"distilled {name}" in lines
    run = read_run(ld_run)
    sets = sorted(row["set"] for row in measured(run))
    assert sets == ["", "raw", "raw, Adam steps", "raw, soft labels"]
    assert run.method == "LD"


@pytest.mark.parametrize("unroll", ["adjoint", "autograd"])
def test_a_run_that_is_cut_off_goes_on_alike(tmp_path, monkeypatch, unroll):
    """The network, the moments of its Adam, its errors and the noted counts go on, too."""
    flags = ["--unroll", unroll]
    whole = distil(tmp_path / "whole", *flags)
    cut = assert_cut_off_goes_on_alike(lambda: distil(tmp_path / "cut", *flags), whole, monkeypatch)
    ours, theirs = (
        torch.load(run / "checkpoint.pt", weights_only=True)["method"] for run in (whole, cut)
    )
    assert torch.equal(ours.pop("state"), theirs.pop("state")) and ours == theirs


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--pix_init", "noise"], ["--pix_init noise", "ld", "real"]),
        (["--lr_img", "1"], ["--lr_img", "ld", "--lr_y"]),
        (["--mom_y", "0.5"], ["--mom_y", "ld"]),
        (["--soft_labels"], ["--soft_labels", "ld"]),
        (["--syn_steps", "2"], ["--syn_steps", "ld"]),
        (["--lr_inner", "0"], ["--lr_inner", "above 0"]),
        (["--lr_adam", "-1"], ["--lr_adam", "above 0"]),
        (["--restart_after", "0"], ["--restart_after", "at least 1"]),
        (["--ipc", "500"], ["--ipc 500", "training images"]),
        (["--method", "dd", "--lr_inner", "1"], ["--lr_inner", "dd"]),
        (["--method", "dm", "--lr_y", "1"], ["--lr_y", "dm"]),
        (["--method", "att", "--restart_after", "9"], ["--restart_after", "att"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    argv = ["--method", "ld", "--dataset", "digits", "--save_path", str(tmp_path)]
    with pytest.raises(UserError) as error:
        distill_att.main([*argv, *flags])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train_steps": 0}, "train_steps is not a whole number above 0"),
        ({"train_steps": 2.5}, "train_steps is not a whole number above 0"),
        ({"config": {"lr_adam": 0}}, "config.lr_adam is not a finite number above 0"),
        ({"config": {"lr_adam": None}}, "config.lr_adam is not"),
        ({"config": {"batch_syn": -1}}, "config.batch_syn is not"),
        ({"soft_labels": None}, "train_steps and lacks soft_labels"),
    ],
    ids=str,
)
def test_damaged_steps_are_named(ld_run, tmp_path, change, problem):
    content = torch.load(ld_run / "distilled_last.pt", weights_only=True)
    config = content["config"] | change.get("config", {})
    content |= change | {"config": config}
    if content["soft_labels"] is None:
        del content["soft_labels"], content["label_form"]
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(UserError, match=problem):
        SyntheticSet.load(tmp_path / "set.pt")


def test_images_are_those_of_other_methods(ld_run, tmp_path):
    """The same seed begins with the same real images, whatever learns from them."""
    flags = "--method dm --Iteration 0 --eval_it 0 --dataset digits --model ConvNetD1 --ipc 2"
    argv = [*flags.split(), "--save_path", str(tmp_path), "--run_name", "run"]
    assert distill_att.main(argv) == 0
    theirs = images(tmp_path / "digits/ConvNetD1/ipc2/run/distilled_0.pt")
    assert torch.equal(theirs, images(ld_run / "distilled_last.pt"))
