"""The networks by name: a registry from the field's model names to constructors, and others by
where they are to be found.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

import networks.elsewhere as elsewhere
from networks.alexcifarnet import AlexCifarNet
from networks.alexnet import AlexNet
from networks.convnet import ConvNet
from networks.convnet_kip import ConvNetKIP
from networks.lenet import LeNet
from networks.mlp import MLP
from networks.norm import SingleValuesError, batch_norm
from networks.resnet import ResNet18
from networks.vgg import VGG11

_WIDTHS = (32, 64, 128, 256, 512, 1024)
_CONVNET_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    **{f"D{depth}": {"depth": depth} for depth in range(1, 9)},
    **{f"W{width}": {"width": width} for width in _WIDTHS},
    "AS": {"activation": "sigmoid"},
    "AR": {"activation": "relu"},
    "AL": {"activation": "leakyrelu"},
    "NN": {"norm": "none"},
    "BN": {"norm": "batch"},
    "LN": {"norm": "layer"},
    "IN": {"norm": "instance"},
    "GN": {"norm": "group"},
    "NP": {"pooling": "none"},
    "MP": {"pooling": "max"},
    "AP": {"pooling": "avg"},
}

_CONVNETS_KIP: dict[str, Callable[..., nn.Module]] = {
    "ConvNetKIP": ConvNetKIP,
    **{
        f"ConvNetKIPW{width}": partial(ConvNetKIP, width=width) for width in (32, 64, 128, 256, 512)
    },
}
# Those that regress on the labels of KIP and Label Solve.
KIP_NETWORKS = tuple(_CONVNETS_KIP)

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "MLP": MLP,
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "AlexCifarNet": AlexCifarNet,
    "VGG11": VGG11,
    "VGG11BN": partial(VGG11, norm=batch_norm),
    "ResNet18": ResNet18,
    "ResNet18BN": partial(ResNet18, norm=batch_norm),
    "ResNet18_AP": partial(ResNet18, pools=True),
    "ResNet18BN_AP": partial(ResNet18, norm=batch_norm, pools=True),
    **{f"ConvNet{suffix}": partial(ConvNet, **kw) for suffix, kw in _CONVNET_VARIANTS.items()},
    **_CONVNETS_KIP,
}

# Names that say the default: depth 3, width 128, relu, instance norm, average pooling.
_DEFAULT_CONVNETS = [f"ConvNet{suffix}" for suffix in ("", "D3", "W128", "AR", "IN", "AP")]

# The pool of `--eval_mode M`, the columns of the paper's Table 1.
CROSS_ARCHITECTURE = ("ConvNet", "ResNet18", "VGG11", "AlexNet")


class UnfitSizeError(ValueError):
    """A network does not fit images of a size; `smallest` is the side that it needs, in pixels."""

    def __init__(self, model: str, image_size: int, smallest: int) -> None:
        super().__init__(
            f"{model} at {image_size}x{image_size} pixels: its normalisation would see single "
            "values (1x1 maps)"
        )
        self.smallest = smallest


def canonical_name(model: str) -> str:
    """One name an architecture: the field writes `ConvNetD3` also as `ConvNet`."""
    return "ConvNetD3" if model in _DEFAULT_CONVNETS else model


def check_name(model: str) -> None:
    """ValueError where `model` can be no network's name; whether one is there is not looked at."""
    if elsewhere.is_elsewhere(model):
        elsewhere.check_spelling(model)
    elif model not in NETWORKS:
        choices = f"{', '.join(NETWORKS)}, or {elsewhere.FORMS}"
        raise ValueError(f"unknown network {model!r}; choices: {choices}")


def is_name(model: str) -> bool:
    """Whether `model` may be a network's name."""
    try:
        check_name(model)
    except ValueError:
        return False
    return True


def folder_name(model: str) -> str:
    """The name of a folder for what belongs to `model`: no file system objects to it."""
    return model.replace(":", "-")


def build_network(
    model: str, *, channels: int, num_classes: int, image_size: int, seed: int | None = None
) -> nn.Module:
    """Build network `model` for images (N, channels, image_size, image_size), on the CPU.

    With `seed` the initial weights depend on it alone and torch's global generator is left as it
    was. Raises ValueError for an unknown name, naming the choices, UnfitSizeError where the norm
    would see 1x1 maps, and NetworkError where one from elsewhere cannot be made.
    """
    check_name(model)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if elsewhere.is_elsewhere(model):
            return elsewhere.build(model, channels, num_classes, image_size)
        try:
            return NETWORKS[model](channels, num_classes, image_size)
        except SingleValuesError:
            smallest = _smallest_above(image_size, model)
            raise UnfitSizeError(model, image_size, smallest) from None


def _smallest_above(image_size: int, model: str) -> int:
    """The least side above `image_size`, which is too small, that `model` can be built for."""
    return next(size for size in count(image_size + 1) if _fits(model, size))


def _fits(model: str, image_size: int) -> bool:
    try:
        with torch.device("meta"):
            NETWORKS[model](1, 1, image_size)
        return True
    except SingleValuesError:
        return False
