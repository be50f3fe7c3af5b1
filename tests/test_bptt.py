"""BPTT: its gradient is that of the whole training run, by hand, and a run goes on where it was."""

from functools import partial

import pytest
import torch
from numerics import relative_error
from short_runs import assert_cut_off_goes_on_alike, records
from torch.nn import functional as F

import distill_att
from networks import build_network
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.methods.bptt import RandomBatches
from utils.methods.real_loss import BackPropagation

SHAPE = {"channels": 1, "num_classes": 2, "image_size": 8}
LABELS = torch.tensor([0, 0, 1, 1])
RATE = torch.tensor(0.05, dtype=torch.float64)


def some(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)


IMAGES = some(4, 0)
TRAIN = Split(some(10, 1), torch.arange(10) % 2)


def fresh(seed, model="ConvNetD1"):
    return build_network(model, **SHAPE, seed=seed)


def make(*, window=4, random_length=False, **keywords):
    """Without DSA and with all images in each step, in which nothing but theta_0 is drawn."""
    settings = {
        "rate": "syn_lr",
        "inner_opt": "momentum",
        "students": 1,
        "batch_target": 100,
        "clip": 0.0,
    }
    course = RandomBatches(6, window, random_length, None, None, seed=0)
    network = partial(fresh, model=keywords.pop("model", "ConvNetD1"))
    return BackPropagation(network, TRAIN, LABELS, course, **settings | keywords)


def by_hand(method, iteration, length, window):
    """Six steps of momentum as a loop, whose loss is differentiated by torch."""
    flat = FlatNetwork(fresh(0))
    images, rate = IMAGES.clone().requires_grad_(), RATE.clone().requires_grad_()
    theta = method._theta_0(iteration).double().requires_grad_()
    velocity = torch.zeros_like(theta)
    for t in range(length):
        if t == length - window:
            theta, velocity = theta.detach().requires_grad_(), velocity.detach()
        (g,) = torch.autograd.grad(
            F.cross_entropy(flat(theta, images), LABELS), theta, create_graph=True
        )
        velocity = 0.9 * velocity + g
        theta = theta - rate * velocity
    loss = F.cross_entropy(flat(theta, TRAIN.images), TRAIN.labels)
    return loss.detach(), *torch.autograd.grad(loss, (images, rate))


def learned():
    return {"images": IMAGES, "syn_lr": RATE}


def assert_step(step, expected):
    found = step.loss, step.grads["images"], step.grads["syn_lr"]
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < 1e-9


@pytest.mark.parametrize("window", [1, 4, 6])
@pytest.mark.parametrize("way", [{"micro_batch": 3}, {"engine": "autograd"}], ids=str)
def test_the_gradient_is_that_of_the_loop(window, way):
    method = make(window=window, **way)
    assert_step(method.step(2, learned()), by_hand(method, 2, 6, window))


@pytest.mark.slow
def test_one_student_that_remembers_is_compiled():
    method = make(execution=Execution(compiled=True))
    assert_step(method.step(2, learned()), by_hand(method, 2, 6, 4))


def test_lengths_are_drawn_from_the_window_on():
    method = make(random_length=True)
    steps = [method.step(iteration, learned()) for iteration in range(12)]
    lengths = [step.record["length"] for step in steps]
    assert set(lengths) == {4, 5, 6}
    assert_step(steps[3], by_hand(method, 3, lengths[3], 4))


@pytest.mark.parametrize("execution", [Execution(), Execution(vectorised=True)], ids=str)
def test_several_students_give_the_mean(execution):
    alone = make()
    parts = [alone.step(2 * 3 + k, learned()) for k in range(3)]
    together = make(students=3, execution=execution).step(2, learned())
    mean = [sum(part.loss for part in parts) / 3]
    mean += [sum(part.grads[name] for part in parts) / 3 for name in ("images", "syn_lr")]
    assert_step(together, mean)


def test_the_target_is_a_batch_of_different_images():
    x, y = make(batch_target=4)._target.draw(1)
    again, _ = make(batch_target=4)._target.draw(2)
    assert len(x) == len(y) == 4
    assert len(torch.unique(x.flatten(1), dim=0)) == 4 and not torch.equal(x, again)


def test_gradients_are_clipped_by_their_moving_average():
    method = make(clip=2.0)
    assert [method._clipping(norm) for norm in (1.0, 1.9, 10.0)] == [1.0, 1.0, pytest.approx(0.218)]
    assert method.state_dict()["norm"] == pytest.approx(0.9 * 1.09 + 0.1 * 2.18)
    assert make(clip=0.0)._clipping(1e9) == 1.0
    other = make(clip=2.0)
    other.load_state_dict(method.state_dict())
    assert other._clipping(100.0) == method._clipping(100.0) < 1


SHORT_BPTT = (
    "--method bptt --dataset digits --model ConvNetD1 --ipc 1 --Iteration 4 --eval_it 2 "
    "--num_eval 1 --epoch_eval_train 1 --compile off --run_name run --syn_steps 4 --window 2 "
    "--random_length --clip 0.5 --batch_target 50"
).split()


def distil(folder, *flags):
    """A short run; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT_BPTT, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc1/run"


@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_a_run_that_is_cut_off_goes_on_alike(tmp_path, monkeypatch, inner):
    """The optimiser's moments and the moving average of the gradient's length go on, too."""
    flags = ["--inner_opt", inner]
    whole = distil(tmp_path / "whole", *flags)
    assert any(step["clipped"] for step in records(whole, "step"))
    run = assert_cut_off_goes_on_alike(lambda: distil(tmp_path / "cut", *flags), whole, monkeypatch)
    rate = torch.load(run / "distilled_last.pt", weights_only=True)["syn_lr"]
    assert (rate == 0.01) == (inner == "adam")  # Adam's is no rate for evaluation networks


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--window", "9"], ["--window 9", "--syn_steps"]),
        (["--random_length"], ["--random_length", "--window"]),
        (["--expert_epochs", "2"], ["--expert_epochs", "bptt"]),
        (["--soft_labels"], ["--soft_labels", "bptt"]),
        (["--pix_init", "samples_predicted_correctly"], ["--pix_init", "bptt", "noise"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    argv = "--method bptt --dataset digits --ipc 1 --syn_steps 8".split()
    with pytest.raises(UserError) as error:
        distill_att.main([*argv, *flags, "--save_path", str(tmp_path)])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)
