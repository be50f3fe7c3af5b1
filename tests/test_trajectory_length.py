"""Length policies and distances against brute force."""

import pytest
import torch

from utils.methods.trajectory.lengths import DISTANCES, LENGTH_POLICIES, att, fixed


@pytest.mark.parametrize("seed", range(20))
def test_att_is_the_first_argmin(seed):
    distances = torch.randint(0, 9, (12,), generator=torch.Generator().manual_seed(seed)).double()
    best = min(range(1, 13), key=lambda step: (distances[step - 1].item(), step))
    assert att(distances) == best


def test_att_ignores_where_the_student_has_diverged():
    nan, inf = float("nan"), float("inf")
    assert att(torch.tensor([3.0, 2.0, inf, nan])) == 2
    assert att(torch.tensor([nan, nan])) == 1


def test_fixed_is_the_last_step():
    assert fixed(torch.tensor([1.0, 0.0, 5.0])) == 3


def test_policies_are_registered():
    assert {"att": att, "fixed": fixed} == LENGTH_POLICIES


def test_distances():
    thetas, target = torch.tensor([[3.0, -4.0], [1.0, 1.0]]), torch.tensor([0.0, 0.0])
    assert DISTANCES["l2"](thetas, target).tolist() == [25.0, 2.0]  # squared
    assert DISTANCES["l1"](thetas, target).tolist() == [7.0, 2.0]
