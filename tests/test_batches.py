"""What batches see, and that those made together are those made one by one, in float64."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from utils.compute import batches
from utils.compute.batches import Batches, Draw, alike, draw_batches, steps_per_block
from utils.data import augment
from utils.data.augment import DSA_STRATEGY, parse_strategy

GROUPS = parse_strategy(DSA_STRATEGY)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_draws(
    steps: int,
    *,
    count: int = 10,
    size: int = 4,
    groups: tuple[str, ...] | None = GROUPS,
    seed: int = 0,
    first: int = 0,
) -> list[Draw]:
    numbers = torch.arange(first, first + count)
    return list(islice(draw_batches(numbers, size, groups, generator(seed)), steps))


def for_networks(k: int, steps: int, **keywords) -> list[list[Draw]]:
    """drawn[step][network], each network with a generator of its own."""
    plans = [some_draws(steps, seed=j, **keywords) for j in range(k)]
    return [list(step) for step in zip(*plans, strict=True)]


def some_images(count: int = 10) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=generator(5), dtype=torch.float64)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_batches_are_those_of_endless_permutations(groups):
    draws = some_draws(12, groups=groups)
    assert [len(draw) for draw in draws] == [4, 4, 2] * 4
    assert [len(draw.indices) for draw in draws] == [4, 4, 2] * 4
    passes = [torch.cat([d.indices for d in draws[i : i + 3]]).tolist() for i in (0, 3, 6, 9)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    other = torch.cat([draw.indices for draw in some_draws(3, groups=groups, seed=1)]).tolist()
    assert other != passes[0]


def test_a_pass_that_divides_evenly_has_no_empty_batch():
    assert [len(draw) for draw in some_draws(5, count=8)] == [4] * 5
    assert [len(draw) for draw in some_draws(3, count=3)] == [3] * 3


def test_indices_begin_at_first():
    here, there = some_draws(6), some_draws(6, first=20)
    for draw, shifted in zip(here, there, strict=True):
        assert torch.equal(draw.indices + 20, shifted.indices)
        assert torch.equal(draw.augmentation.u, shifted.augmentation.u)


def test_each_batch_has_its_own_augmentation():
    draws = some_draws(60)
    assert {draw.augmentation.group for draw in draws} == set(GROUPS)
    assert all(len(draw.augmentation.u) == len(draw) for draw in draws)
    numbers = [u for draw in draws for u in draw.augmentation.u[:, 0].tolist()]
    assert len(set(numbers)) == len(numbers)
    assert all(draw.augmentation is None for draw in some_draws(3, groups=None))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_shards_of_a_batch_are_the_batch(world, groups):
    for draw in some_draws(6, groups=groups):
        parts = [draw.shard(rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.indices for part in parts]), draw.indices)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        if groups is None:
            assert all(part.augmentation is None for part in parts)
            continue
        assert {part.augmentation.group for part in parts} == {draw.augmentation.group}
        assert [len(part.augmentation.u) for part in parts] == sizes
        joined = torch.cat([part.augmentation.u for part in parts])
        assert torch.equal(joined, draw.augmentation.u)


def one_by_one(images: Tensor, drawn: list[list[Draw]]) -> list[Tensor]:
    return [
        torch.stack([augment.apply(images[draw.indices], draw.augmentation) for draw in step])
        for step in drawn
    ]


def mixed(k: int, **keywords) -> list[list[Draw]]:
    """Ten passes of 4, 4 and 2 images, with all groups mixed."""
    return for_networks(k, 30, **keywords)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("groups", [None, GROUPS, *((group,) for group in GROUPS)], ids=str)
def test_batches_made_together_are_those_made_one_by_one(k, groups):
    drawn, images = mixed(k, groups=groups), some_images()
    if groups is not None:
        assert {draw.augmentation.group for step in drawn for draw in step} == set(groups)
    made = Batches(drawn, CPU).images(images)
    assert [x.shape[:2] for x in made] == [(k, 4), (k, 4), (k, 2)] * 10
    for x, expected in zip(made, one_by_one(images, drawn), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


def test_labels_go_with_their_images():
    drawn = mixed(3)
    labels = 100 + torch.arange(10)
    made = Batches(drawn, CPU).labels(labels)
    for y, step in zip(made, drawn, strict=True):
        assert torch.equal(y, torch.stack([labels[draw.indices] for draw in step]))


def test_augmented_and_plain_batches_may_be_mixed():
    drawn = [*for_networks(2, 3), *for_networks(2, 2, groups=None), *for_networks(2, 3)]
    images = some_images()
    made = Batches(drawn, CPU).images(images)
    for x, expected in zip(made, one_by_one(images, drawn), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [*((group,) for group in GROUPS), GROUPS], ids=str)
def test_batches_may_be_empty(groups):
    """As the shares of a short last batch are where there are many processes."""
    whole, images = mixed(2, groups=groups), some_images()
    parts = [
        Batches([[draw.shard(rank, 5) for draw in step] for step in whole], CPU).images(images)
        for rank in range(5)
    ]
    assert min(part[2].shape[1] for part in parts) == 0
    for t, expected in enumerate(one_by_one(images, whole)):
        x = torch.cat([part[t] for part in parts], 1)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["plain", "dsa"])
def test_the_gradient_is_the_sum_over_single_batches(groups):
    drawn = mixed(2, groups=groups)
    images = some_images().requires_grad_()
    made, single = Batches(drawn, CPU).images(images), one_by_one(images, drawn)
    weights = [torch.randn(x.shape, generator=generator(9), dtype=x.dtype) for x in single]
    (together,) = torch.autograd.grad(made, images, weights)
    summed = torch.zeros_like(images)
    for x, weight in zip(single, weights, strict=True):
        summed += torch.autograd.grad(x, images, weight, retain_graph=True)[0]
    torch.testing.assert_close(together, summed, rtol=0, atol=1e-12)
    assert together.abs().max() > 1


def test_the_same_batches_are_made_again_and_images_left_alone():
    made, images = Batches(mixed(2), CPU), some_images()
    before = images.clone()
    for once, again in zip(made.images(images), made.images(images), strict=True):
        assert torch.equal(once, again)
    assert torch.equal(images, before)


def test_steps_per_block(monkeypatch):
    image = torch.zeros(3, 8, 8)  # 768 bytes
    for size, steps in ((1, 1), (7_679, 1), (15_359, 1), (15_360, 2), (76_800, 10)):
        monkeypatch.setitem(batches.BLOCK_BYTES, "cpu", size)
        assert steps_per_block(image, 10) == steps
    assert steps_per_block(image.double(), 10) == 5
    assert steps_per_block(image, 0) >= 1


@given(st.lists(st.integers(1, 3), max_size=60), st.integers(1, 20))
def test_alike_steps_are_taken_together(sizes, most):
    taken = list(alike(sizes, most))
    assert [t for steps in taken for t in steps] == list(range(len(sizes)))
    for steps in taken:
        assert len({sizes[t] for t in steps}) == 1
        assert len(steps) <= most and len(steps).bit_count() == 1
    assert [len(steps) for steps in alike([10] * 80, 16)] == [16] * 5
    assert [len(steps) for steps in alike([256] * 6 + [80], 4)] == [4, 2, 1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_makes_the_same_batches():
    drawn, images = mixed(3), some_images()
    made = Batches(drawn, torch.device("cuda")).images(images.cuda())
    for x, expected in zip(made, one_by_one(images, drawn), strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-12)
