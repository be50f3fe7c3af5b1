"""The outer update: two SGDs with momentum 0.5, the moving average, and what stops a run."""

import copy

import pytest
import torch

from utils.methods.base import Learned, Step
from utils.methods.outer_state import Diverged, OuterState


def step(grad_images, grad_syn_lr, loss=1.0, factor=1.0):
    grads = {
        "images": torch.full((2, 1, 8, 8), grad_images),
        "syn_lr": torch.tensor(grad_syn_lr),
    }
    return Step(torch.tensor(loss), grads, record={}, factor=factor)


def make_state(images=None):
    images = torch.zeros(2, 1, 8, 8) if images is None else images
    return OuterState(
        [
            Learned("images", images, 10.0, "lr_img"),
            Learned("syn_lr", torch.tensor(0.5), 0.1, "lr_lr", positive=True),
        ],
        syn_lr=0.5,
        ema_decay=0.9,
        if_not_finite="the loss is not finite: lower --lr_img",
    )


def test_sgd_with_momentum_and_moving_average():
    state = make_state()
    state.update(step(1.0, 1.0))
    state.update(step(1.0, 1.0))
    # velocity 1, then 0.5 + 1
    torch.testing.assert_close(state.images, torch.full((2, 1, 8, 8), -10.0 * 2.5))
    assert state.syn_lr == pytest.approx(0.5 - 0.1 * 2.5)
    torch.testing.assert_close(
        state.ema_images, torch.full((2, 1, 8, 8), 0.9 * (0.1 * -10) + 0.1 * -25)
    )


def test_the_given_images_are_not_touched():
    images = torch.zeros(2, 1, 8, 8)
    state = make_state(images)
    state.update(step(1.0, 1.0))
    assert torch.equal(images, torch.zeros_like(images))


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (step(1.0, 1.0, loss=float("nan")), "loss is not finite"),
        (step(1.0, 1.0, loss=float("inf")), "loss is not finite"),
        (step(1.0, 100.0), "lower --lr_lr"),
        (step(1.0, 5.0), "lower --lr_lr"),  # exactly zero
        (step(1.0, float("nan")), "lower --lr_lr"),
        (step(float("inf"), 1.0), "lower --lr_img"),
    ],
)
def test_a_bad_step_is_refused_and_leaves_the_set(bad, advice):
    state = make_state()
    with pytest.raises(Diverged, match=advice):
        state.update(bad)
    assert torch.equal(state.images, torch.zeros(2, 1, 8, 8))
    assert torch.equal(state.ema_images, torch.zeros(2, 1, 8, 8))
    assert state.syn_lr == 0.5


def test_a_loaded_state_goes_on_alike():
    state = make_state()
    state.update(step(1.0, 1.0))
    saved = copy.deepcopy(state.state_dict())
    state.update(step(2.0, -1.0))

    other = make_state()
    other.load_state_dict(saved)
    other.update(step(2.0, -1.0))

    assert torch.equal(state.images, other.images)
    assert torch.equal(state.ema_images, other.ema_images)
    assert state.syn_lr == other.syn_lr


def test_a_factor_is_that_of_one_update_alone():
    state, plain = make_state(), make_state()
    state.update(step(1.0, 1.0, factor=0.5))
    plain.update(step(0.5, 0.5))
    torch.testing.assert_close(state.images, plain.images)
    assert state.rates == {"lr_img": 10.0, "lr_lr": 0.1}


def test_without_a_learned_rate_the_given_one_stands():
    images = Learned("images", torch.zeros(2, 1, 8, 8), 10.0, "lr_img")
    state = OuterState([images], syn_lr=0.01, ema_decay=0.9, if_not_finite="lower --lr_img")
    state.update(Step(torch.tensor(1.0), {"images": torch.ones(2, 1, 8, 8)}, record={}))
    assert state.syn_lr == 0.01
    assert "syn_lr" not in state.state_dict()
    other = OuterState([images], syn_lr=0.01, ema_decay=0.9, if_not_finite="lower --lr_img")
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    assert torch.equal(other.images, state.images)
