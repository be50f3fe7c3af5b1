"""Real images that rules choose: each rule against its definition, and what experts see."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from short_runs import save_expert, train_experts
from torch import nn
from torch.nn import functional as F

import eval as script
from networks import NETWORKS, build_network
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import Split, load_dataset
from utils.data.distilled import SyntheticSet
from utils.data.real_images import random_real_images
from utils.experts.buffer import ExpertBuffer
from utils.experts.features import ExpertFeatures
from utils.experts.files import read_file, snapshot
from utils.measure import protocol as evaluation
from utils.measure.selection import (
    SELECTIONS,
    forgetting,
    herding,
    k_center,
    lowest_loss,
    select,
)

EXPERT_RULES = ["herding", "k_center", "forgetting", "lowest_loss"]


def draw(*names):
    return stream(0, "test", *names)


def points(number, dims=3):
    return torch.randn(number, dims, generator=draw(number, dims), dtype=torch.float64)


def by_definition_herding(features, ipc):
    """iCaRL's Algorithm 4, without the scaling, and without choosing twice."""
    chosen = []
    for _ in range(ipc):
        left = [i for i in range(len(features)) if i not in chosen]
        off = features.mean(0) - torch.stack([features[[*chosen, i]].mean(0) for i in left])
        chosen.append(left[int(off.square().sum(1).argmin())])
    return chosen


def by_definition_k_center(features, ipc):
    """Algorithm 1 of Sener & Savarese, from all distances."""
    distances = torch.cdist(features, features).tolist()
    start = (features - features.mean(0)).square().sum(1).argmin()
    chosen = [int(start)]
    while len(chosen) < ipc:
        left = [i for i in range(len(features)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distances[i][j] for j in chosen)))
    return chosen


@pytest.mark.parametrize("number", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("rule", "by_definition"),
    [(herding, by_definition_herding), (k_center, by_definition_k_center)],
)
def test_rules_on_features_are_their_definitions(rule, by_definition, number):
    features = points(number)
    for ipc in {1, number // 2, number} - {0}:
        assert rule(features, ipc, draw()).tolist() == by_definition(features, ipc)


def test_herding_keeps_the_mean_and_k_center_reaches_the_ends():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]], dtype=torch.float64)  # mean 4
    assert herding(line, 3, draw()).tolist() == [3, 2, 1]  # means 3, 2.5 and 2
    assert k_center(line, 3, draw()).tolist() == [3, 4, 0]


@pytest.mark.parametrize("rule", [herding, k_center])
def test_equal_images_are_chosen_once_each(rule):
    assert sorted(rule(torch.ones(4, 2), 4, draw()).tolist()) == [0, 1, 2, 3]


def test_forgetting_draws_among_equals():
    right = torch.ones(50, 3, dtype=torch.bool)
    first, second = (forgetting(right, 10, draw(name)).tolist() for name in "ab")
    assert first == forgetting(right, 10, draw("a")).tolist()
    assert len(set(first)) == len(set(second)) == 10 and first != second


@pytest.mark.parametrize("number", range(5))
def test_forgetting_is_its_definition(number):
    right = torch.rand(30, 6, generator=draw(number)) < 0.5
    right[:4] = False

    def events(row):
        if not any(row):
            return float("inf")
        return sum(a and not b for a, b in itertools.pairwise(row))

    counts = [events(row) for row in right.tolist()]
    chosen = forgetting(right, 12, draw(number)).tolist()
    assert [counts[i] for i in chosen] == sorted(counts, reverse=True)[:12]


def test_lowest_loss_is_what_an_expert_finds_easiest(digits, tmp_path):
    features = make_expert_features(tmp_path, "MLP", size=8)
    train = digits.require_train()
    losses = features.losses(0, train)
    logits = features.logits(0, train.images)
    assert losses.shape == (len(train.labels), 1)
    torch.testing.assert_close(
        losses[:, 0], F.cross_entropy(logits, train.labels, reduction="none")
    )
    chosen = lowest_loss(losses, 7, draw("any")).tolist()
    assert chosen == sorted(range(len(losses)), key=lambda i: losses[i, 0].item())[:7]


def make_expert_features(folder, model, *, experts=1, epochs=1, size=32):
    """Experts of random parameters."""
    shape = {"channels": 1, "num_classes": 10, "image_size": size}
    for number in range(experts):
        networks = [build_network(model, **shape, seed=9 * number + n) for n in range(epochs + 1)]
        expert = [snapshot(network) for network in networks]
        save_expert(folder, number, expert, experts_per_file=10)
    network = build_network(model, **shape)
    return ExpertFeatures(ExpertBuffer(folder, [p.shape for p in network.parameters()]), network)


LARGE = {
    "ConvNetW512",
    "ConvNetW1024",
    "ConvNetD6",
    "ConvNetD7",
    "ConvNetD8",
}  # or for larger images


@pytest.mark.parametrize("model", sorted(set(NETWORKS) - LARGE))
def test_features_are_what_the_logits_are_made_of(tmp_path, model):
    """Of every network: the last two parameters make them the logits."""
    seen = make_expert_features(tmp_path, model)
    images = torch.randn(3, 1, 32, 32, generator=draw())
    features = seen.features(0, Split(images, torch.zeros(3, dtype=torch.int64)))
    state = read_file(tmp_path / "replay_buffer_0.pt")[0][-1]
    network = build_network(model, channels=1, num_classes=10, image_size=32)
    with torch.no_grad():
        for param, value in zip(network.parameters(), state, strict=True):
            param.copy_(value)
        assert features.shape == (3, seen.width)
        assert torch.allclose(F.linear(features, *state[-2:]), network(images), atol=1e-5)


def test_what_an_expert_sees_in_batches_of_any_size(digits, tmp_path, monkeypatch):
    """Features and answers against a network whose weights are set by hand, in float64."""
    seen = make_expert_features(tmp_path, "ConvNetD1", experts=2, epochs=3, size=8)
    train = digits.require_train()
    split = Split(train.images[:50].double(), train.labels[:50])
    whole = seen.features(1, split), seen.right_answers(1, split)
    monkeypatch.setattr("utils.experts.features.images_per_test_batch", lambda size: 7)
    assert torch.allclose(whole[0], seen.features(1, split), rtol=1e-12)
    assert torch.equal(whole[1], seen.right_answers(1, split))
    assert whole[0].dtype == torch.float64 and whole[1].shape == (50, 3)

    network = build_network("ConvNetD1", channels=1, num_classes=10, image_size=8).double()
    for epoch, snap in enumerate(read_file(tmp_path / "replay_buffer_0.pt")[1]):
        for param, value in zip(network.parameters(), snap, strict=True):
            param.data = value.double()
        if epoch > 0:
            right = network(split.images).argmax(1) == split.labels
            assert torch.equal(whole[1][:, epoch - 1], right)
    body = nn.Sequential(network.features, nn.Flatten())
    assert torch.allclose(whole[0], body(split.images), rtol=1e-12)


@pytest.fixture(scope="module")
def digits():
    """The first nine training images of each class."""
    data = load_dataset("digits")
    train = data.require_train()
    members = [(train.labels == label).nonzero().flatten()[:9] for label in range(10)]
    few = torch.cat(members)[torch.randperm(90, generator=draw())]
    return replace(data, train=Split(train.images[few], train.labels[few]))


def test_random_images_are_drawn_class_by_class_from_a_stream_for_each_network(digits):
    train = digits.require_train()
    drawn = select("random", digits, 2, networks=3, seed=5, expert_features=None)
    for k, images in enumerate(drawn):
        generator = stream(5, "random", k)
        for label, pair in enumerate(images.split(2)):
            of_class = train.images[train.labels == label]
            assert torch.equal(pair, of_class[torch.randperm(9, generator=generator)[:2]])
        assert torch.equal(images, random_real_images(digits, 2, stream(5, "random", k)))


@pytest.mark.parametrize("name", EXPERT_RULES)
def test_network_k_is_of_expert_k_modulo_their_number(digits, experts, name):
    shape = {"channels": 1, "num_classes": 10, "image_size": 8}
    network = build_network("ConvNetD1", **shape)
    buffer = ExpertBuffer(
        experts / "digits/ConvNetD1", [param.shape for param in network.parameters()]
    )
    expert_features, selection = ExpertFeatures(buffer, network), SELECTIONS[name]
    train = digits.require_train()
    drawn = select(name, digits, 3, networks=3, seed=4, expert_features=expert_features)
    for k, expert in enumerate([0, 1, 0]):
        described = selection.view(expert_features, expert, train)
        generator = stream(4, name, k)
        expected = []
        for label in range(10):
            members = (train.labels == label).nonzero().flatten()
            expected.append(members[selection.rule(described[members], 3, generator)])
        assert torch.equal(drawn[k], train.images[torch.cat(expected)])
    again = select(name, digits, 3, networks=3, seed=4, expert_features=expert_features)
    assert all(map(torch.equal, drawn, again))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", SELECTIONS)
def test_whole_classes_are_chosen_where_ipc_is_their_size(digits, tmp_path, name):
    expert_features, train = make_expert_features(tmp_path, "MLP", size=8), digits.require_train()
    (chosen,) = select(name, digits, 9, networks=1, seed=0, expert_features=expert_features)
    for label, images in enumerate(chosen.split(9)):
        everyone = train.images[train.labels == label]
        assert sorted(images.flatten(1).tolist()) == sorted(everyone.flatten(1).tolist())
    with pytest.raises(UserError, match="--ipc 10 is more than the 9 training images of class 0"):
        select(name, digits, 10, networks=1, seed=0, expert_features=expert_features)


@pytest.fixture
def argv(finished, tmp_path):
    """The call of eval.py on the set of a short run, with every image twice: ipc 2."""
    one = SyntheticSet.load(finished / "distilled_best.pt")
    images, labels = (each.repeat_interleave(2, 0) for each in (one.images, one.labels))
    two, path = replace(one, images=images, labels=labels, ipc=2), tmp_path / "distilled_best.pt"
    two.save(path, include_whitening=True)
    return ["--distilled", str(path), *"--model MLP --num_eval 3 --epoch_eval_train 2".split()]


FLAGS = [f"--{name}" for name in SELECTIONS]


def test_real_images_by_all_rules_beside_the_set(argv, tmp_path, capsys, monkeypatch):
    assert script.main([*argv, *FLAGS]) == 0
    entries = json.loads((tmp_path / "eval.json").read_text())
    names = ["distilled raw", "random real", "herding", "k-center", "forgetting", "lowest loss"]
    assert [entry["trained_on"] for entry in entries] == names
    assert {entry["lr"] for entry in entries[1:]} == {0.01}
    assert {entry["num_eval"] for entry in entries} == {3}
    assert len({entry["images"] for entry in entries}) == 6
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines[-7:-1]] == names

    monkeypatch.setattr(evaluation, "_train_networks", None)  # nothing is trained again
    assert script.main([*argv, *FLAGS]) == 0
    assert capsys.readouterr().out.count("(recorded before)") == 6
    assert json.loads((tmp_path / "eval.json").read_text()) == entries


@pytest.mark.parametrize("name", EXPERT_RULES)
def test_missing_experts_are_one_line_with_the_command(argv, tmp_path, monkeypatch, name):
    monkeypatch.setattr(script, "read_dataset", None)
    with pytest.raises(UserError) as error:
        script.main([*argv, f"--{name}", "--buffer_path", str(tmp_path / "none")])
    assert str(error.value) == (
        f"no expert buffers in {tmp_path}/none/digits/ConvNetD1; make them with: python buffer.py "
        f"--dataset digits --model ConvNetD1 --buffer_path {tmp_path}/none --data_path data"
    )


def test_experts_are_read_for_the_rules_that_ask_them_only(argv, tmp_path):
    none = ["--buffer_path", str(tmp_path / "none"), "--dry_run"]
    assert script.main([*argv, "--random", "--full", *none]) == 0


def test_experts_of_another_kind_are_none(finished, tmp_path):
    """Not those of another network, nor with whitening, where the set was made without."""
    other = train_experts(tmp_path / "b", 1, "--model", "MLP", "--train_epochs", "1")
    train_experts(other, 1, "--zca", "--train_epochs", "1")
    argv = ["--distilled", str(finished / "distilled_best.pt"), "--herding", "--dry_run"]
    with pytest.raises(UserError, match=r"no expert buffers in .*digits/ConvNetD1;"):
        script.main([*argv, "--buffer_path", str(other)])


def test_experts_are_flat_and_have_not_seen_what_is_held_out_as_those_of_the_set(
    finished, tmp_path
):
    one, path = SyntheticSet.load(finished / "distilled_best.pt"), tmp_path / "distilled_best.pt"
    config = {**one.config, "flat": True, "val_fraction": 0.1}
    replace(one, config=config, data=None).save(path, include_whitening=True)
    with pytest.raises(
        UserError, match=r"digits_FLAT_VAL0.1/ConvNetD1; .*--val_fraction 0.1 --flat"
    ):
        script.main(["--distilled", str(path), "--k_center"])


def test_a_damaged_expert_file_is_named_or_skipped(argv, experts, tmp_path):
    shutil.copytree(experts, tmp_path / "b")
    file = tmp_path / "b/digits/ConvNetD1/replay_buffer_0.pt"
    save_expert(file.parent, 10, read_file(file)[0], experts_per_file=10)
    file.write_bytes(file.read_bytes()[:-1000])
    call = [*argv, "--k_center", "--buffer_path", str(tmp_path / "b"), "--dry_run"]
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt .* or pass --skip_bad_buffers"):
        script.main(call)
    assert script.main([*call, "--skip_bad_buffers"]) == 0
