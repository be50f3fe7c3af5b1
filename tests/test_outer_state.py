"""The outer update: two SGDs with momentum 0.5, the moving average, and what stops a run."""

import copy

import pytest
import torch

from utils.methods.outer_state import Diverged, OuterState
from utils.methods.trajectory.unroll import Matching


def matching(grad_images, grad_syn_lr, loss=1.0):
    return Matching(
        loss=torch.tensor(loss),
        lengths=[1],
        distances=torch.tensor([[1.0]]),
        grad_images=torch.full((2, 1, 8, 8), grad_images),
        grad_syn_lr=torch.tensor(grad_syn_lr),
        curves={},
    )


def make_state():
    return OuterState(torch.zeros(2, 1, 8, 8), 0.5, lr_img=10.0, lr_lr=0.1, ema_decay=0.9)


def test_sgd_with_momentum_and_moving_average():
    state = make_state()
    state.step(matching(1.0, 1.0))
    state.step(matching(1.0, 1.0))
    # velocity 1, then 0.5 + 1
    torch.testing.assert_close(state.images, torch.full((2, 1, 8, 8), -10.0 * 2.5))
    torch.testing.assert_close(state.syn_lr, torch.tensor(0.5 - 0.1 * 2.5))
    torch.testing.assert_close(
        state.ema_images, torch.full((2, 1, 8, 8), 0.9 * (0.1 * -10) + 0.1 * -25)
    )


def test_the_given_images_are_not_touched():
    images = torch.zeros(2, 1, 8, 8)
    state = OuterState(images, 0.5, lr_img=10.0, lr_lr=0.1, ema_decay=0.9)
    state.step(matching(1.0, 1.0))
    assert torch.equal(images, torch.zeros_like(images))


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (matching(1.0, 1.0, loss=float("nan")), "loss is not finite"),
        (matching(1.0, 1.0, loss=float("inf")), "loss is not finite"),
        (matching(1.0, 100.0), "lower --lr_lr"),
        (matching(1.0, 5.0), "lower --lr_lr"),  # exactly zero
        (matching(1.0, float("nan")), "lower --lr_lr"),
        (matching(float("inf"), 1.0), "lower --lr_img"),
    ],
)
def test_a_bad_step_is_refused_and_leaves_the_set(bad, advice):
    state = make_state()
    with pytest.raises(Diverged, match=advice):
        state.step(bad)
    assert torch.equal(state.images, torch.zeros(2, 1, 8, 8))
    assert torch.equal(state.ema_images, torch.zeros(2, 1, 8, 8))
    assert state.syn_lr.item() == 0.5


def test_a_loaded_state_goes_on_alike():
    state = make_state()
    state.step(matching(1.0, 1.0))
    saved = copy.deepcopy(state.state_dict())
    state.step(matching(2.0, -1.0))

    other = make_state()
    other.load_state_dict(saved)
    other.step(matching(2.0, -1.0))

    assert torch.equal(state.images, other.images)
    assert torch.equal(state.ema_images, other.ema_images)
    assert torch.equal(state.syn_lr, other.syn_lr)
