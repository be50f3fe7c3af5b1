"""Soft labels: what they begin with, how they are learned, saved and evaluated."""

from types import SimpleNamespace

import pytest
import torch
from short_runs import assert_cut_off_goes_on_alike, distill, images, records
from torch.nn import functional as F

import distill_att
import eval as evaluation_script
from scripts.results.evaluations import measured
from scripts.results.runs import read_run
from utils.compute.labels import cross_entropy, likeliest
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.data.distilled import SyntheticSet
from utils.measure.protocol import Protocol, evaluate
from utils.methods.base import Learned, Step
from utils.methods.outer_state import OuterState
from utils.methods.trajectory.labels import (
    images_that_experts_get_right,
    logits_of_right_experts,
)

SOFT = ["--soft_labels", "--pix_init", "samples_predicted_correctly", "--lr_y", "1"]


def test_the_loss_of_logits_and_probabilities():
    logits, labels = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = -(labels.softmax(1) * logits.log_softmax(1)).sum() / 5
    torch.testing.assert_close(cross_entropy(logits, labels, "logits"), expected)
    torch.testing.assert_close(cross_entropy(logits, labels.softmax(1), "probabilities"), expected)
    classes = labels.argmax(1)
    assert torch.equal(cross_entropy(logits, classes), F.cross_entropy(logits, classes))
    assert torch.equal(likeliest(labels, "logits"), classes)


class Said:
    """Experts that say what `logits` (experts, N, C) hold, by the number that is an image."""

    def __init__(self, logits):
        self.all_logits, self.experts = logits, range(len(logits))

    def logits(self, expert, numbers):
        return self.all_logits[expert, numbers.flatten().long()]


def one_hot(answers):
    return 4.0 * F.one_hot(torch.tensor(answers), 2).double()


def numbered(labels):
    train = Split(torch.arange(len(labels)).double().view(-1, 1, 1, 1), torch.tensor(labels))
    return SimpleNamespace(require_train=lambda: train, num_classes=2, class_names=("a", "b"))


def test_images_are_those_that_experts_get_right_in_turn():
    """Expert 0 knows images 1 and 5, expert 1 also 2 and 4; nobody 0, 3."""
    labels = [0, 0, 0, 1, 1, 1]
    first, second = [1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]
    experts = Said(torch.stack([one_hot(first), one_hot(second)]))
    for ipc, of_a, of_b in ((1, [1], [5]), (2, [1, 2], [5, 4]), (3, [1, 2, 0], [5, 4, 3])):
        chosen = images_that_experts_get_right(numbered(labels), ipc, experts, seed=0).tolist()
        assert chosen == of_a + of_b
    with pytest.raises(UserError, match="--ipc 4"):
        images_that_experts_get_right(numbered(labels), 4, experts, seed=0)


def test_labels_are_the_mean_logits_of_experts_that_are_right():
    said = torch.randn(3, 4, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    said[:, 0] = torch.tensor([-1.0, 1.0])  # nobody is right: the mean of all
    said[:2, 1] = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    found = logits_of_right_experts(Said(said), torch.arange(4.0), labels)
    for number, label in enumerate(labels):
        right = [each[number] for each in said if each[number].argmax() == label]
        expected = torch.stack(right or [each[number] for each in said]).mean(0)
        torch.testing.assert_close(found[number], expected)


def test_a_step_that_is_skipped_changes_nothing():
    state = OuterState(
        [Learned("images", torch.ones(2, 1, 2, 2), 1.0, "lr_img")],
        syn_lr=0.1,
        ema_decay=0.9,
        if_not_finite="",
    )
    step = Step(torch.tensor(1.0), {"images": torch.ones(2, 1, 2, 2)}, {})
    state.update(step)
    before = [state.images.clone(), state.ema_images.clone()]
    state.update(Step(step.loss, step.grads, {}, is_skipped=True))
    assert state.iteration == 2
    assert all(map(torch.equal, (state.images, state.ema_images), before))


def test_momenta_are_those_of_each():
    learned = [
        Learned("images", torch.zeros(1), 1.0, "lr_img"),
        Learned("labels", torch.zeros(1), 1.0, "lr_y", momentum=0.9),
    ]
    state = OuterState(learned, syn_lr=0.1, ema_decay=0.9, if_not_finite="")
    for _ in range(2):
        grads = {"images": torch.ones(1), "labels": torch.ones(1)}
        state.update(Step(torch.tensor(1.0), grads, {}))
    assert state.images.item() == pytest.approx(-2.5)
    assert state.learned["labels"].item() == pytest.approx(-2.9)


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_networks_train_on_soft_labels(form):
    """Sharp ones are the classes."""
    torch.manual_seed(0)
    train = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    test = Split(torch.randn(40, 1, 8, 8, dtype=torch.float64), torch.arange(40) % 2)
    classes = torch.tensor([0, 1])
    sharp = F.one_hot(classes, 2).double() * (1 if form == "probabilities" else 1e3)
    keywords = {
        "num_classes": 2,
        "model": "ConvNetD1",
        "lr": 0.01,
        "protocol": Protocol(num_eval=2, epochs=4, batch_size=2, dsa_groups=None),
        "seed": 0,
    }
    hard = evaluate(train, classes, test, **keywords)
    soft = evaluate(train, sharp, test, label_form=form, **keywords)
    assert soft.accs == hard.accs
    blurred = evaluate(train, sharp.flip(1), test, label_form=form, **keywords)
    assert blurred.accs != hard.accs


@pytest.fixture(scope="module")
def soft_run(experts, tmp_path_factory):
    return distill(experts, tmp_path_factory.mktemp("soft"), *SOFT)


def test_a_run_learns_and_saves_them(soft_run):
    first, last = (SyntheticSet.load(soft_run / f"distilled_{tag}.pt") for tag in ("0", "last"))
    assert last.label_form == "logits" and last.soft_labels.shape == (10, 10)
    assert not torch.equal(first.soft_labels, last.soft_labels)
    assert torch.equal(last.labels, torch.arange(10))
    assert {record["labels"] for record in records(soft_run, "eval")} == {"soft"}


def test_a_run_that_is_cut_off_goes_on_alike(soft_run, experts, tmp_path, monkeypatch):
    assert_cut_off_goes_on_alike(lambda: distill(experts, tmp_path, *SOFT), soft_run, monkeypatch)


def test_soft_and_hard_stand_beside_each_other_and_never_in_one_column(soft_run, capsys):
    flags = ["--distilled", str(soft_run / "distilled_best.pt"), "--num_eval", "1"]
    flags += ["--epoch_eval_train", "2"]
    assert evaluation_script.main([*flags, "--no_random", "--no_hard_labels"]) == 0
    alone = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [line.split("  ")[0] for line in alone] == ["distilled raw, soft labels"]
    assert evaluation_script.main(flags) == 0  # random images and the classes beside them
    said = capsys.readouterr().out
    assert "distilled raw, soft labels" in said and "random real" in said
    run = read_run(soft_run)
    sets = [row["set"] for row in measured(run)]
    assert sorted(sets) == ["", "ema, soft labels", "raw", "raw, soft labels"]
    assert run.method == "ATT + soft labels"


def test_steps_above_a_loss_are_skipped(experts, tmp_path):
    run = distill(experts, tmp_path, "--skip_above", "1e-9")
    assert all(step["skipped"] for step in records(run, "step"))
    assert torch.equal(images(run / "distilled_0.pt"), images(run / "distilled_last.pt"))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--lr_y", "3"], ["--lr_y", "--soft_labels"]),
        (["--method", "dm", "--soft_labels"], ["--soft_labels", "dm"]),
    ],
)
def test_settings_of_labels_that_are_not_learned_are_refused(flags, parts, tmp_path):
    with pytest.raises(UserError) as error:
        distill_att.main(["--dataset", "digits", *flags, "--save_path", str(tmp_path)])
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"soft_labels": torch.rand(10, 3)}, "soft labels"),
        ({"label_form": "words"}, "label_form"),
        ({"label_form": "probabilities"}, "no probabilities"),
        ({"soft_labels": None}, "soft_labels"),
    ],
)
def test_a_damaged_set_is_named(soft_run, tmp_path, change, problem):
    content = torch.load(soft_run / "distilled_last.pt", weights_only=True) | change
    if content["soft_labels"] is None:
        del content["soft_labels"]
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(UserError, match=problem):
        SyntheticSet.load(tmp_path / "set.pt")
