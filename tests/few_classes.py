"""Three classes of random images for methods that match class by class, in float64."""

import torch

from networks import build_network
from utils.compute.flat import flatten
from utils.core.rng import derive_seed
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import Split
from utils.methods.by_class import Classes

CLASSES, IPC, SEED = 3, 2, 5
COUNTS = (7, 4, 9)  # training images of each class
SHAPE = {"channels": 1, "num_classes": CLASSES, "image_size": 8}
GROUPS = parse_strategy(DSA_STRATEGY)
LABELS = torch.arange(CLASSES).repeat_interleave(IPC)


def some(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)


IMAGES = some(CLASSES * IPC, 0)
TRAIN = Split(some(sum(COUNTS), 1), torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS)))
LEARNED = {"images": IMAGES}


def fresh(seed, model):
    return build_network(model, **SHAPE, seed=seed)


def make_classes(dsa_groups, name):
    return Classes(
        TRAIN,
        num_classes=CLASSES,
        ipc=IPC,
        batch_real=5,
        dsa_groups=dsa_groups,
        seed=SEED,
        name=name,
    )


def theta_0(number, model):
    """The parameters that network `number` of a run begins with."""
    network = fresh(derive_seed(SEED, "bptt", number, "init"), model)
    return flatten(network.parameters()).detach().double()
