"""The method on real CIFAR-10 images: a few outer steps lower the matching loss."""

import pytest
import torch

from networks import build_network
from utils.augment import DSA_STRATEGY, parse_strategy
from utils.data import Split, load_dataset
from utils.expert_buffer import ExpertBuffer, save_expert, snapshot
from utils.flat_params import FlatNetwork
from utils.matching import Matcher
from utils.outer_state import OuterState
from utils.rng import stream
from utils.synthetic_set import class_labels, initial_images
from utils.training import train_epoch
from utils.trajectory_length import DISTANCES, att
from utils.unroll import adjoint

GROUPS = parse_strategy(DSA_STRATEGY)


def train_expert(train: Split, seed: int) -> list:
    """Three epochs of a narrow ConvNet on the first 2,560 images."""
    network = build_network("ConvNetW32", channels=3, num_classes=10, image_size=32, seed=seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    expert = [snapshot(network)]
    for epoch in range(3):
        train_epoch(
            network,
            optimizer,
            train.images[:2560],
            train.labels[:2560],
            batch_size=64,
            dsa_groups=GROUPS,
            generator=stream(seed, "expert", epoch),
        )
        expert.append(snapshot(network))
    return expert


@pytest.fixture(scope="module")
def cifar10(cifar10_path):
    return load_dataset("CIFAR10", data_path=cifar10_path)


def test_outer_steps_lower_the_matching_loss(cifar10, tmp_path):
    for seed in range(2):
        save_expert(tmp_path, seed, train_expert(cifar10.train, seed), experts_per_file=10)
    network = FlatNetwork(build_network("ConvNetW32", channels=3, num_classes=10, image_size=32))
    matcher = Matcher(
        network,
        ExpertBuffer(tmp_path, network.shapes),
        class_labels(10, 1, torch.device("cpu")),
        syn_steps=10,
        expert_epochs=1,
        max_start_epoch=2,
        batch_syn=None,
        dsa_groups=GROUPS,
        engine=adjoint,
        distance=DISTANCES["l2"],
        policy=att,
        seed=0,
    )
    state = OuterState(
        initial_images(cifar10, 1, "real", seed=0),
        0.01,
        lr_img=100.0,
        lr_lr=1e-7,
        ema_decay=0.99,
    )

    def mean_loss() -> float:
        """Over four fixed draws of segment and augmentation that the steps below do not use."""
        losses = [matcher.match(i, state.images, state.syn_lr)[0].loss for i in range(100, 104)]
        return torch.stack(losses).mean().item()

    before = mean_loss()
    for iteration in range(8):
        matching, _ = matcher.match(iteration, state.images, state.syn_lr)
        state.step(matching)
    after = mean_loss()
    assert before <= 1.0  # the real images bring the student a little nearer already
    assert after < 0.99 * before
