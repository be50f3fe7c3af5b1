"""What an outer step draws: segments, chunks, augmentation."""

from collections import Counter

import pytest
import torch

from networks import build_network
from utils.expert_buffer import ExpertBuffer, save_expert, snapshot
from utils.flat_params import FlatNetwork
from utils.matching import Matcher, draw_problem
from utils.trajectory_length import DISTANCES, att
from utils.unroll import adjoint

SHAPE = {"channels": 1, "num_classes": 2, "image_size": 8}


def tiny_network(seed):
    return build_network("ConvNetW32", **SHAPE, seed=seed)


@pytest.fixture()
def matcher(tmp_path):
    """Three experts of three epochs, whose snapshots are random networks."""
    for number in range(3):
        expert = [snapshot(tiny_network(10 * number + epoch)) for epoch in range(4)]
        save_expert(tmp_path, number, expert, experts_per_file=2)
    network = FlatNetwork(tiny_network(0))
    return Matcher(
        network,
        ExpertBuffer(tmp_path, network.shapes),
        torch.tensor([0, 1]),
        syn_steps=2,
        expert_epochs=1,
        max_start_epoch=2,
        batch_syn=None,
        dsa_groups=("flip", "color"),
        engine=adjoint,
        distance=DISTANCES["l2"],
        policy=att,
        seed=0,
    )


def test_every_expert_is_seen_once_a_pass_in_changing_order(matcher):
    passes = [[matcher._draw_segment(3 * p + i)[0] for i in range(3)] for p in range(8)]
    assert all(sorted(order) == [0, 1, 2] for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_start_epochs_are_uniform_below_max_start_epoch(matcher):
    starts = Counter(matcher._draw_segment(iteration)[1] for iteration in range(400))
    assert set(starts) == {0, 1}
    assert 150 < starts[0] < 250


def test_an_iteration_can_be_repeated_exactly(matcher):
    images, syn_lr = torch.randn(2, 1, 8, 8), torch.tensor(0.01)
    first, start = matcher.match(5, images, syn_lr)
    again, start_again = matcher.match(5, images, syn_lr)
    other, _ = matcher.match(6, images, syn_lr)
    assert start == start_again
    assert torch.equal(first.grad_images, again.grad_images)
    assert not torch.equal(first.grad_images, other.grad_images)


def test_the_segment_runs_from_the_start_epoch_over_expert_epochs(matcher):
    """With a rate of zero the student stays, so J is 1 whatever the target: check the distance."""
    expert, start = matcher._draw_segment(4)
    matching, _ = matcher.match(4, torch.randn(2, 1, 8, 8), torch.tensor(0.0))
    theta_0, theta_star = (matcher.experts.params(expert, e) for e in (start, start + 1))
    assert matching.loss.item() == pytest.approx(1.0)
    torch.testing.assert_close(matching.distances[0], (theta_0 - theta_star).square().sum())


def draw(**changes):
    arguments = {
        "syn_steps": 6,
        "batch_syn": 4,
        "dsa_groups": None,
        "generator": torch.Generator().manual_seed(0),
    } | changes
    labels = torch.arange(10)
    return draw_problem(None, torch.zeros(1), torch.ones(1), labels, **arguments), labels


def test_chunks_are_those_of_permutations():
    problem, labels = draw()
    chunks = [batch.indices for batch in problem.batches]
    assert [len(chunk) for chunk in chunks] == [4, 4, 2] * 2
    for a_pass in (chunks[:3], chunks[3:]):
        assert sorted(torch.cat(a_pass).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(chunks[:3]), torch.cat(chunks[3:]))
    for chunk, y in zip(chunks, problem.labels, strict=True):
        assert torch.equal(y, labels[chunk])


@pytest.mark.parametrize("batch_syn", [None, 10, 11])
def test_without_smaller_batches_every_step_sees_all_images(batch_syn):
    problem, labels = draw(batch_syn=batch_syn)
    images = torch.randn(10, 1, 8, 8)
    for batch, y in zip(problem.batches, problem.labels, strict=True):
        assert torch.equal(batch(images), images)
        assert torch.equal(y, labels)


def test_each_step_has_its_own_augmentation():
    problem, _ = draw(dsa_groups=("flip", "color", "rotate"))
    assert len({batch.augmentation.group for batch in problem.batches}) > 1
    numbers = [batch.augmentation.u[0, 0].item() for batch in problem.batches]
    assert len(set(numbers)) == len(numbers)
