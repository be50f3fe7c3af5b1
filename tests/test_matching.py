"""What an outer step draws (segments, chunks, augmentation), and how it goes about the work."""

import logging
from collections import Counter
from itertools import count, pairwise

import pytest
import torch
from short_runs import save_expert

from networks import build_network
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.core.errors import UserError
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import snapshot
from utils.methods.trajectory import matching, method
from utils.methods.trajectory.lengths import DISTANCES, LENGTH_POLICIES
from utils.methods.trajectory.matching import Objective
from utils.methods.trajectory.method import Sampling, TrajectoryMatching
from utils.methods.trajectory.starts import StartEpochs
from utils.methods.unroll.problem import draw_problem

SHAPE = {"channels": 1, "num_classes": 2, "image_size": 8}
LABELS = torch.tensor([0, 0, 1, 1])
SYN_LR = torch.tensor(0.01, dtype=torch.float64)
DSA = parse_strategy(DSA_STRATEGY)


def tiny_network(seed):
    return build_network("ConvNetW32", **SHAPE, seed=seed)


def some_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)


def write_experts(folder, *, still=()):
    """Three experts of three epochs, whose snapshots are random networks; some do not move."""
    for number in range(3):
        expert = [snapshot(tiny_network(10 * number + epoch)) for epoch in range(4)]
        if number in still:
            expert = [expert[0]] * 4
        save_expert(folder, number, expert, experts_per_file=2)


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def make_matcher(path, *, length="att", batch_syn=3, dsa_groups=DSA, **keywords):
    network = FlatNetwork(tiny_network(0))
    return TrajectoryMatching(
        network,
        ExpertBuffer(path, network.shapes),
        LABELS,
        Sampling(
            syn_steps=3,
            expert_epochs=1,
            start_epochs=StartEpochs(2),
            batch_syn=batch_syn,
            dsa_groups=dsa_groups,
            seed=0,
        ),
        Objective(DISTANCES["l2"], LENGTH_POLICIES[length]),
        **keywords,
    )


@pytest.fixture
def matcher(experts_path):
    return make_matcher(experts_path)


def assert_close(outcome, expected):
    assert outcome.lengths == expected.lengths
    for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
        value, reference = getattr(outcome, name), getattr(expected, name)
        assert value.shape == reference.shape, name
        assert ((value - reference).norm() / reference.norm()).item() < 1e-9, name


def assert_equal(outcome, expected):
    assert outcome.lengths == expected.lengths
    for name in ("loss", "distances", "grad_images", "grad_syn_lr"):
        assert torch.equal(getattr(outcome, name), getattr(expected, name)), name


def test_every_expert_is_seen_once_a_pass_in_changing_order(matcher):
    passes = [[matcher._draw_segment(3 * p + i)[0] for i in range(3)] for p in range(8)]
    assert all(sorted(order) == [0, 1, 2] for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_start_epochs_are_uniform_below_max_start_epoch(matcher):
    starts = Counter(matcher._draw_segment(number)[1] for number in range(400))
    assert set(starts) == {0, 1}
    assert 150 < starts[0] < 250


def test_an_iteration_can_be_repeated_exactly(matcher, experts_path):
    images = some_images()
    first, starts = matcher.match(5, images, SYN_LR)
    again, starts_again = matcher.match(5, images, SYN_LR)
    elsewhere, _ = make_matcher(experts_path).match(5, images, SYN_LR)
    other, _ = matcher.match(6, images, SYN_LR)
    assert starts == starts_again
    assert_equal(again, first)
    assert_equal(elsewhere, first)
    assert not torch.equal(first.grad_images, other.grad_images)


def test_the_segment_runs_from_the_start_epoch_over_expert_epochs(matcher):
    """With a rate of zero the student stays, so J is 1 whatever the target: check the distance."""
    expert, start = matcher._draw_segment(4)
    outcome, starts = matcher.match(4, some_images(), torch.zeros_like(SYN_LR))
    theta_0, theta_star = (matcher.experts.params(expert, e).double() for e in (start, start + 1))
    assert starts == [start]
    assert outcome.loss.item() == pytest.approx(1.0)
    assert outcome.distances.shape == (1, 3)
    torch.testing.assert_close(outcome.distances[0, 0], (theta_0 - theta_star).square().sum())


@pytest.mark.parametrize("unroll", ["adjoint", "autograd"])
@pytest.mark.parametrize("batch_syn", [None, 3])
def test_several_trajectories_are_averaged(experts_path, unroll, batch_syn):
    """Trajectory j of iteration i draws what is drawn alone as number i K + j."""
    iteration, k, images = 2, 3, some_images()
    several = make_matcher(experts_path, trajectories=k, engine=unroll, batch_syn=batch_syn)
    outcome, starts = several.match(iteration, images, SYN_LR)
    single = make_matcher(experts_path, batch_syn=batch_syn)
    alone = [single.match(iteration * k + j, images, SYN_LR) for j in range(k)]
    assert starts == [start for _, (start,) in alone]
    assert outcome.lengths == [length for one, _ in alone for length in one.lengths]
    torch.testing.assert_close(
        outcome.distances, torch.cat([one.distances for one, _ in alone]), rtol=1e-9, atol=0
    )
    for name in ("loss", "grad_images", "grad_syn_lr"):
        mean = sum(getattr(one, name) for one, _ in alone) / k
        value = getattr(outcome, name)
        assert ((value - mean).norm() / mean.norm()).item() < 1e-9, name


def test_trajectories_that_are_computed_together_give_the_same(experts_path):
    images = some_images()
    one_by_one = make_matcher(experts_path, trajectories=2)
    together = make_matcher(experts_path, trajectories=2, execution=Execution(vectorised=True))
    assert_close(together.match(1, images, SYN_LR)[0], one_by_one.match(1, images, SYN_LR)[0])


@pytest.mark.parametrize("length", ["att", "fixed"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_both_engines_give_the_same(experts_path, length, micro_batch):
    images = some_images()
    full_graph = make_matcher(experts_path, length=length, engine="autograd")
    swept = make_matcher(experts_path, length=length, micro_batch=micro_batch)
    for iteration in (0, 1):
        expected, starts = full_graph.match(iteration, images, SYN_LR)
        outcome, starts_too = swept.match(iteration, images, SYN_LR)
        assert starts == starts_too
        assert_close(outcome, expected)


def test_each_engine_is_the_one_that_was_asked_for(experts_path, monkeypatch):
    called = []
    for name in ("match_by_adjoint", "match_by_autograd"):
        engine = getattr(matching, name)

        def noted(*arguments, name=name, engine=engine, **keywords):
            called.append(name)
            return engine(*arguments, **keywords)

        monkeypatch.setattr(method, name, noted)
    for name in ("autograd", "adjoint"):
        make_matcher(experts_path, engine=name).match(0, some_images(), SYN_LR)
    assert called == ["match_by_autograd", "match_by_adjoint"]


def test_the_next_problem_is_drawn_ahead_and_is_the_same(experts_path):
    images, drawn = some_images(), []
    ahead = make_matcher(experts_path)
    draw = ahead._draw

    def noted(iteration, images):
        drawn.append(iteration)
        return draw(iteration, images)

    ahead._draw = noted
    for iteration in (5, 6, 2):
        outcome, starts = ahead.match(iteration, images + iteration, SYN_LR)
        at_once, starts_at_once = make_matcher(experts_path).match(
            iteration, images + iteration, SYN_LR
        )
        assert starts == starts_at_once
        assert_equal(outcome, at_once)
    ahead._ahead[1].result()  # wait for the last
    assert drawn == [5, 6, 7, 2, 3]


def test_a_bad_expert_is_reported_when_its_turn_comes(tmp_path):
    write_experts(tmp_path, still=[2])
    bad = make_matcher(tmp_path)
    order = [bad._draw_segment(number)[0] for number in range(12)]
    turn = next(i for i, (before, now) in enumerate(pairwise(order), 1) if before != 2 == now)
    assert bad.match(turn - 1, some_images(), SYN_LR)[0].loss.isfinite()
    with pytest.raises(UserError, match=r"expert 2 .* is the same after"):
        bad.match(turn, some_images(), SYN_LR)
    with pytest.raises(UserError, match=r"expert 2 .* is the same after"):  # drawn ahead or not
        bad.match(turn, some_images(), SYN_LR)
    later = next(i for i in count(turn) if bad._draw_segment(i)[0] != 2)
    assert bad.match(later, some_images(), SYN_LR)[0].loss.isfinite()


def short_of_memory(monkeypatch, fits):
    """The engine runs out of memory where a piece has more than `fits` images; its calls."""
    sizes = []

    def engine(*arguments, micro_batch, **keywords):
        sizes.append(micro_batch)
        if micro_batch is None or micro_batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return matching.match_by_adjoint(*arguments, micro_batch=micro_batch, **keywords)

    monkeypatch.setattr(method, "match_by_adjoint", engine)
    return sizes


@pytest.mark.parametrize("start", [None, 4, 99])
def test_where_memory_runs_out_the_pieces_are_halved(experts_path, monkeypatch, caplog, start):
    images = some_images()
    enough = make_matcher(experts_path, batch_syn=None)
    expected = [enough.match(iteration, images, SYN_LR)[0] for iteration in (0, 1)]
    sizes = short_of_memory(monkeypatch, fits=1)
    short = make_matcher(experts_path, batch_syn=None, micro_batch=start)
    with caplog.at_level(logging.WARNING):
        for iteration, reference in enumerate(expected):
            assert_close(short.match(iteration, images, SYN_LR)[0], reference)
    assert sizes == [start, 2, 1, 1]  # and stay so
    assert short.micro_batch == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "--micro_batch 2" in messages[0]
    assert "--micro_batch 1" in messages[1]


def test_halving_several_trajectories_gives_the_same(experts_path, monkeypatch):
    images = some_images()
    expected = make_matcher(experts_path, trajectories=2).match(0, images, SYN_LR)[0]
    sizes = short_of_memory(monkeypatch, fits=2)
    outcome = make_matcher(experts_path, trajectories=2).match(0, images, SYN_LR)[0]
    assert sizes == [None, 1]  # of 3 images
    assert_close(outcome, expected)


def test_without_memory_for_one_image_the_user_is_told(experts_path, monkeypatch):
    sizes = short_of_memory(monkeypatch, fits=0)
    short = make_matcher(experts_path, batch_syn=None)
    with pytest.raises(UserError, match="out of memory even at --micro_batch 1") as error:
        short.match(0, some_images(), SYN_LR)
    assert "\n" not in str(error.value)
    assert sizes == [None, 2, 1]


NUMBERED = torch.arange(10.0, dtype=torch.float64)


def draw(k=1, **changes):
    """A problem whose images, 1x1, are their numbers, and so are their labels."""
    arguments = {
        "syn_steps": 6,
        "batch_syn": 4,
        "dsa_groups": None,
        "generators": [torch.Generator().manual_seed(j) for j in range(k)],
    } | changes
    images = NUMBERED.view(10, 1, 1, 1)
    thetas = torch.zeros(k, 1), torch.ones(k, 1)
    return draw_problem(*thetas, images[0], count=10, **arguments), images


@pytest.mark.parametrize("k", [1, 3])
def test_chunks_are_those_of_permutations(k):
    problem, images = draw(k)
    xs, ys = problem.batches(images, range(6)), problem.labels(torch.arange(10))
    assert problem.syn_steps == len(xs) == 6
    assert problem.batch_sizes == [4, 4, 2] * 2
    assert [x.shape for x in xs] == [(k, size, 1, 1, 1) for size in problem.batch_sizes]
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x.flatten(1).long(), y)
    orders = [
        tuple(torch.cat([y[j] for y in ys[start : start + 3]]).tolist())
        for j in range(k)
        for start in (0, 3)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 2 * k


def test_a_student_depends_on_its_generator_alone():
    together, images = draw(3, dsa_groups=("color",))
    for j in range(3):
        alone, _ = draw(1, dsa_groups=("color",), generators=[torch.Generator().manual_seed(j)])
        for x, single in zip(
            together.batches(images, range(6)), alone.batches(images, range(6)), strict=True
        ):
            torch.testing.assert_close(x[j], single[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_syn", [None, 10, 11])
def test_without_smaller_batches_every_step_sees_all_images_in_order(batch_syn):
    problem, images = draw(2, batch_syn=batch_syn)
    ys = problem.labels(torch.arange(10))
    assert problem.batch_sizes == [10] * 6
    for x, y in zip(problem.batches(images, range(6)), ys, strict=True):
        assert torch.equal(x, torch.stack([images, images]))
        assert torch.equal(y, torch.arange(10).repeat(2, 1))


def test_each_step_has_its_own_augmentation():
    problem, _ = draw(syn_steps=12, batch_syn=None, dsa_groups=("color", "cutout", "rotate"))
    images = torch.rand(10, 3, 8, 8, dtype=torch.float64)
    xs = problem.batches(images, range(12))
    for t, x in enumerate(xs):
        assert not torch.equal(x[0], images)
        assert not any(torch.equal(x, other) for other in xs[t + 1 :])
        for row, same in zip(x[0], problem.batches(images, range(t, t + 1))[0][0], strict=True):
            torch.testing.assert_close(row, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [range(0, 6), range(1, 4), range(5, 6)])
def test_any_range_of_steps_can_be_made(steps):
    problem, images = draw(2, dsa_groups=("color",))
    every = problem.batches(images, range(6))
    for t, x in zip(steps, problem.batches(images, steps), strict=True):
        torch.testing.assert_close(x, every[t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("batch_syn", [None, 4])
def test_the_shares_of_processes_are_the_batches(world, batch_syn):
    whole, images = draw(2, batch_syn=batch_syn, dsa_groups=("color", "flip"))
    parts = [
        draw(2, batch_syn=batch_syn, dsa_groups=("color", "flip"), share=(rank, world))[0]
        for rank in range(world)
    ]
    made = [part.batches(images, range(6)) for part in parts]
    labels = [part.labels(torch.arange(10)) for part in parts]
    whole_labels = whole.labels(torch.arange(10))
    for t, x in enumerate(whole.batches(images, range(6))):
        joined = torch.cat([xs[t] for xs in made], 1)
        torch.testing.assert_close(joined, x, rtol=0, atol=1e-12)
        assert torch.equal(torch.cat([ys[t] for ys in labels], 1), whole_labels[t])
    assert all(part.batch_sizes == whole.batch_sizes for part in parts)
