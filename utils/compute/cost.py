"""What the work of one network costs, counted before it is done: arithmetic, memory and disk.

Counted on torch's meta device from the network itself; the constants below say how often its parts
are computed and kept (docs/performance.md compares them with what was measured).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from networks import UnfitSizeError, build_network, elsewhere
from utils.compute.contract import abilities
from utils.core.errors import UserError

FLOAT_BYTES = 4
# In units of one forward pass: a gradient is a forward and two backward products.
GRADIENT_PASSES = 3
# In units of a forward pass's activations: what a training step and a test hold at most.
TRAINING_COPIES, TEST_COPIES = 2, 0.5
# Parameter vectors that training a network keeps at most: the module's, those of the template of
# its step, weights, velocity and gradient, and the next ones.
TRAINING_VECTORS = 8


@dataclass(frozen=True)
class NetworkCost:
    """One network: its parameters, its layers with weight matrices or kernels, and of one image
    (C, H, W) forward the FLOP and the bytes kept.
    """

    parameters: int
    layers: int
    flop: int
    activation_bytes: int
    image_shape: tuple[int, int, int]


def fitting_network(model: str, *, channels: int, num_classes: int, image_size: int) -> nn.Module:
    """`build_network`, with UserError where `model` does not fit images of that size."""
    shape = {"channels": channels, "num_classes": num_classes, "image_size": image_size}
    abilities(model, **shape)  # refuses what cannot be trained
    try:
        return build_network(model, **shape, seed=0 if elsewhere.is_elsewhere(model) else None)
    except UnfitSizeError as error:
        raise UnfitError(str(error), model, error.smallest) from None


class UnfitError(UserError):
    """A network does not fit the size of the images: the `problem`, and what it `needs`.

    The message is for scripts with --res; others make one of the parts.
    """

    def __init__(self, problem: str, model: str, smallest: int) -> None:
        super().__init__(f"{problem}; pass --res {smallest} or more, or another --model")
        self.problem = problem
        self.needs = f"{model} needs {smallest}x{smallest} pixels"


def fitting_models(
    models: Sequence[str], *, channels: int, num_classes: int, image_size: int
) -> tuple[Sequence[str], list[str]]:
    """Which of several `models` fit images of that size, and what each of the others needs. A
    single one must fit.
    """
    shape = {"channels": channels, "num_classes": num_classes, "image_size": image_size}
    if len(models) == 1:
        return models, []
    fit, needs = [], []
    for model in models:
        try:
            network_cost(model, **shape)
            fit.append(model)
        except UnfitError as error:
            needs.append(error.needs)
    return fit, needs


@cache
def network_cost(model: str, *, channels: int, num_classes: int, image_size: int) -> NetworkCost:
    """Count `model` for images (channels, image_size, image_size), float32.

    UserError where it does not fit them; nothing is trained that has not been counted before. A
    network from elsewhere is counted as it computes, since its code may not know the meta device.
    """
    with torch.device("cpu" if elsewhere.is_elsewhere(model) else "meta"):
        network = fitting_network(
            model, channels=channels, num_classes=num_classes, image_size=image_size
        ).eval()
        images = torch.zeros(1, channels, image_size, image_size)
    outputs: list[int] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.extend(each.numel() for each in tree_leaves(output) if isinstance(each, Tensor))

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return NetworkCost(
        parameters=sum(param.numel() for param in network.parameters()),
        layers=sum(param.dim() in (2, 4) for param in network.parameters()),
        flop=counter.get_total_flops(),
        activation_bytes=FLOAT_BYTES * sum(outputs),
        image_shape=(channels, image_size, image_size),
    )


@dataclass(frozen=True)
class Training:
    """The training of one network: on how many images, in batches of what size, for how long.

    Flat (sharpness-aware) steps take two gradients each.
    """

    cost: NetworkCost
    images: int
    batch: int
    epochs: int = 1
    flat: bool = False

    @property
    def flop(self) -> int:
        return self.epochs * self.images * self.cost.flop * GRADIENT_PASSES * (1 + self.flat)

    @property
    def steps(self) -> int:
        """Gradients that follow one another."""
        return self.epochs * math.ceil(self.images / self.batch) * (1 + self.flat)

    @property
    def layers(self) -> int:
        """Of all functions that compiling it compiles."""
        return self.cost.layers * (1 + self.flat)

    @property
    def bytes(self) -> int:
        """Memory of a training step: activations and vectors of parameters."""
        return TRAINING_COPIES * self.batch * self.cost.activation_bytes + self.vector_bytes

    @property
    def vector_bytes(self) -> int:
        """Memory that stays between the steps."""
        return TRAINING_VECTORS * FLOAT_BYTES * self.cost.parameters


def inference_bytes(cost: NetworkCost, images: int) -> int:
    """Bytes that a forward pass without gradients over `images` images holds."""
    return int(TEST_COPIES * images * cost.activation_bytes)


def expert_bytes(cost: NetworkCost, *, epochs: int) -> int:
    """Disk of one expert: a snapshot before the first epoch and after each."""
    return (epochs + 1) * cost.parameters * FLOAT_BYTES


def pieces_within(batch: int, limit: int) -> int:
    """The size of pieces of `batch`, none larger than `limit` (but at least 1).

    Of one size, where half as many pieces again as are needed suffice for that: what is compiled
    for one is then compiled for all.
    """
    least = math.ceil(batch / max(1, limit))
    equal = (batch // count for count in range(least, least * 3 // 2 + 1) if batch % count == 0)
    return next(equal, math.ceil(batch / least))
