"""What the layers of a network make of images: features for methods that match them."""

import torch
from torch import Tensor, nn

from networks import build_network
from utils.core.errors import UserError

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU)


class LayerFeatures(nn.Module):
    """`network` as a map of images (N, C, H, W) to what its layers make of them, (N, F).

    These are the outputs of the activations in `network.features`, a Sequential, and last what
    leaves it, each flattened. The parameters are those of the whole network in their order.
    ValueError where it has no such layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        layers = getattr(network, "features", None)
        if not isinstance(layers, nn.Sequential) or not any(map(_activates, layers)):
            raise ValueError("it has no Sequential `features` with activations in it")
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self._layers(images), 1)

    def sizes(self, image_shape: tuple[int, ...]) -> list[int]:
        """How many features each layer has for an image (C, H, W); they add up to F."""
        like = next(self.parameters())
        with torch.no_grad():
            found = self._layers(torch.zeros(2, *image_shape, device=like.device, dtype=like.dtype))
        return [features.shape[1] for features in found]

    def _layers(self, images: Tensor) -> list[Tensor]:
        found, x = [], images
        for module in self.network.features:  # type: ignore[union-attr]
            x = module(x)
            if _activates(module):
                found.append(x.flatten(1))
        return [*found, x.flatten(1)]


def _activates(module: nn.Module) -> bool:
    return isinstance(module, ACTIVATIONS)


def check_layers(model: str, *, channels: int, num_classes: int, image_size: int, why: str) -> None:
    """UserError where `model` has no layers that LayerFeatures finds; `why` says what needs them.
    That it can be built has been checked before.
    """
    network = build_network(
        model, channels=channels, num_classes=num_classes, image_size=image_size, seed=0
    )
    try:
        LayerFeatures(network)
    except ValueError as error:
        raise UserError(
            f"--model {model} has no layers for {why}: {error}; choose a ConvNet, AlexNet, LeNet "
            "or VGG11"
        ) from None
