"""The method on real CIFAR-10 images: a few outer steps lower the matching loss."""

import pytest
import torch
from short_runs import save_expert

from networks import build_network
from utils.compute.cohort import Cohort, Recipe
from utils.compute.flat import FlatNetwork
from utils.core.rng import stream
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import Split, load_dataset
from utils.data.real_images import class_labels, initial_images
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import snapshot
from utils.methods.base import Learned
from utils.methods.outer_state import OuterState
from utils.methods.trajectory.lengths import DISTANCES, att
from utils.methods.trajectory.matching import Objective
from utils.methods.trajectory.method import Sampling, TrajectoryMatching
from utils.methods.trajectory.starts import StartEpochs

GROUPS = parse_strategy(DSA_STRATEGY)


def train_experts(train: Split, seeds: list[int]) -> list[list]:
    """Three epochs of narrow ConvNets on the first 1,280 images."""
    recipe = Recipe(
        "ConvNetW32", channels=3, num_classes=10, image_size=32, momentum=0.0, weight_decay=0.0
    )
    cohort = Cohort(recipe, seeds, device=torch.device("cpu"), dtype=torch.float32)
    generators = [stream(seed, "expert") for seed in seeds]
    experts = [[snapshot(network)] for network in cohort.networks]
    for _ in range(3):
        cohort.train(
            train.images[:1280],
            train.labels[:1280],
            epochs=1,
            lr=0.02,
            batch_size=64,
            dsa_groups=GROUPS,
            generators=generators,
        )
        for expert, network in zip(experts, cohort.networks, strict=True):
            expert.append(snapshot(network))
    return experts


@pytest.fixture(scope="module")
def cifar10(cifar10_path):
    return load_dataset("CIFAR10", data_path=cifar10_path)


def test_outer_steps_lower_the_matching_loss(cifar10, tmp_path):
    for number, expert in enumerate(train_experts(cifar10.train, [0, 1])):
        save_expert(tmp_path, number, expert, experts_per_file=10)
    network = FlatNetwork(build_network("ConvNetW32", channels=3, num_classes=10, image_size=32))
    matcher = TrajectoryMatching(
        network,
        ExpertBuffer(tmp_path, network.shapes),
        class_labels(10, 1, torch.device("cpu")),
        Sampling(
            syn_steps=10,
            expert_epochs=1,
            start_epochs=StartEpochs(2),
            batch_syn=None,
            dsa_groups=GROUPS,
            seed=0,
        ),
        Objective(DISTANCES["l2"], att),
    )
    images = initial_images(cifar10, 1, "real", seed=0)
    state = OuterState(
        [
            Learned("images", images, 500.0, "lr_img"),
            Learned("syn_lr", torch.tensor(0.01), 1e-7, "lr_lr", positive=True),
        ],
        syn_lr=0.01,
        ema_decay=0.99,
        if_not_finite="",
    )

    def mean_loss() -> float:
        """Over four fixed draws of segment and augmentation that the steps below do not use."""
        losses = [matcher.step(i, state.learned).loss for i in range(100, 104)]
        return torch.stack(losses).mean().item()

    before = mean_loss()
    for iteration in range(8):
        state.update(matcher.step(iteration, state.learned))
    after = mean_loss()
    assert before <= 1.0  # the real images bring the student a little nearer already
    assert after < 0.99 * before
