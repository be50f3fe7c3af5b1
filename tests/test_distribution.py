"""DM against plain differentiation of its formula, in float64."""

import pytest
import torch
from numerics import relative_error
from torch import nn

from networks import build_network
from utils.compute.execution import Execution
from utils.core import ranks
from utils.core.rng import derive_seed
from utils.data import augment
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import Split
from utils.methods.by_class import Classes
from utils.methods.distribution import DistributionMatching

CLASSES, IPC, SEED = 3, 2, 5
COUNTS = (7, 4, 9)  # training images of each class
GROUPS = parse_strategy(DSA_STRATEGY)


def fresh(seed, model="ConvNetW32"):
    return build_network(model, channels=1, num_classes=CLASSES, image_size=8, seed=seed).double()


def training_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randn(len(labels), 1, 8, 8, generator=generator, dtype=torch.float64)
    return Split(images, shuffled)


TRAIN = training_images()
IMAGES = torch.randn(CLASSES * IPC, 1, 8, 8, dtype=torch.float64)


def make(*, batch_real=5, dsa_groups=GROUPS, model="ConvNetW32", **keywords):
    classes = make_classes(batch_real=batch_real, dsa_groups=dsa_groups)
    return DistributionMatching(lambda seed: fresh(seed, model), classes, seed=SEED, **keywords)


def make_classes(*, batch_real=5, dsa_groups=GROUPS):
    return Classes(
        TRAIN,
        num_classes=CLASSES,
        ipc=IPC,
        batch_real=batch_real,
        dsa_groups=dsa_groups,
        seed=SEED,
        name="dm",
    )


def by_formula(iteration, images, model="ConvNetW32", dsa_groups=GROUPS):
    """J and dJ/dimages, class by class, with features that a hook takes from the whole network."""
    network = fresh(derive_seed(SEED, "dm", iteration, "init"), model)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    features = []
    last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    leaf = images.clone().requires_grad_()
    classes, loss = make_classes(dsa_groups=dsa_groups), 0
    for label in range(CLASSES):
        real, synthetic = classes.draw(iteration, label)
        assert (TRAIN.labels[real.indices] == label).all()
        assert synthetic.indices.tolist() == list(range(label * IPC, (label + 1) * IPC))
        network(augment.apply(TRAIN.images[real.indices], real.augmentation))
        network(augment.apply(leaf[synthetic.indices], synthetic.augmentation))
        wanted, found = (each.mean(0) for each in features[-2:])
        loss = loss + (wanted - found).square().sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_step(step, reference):
    for value, wanted in zip((step.loss, step.grads["images"]), reference, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < 1e-9


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("dsa_groups", [None, *[(group,) for group in GROUPS]])
def test_loss_and_gradient_are_those_of_the_formula(micro_batch, dsa_groups):
    method = make(micro_batch=micro_batch, dsa_groups=dsa_groups)
    assert_step(method.step(3, {"images": IMAGES}), by_formula(3, IMAGES, dsa_groups=dsa_groups))


@pytest.mark.parametrize("model", ["MLP", "ConvNetD1"])
def test_features_are_what_goes_into_the_last_linear_layer(model):
    method = make(model=model)
    assert_step(method.step(0, {"images": IMAGES}), by_formula(0, IMAGES, model))


@pytest.mark.slow
def test_compiled_steps_give_the_same():
    method = make(execution=Execution(compiled=True), micro_batch=4)
    assert_step(method.step(1, {"images": IMAGES}), by_formula(1, IMAGES))


def test_an_iteration_can_be_repeated_and_others_differ():
    first, again = (make().step(2, {"images": IMAGES}) for _ in range(2))
    other = make().step(3, {"images": IMAGES})
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.grads["images"], again.grads["images"])
    assert not torch.equal(first.grads["images"], other.grads["images"])


def test_a_class_shows_different_images_and_shares_one_draw_of_dsa():
    classes = make_classes()
    for label, count in enumerate(COUNTS):
        real, synthetic = classes.draw(1, label)
        assert len(set(real.indices.tolist())) == len(real) == min(5, count)
        assert real.augmentation.group == synthetic.augmentation.group
        numbers = torch.cat([real.augmentation.u, synthetic.augmentation.u])
        assert (numbers == numbers[0]).all()
    draws = [classes.draw(1, label)[0].augmentation.u[0, 0].item() for label in range(CLASSES)]
    assert len(set(draws)) == CLASSES


@pytest.mark.parametrize("world", [2, 4])
def test_processes_divide_the_classes(monkeypatch, world):
    whole = make().step(1, {"images": IMAGES})
    monkeypatch.setattr(ranks, "world", lambda: world)
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda tensor: tensor)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(make().step(1, {"images": IMAGES}))
    total = sum(part.grads["images"] for part in parts)
    assert relative_error(total, whole.grads["images"]) < 1e-12
    assert relative_error(sum(part.loss for part in parts), whole.loss) < 1e-12


def test_steps_lower_the_loss():
    """On networks that the steps do not see; all real images are in every batch."""
    method = make(model="ConvNetD1", batch_real=max(COUNTS), dsa_groups=None)
    images = IMAGES.clone()

    def mean_loss():
        losses = [method.step(i, {"images": images}).loss for i in range(100, 104)]
        return torch.stack(losses).mean()

    before = mean_loss()
    for iteration in range(20):
        images -= 0.05 * method.step(iteration, {"images": images}).grads["images"]
    assert mean_loss() < 0.5 * before
