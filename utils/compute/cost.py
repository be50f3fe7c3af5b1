"""What the work of one network costs, counted before it is done: arithmetic, memory and disk.

Counted on torch's meta device from the network itself; the constants below say how often its parts
are computed and kept (docs/performance.md compares them with what was measured).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from networks import UnfitSizeError, build_network
from utils.core.errors import UserError

FLOAT_BYTES = 4
# In units of one forward pass: a gradient is a forward and two backward products; the product of
# the reverse sweep has the forward pass and the backward to inputs three times, to weights twice.
GRADIENT_PASSES, ADJOINT_PASSES = 3, 8
# In units of a forward pass's activations: what an adjoint step, a training step and the test of a
# network hold at the most.
ADJOINT_COPIES, TRAINING_COPIES, TEST_COPIES = 4, 2, 0.5
# Parameter vectors that training a network keeps at the most: the module's, those of the template
# of its step, weights, velocity and gradient, and the next ones.
TRAINING_VECTORS = 8
# Those that a step of the full graph keeps: theta, its parts, the gradient's and the gradient, and
# their product with the rate.
GRAPH_VECTORS = 5


@dataclass(frozen=True)
class NetworkCost:
    """Of one network: numbers of parameters and of layers with weight matrices or kernels, and of
    one image forward: FLOP and bytes kept.
    """

    parameters: int
    layers: int
    flop: int
    activation_bytes: int


def fitting_network(model: str, *, channels: int, num_classes: int, image_size: int) -> nn.Module:
    """`build_network`, with UserError where `model` does not fit images of that size."""
    try:
        return build_network(
            model, channels=channels, num_classes=num_classes, image_size=image_size
        )
    except UnfitSizeError as error:
        raise UserError(
            f"{error}; pass --res {error.smallest} or more, or another --model"
        ) from None


@cache
def network_cost(model: str, *, channels: int, num_classes: int, image_size: int) -> NetworkCost:
    """Count `model` for images (channels, image_size, image_size), float32.

    UserError where it does not fit them; nothing is trained that has not been counted before.
    """
    with torch.device("meta"):
        network = fitting_network(
            model, channels=channels, num_classes=num_classes, image_size=image_size
        )
        images = torch.empty(1, channels, image_size, image_size)
    outputs: list[int] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs.append(output.numel())

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
    )


def outer_step_flop(cost: NetworkCost, *, syn_steps: int, batch: int) -> int:
    """FLOP of the two sweeps over `syn_steps` steps of `batch` images, at the full length."""
    return syn_steps * batch * cost.flop * (GRADIENT_PASSES + ADJOINT_PASSES)


def training_flop(cost: NetworkCost, *, images: int, epochs: int, flat: bool = False) -> int:
    """FLOP of training one network for `epochs` epochs on `images` images; flat steps take two
    gradients each.
    """
    return epochs * images * cost.flop * GRADIENT_PASSES * (1 + flat)


def adjoint_bytes(cost: NetworkCost, batch: int) -> int:
    """Bytes that an adjoint step on `batch` images holds, besides parameters."""
    return ADJOINT_COPIES * batch * cost.activation_bytes


def full_graph_bytes(cost: NetworkCost, *, syn_steps: int, batch: int) -> int:
    """Bytes of the graph over all steps; each keeps its forward and its backward pass."""
    vectors = GRAPH_VECTORS * FLOAT_BYTES * cost.parameters
    return syn_steps * (2 * batch * cost.activation_bytes + vectors)


def training_bytes(cost: NetworkCost, batch: int) -> int:
    """Bytes that a network takes which trains on batches of `batch` images."""
    vectors = TRAINING_VECTORS * FLOAT_BYTES * cost.parameters
    return TRAINING_COPIES * batch * cost.activation_bytes + vectors


def inference_bytes(cost: NetworkCost, images: int) -> int:
    """Bytes that a forward pass without gradients over `images` images holds."""
    return int(TEST_COPIES * images * cost.activation_bytes)


def pieces_within(batch: int, limit: int) -> int:
    """The size of equal pieces of `batch`, none larger than `limit` (but at least 1)."""
    return math.ceil(batch / math.ceil(batch / max(1, limit)))


def expert_bytes(cost: NetworkCost, *, epochs: int) -> int:
    """Disk of one expert: a snapshot before the first epoch and after each."""
    return (epochs + 1) * cost.parameters * FLOAT_BYTES
