"""Networks from elsewhere: a class of the user's own, or a network of torchvision or timm.

    package.module:Class     a subclass of nn.Module: Class(channels, num_classes, image_size)
    torchvision:resnet18     a classifier of torchvision.models, with fresh weights
    timm:vit_tiny_patch16_224

Those of the two libraries are made for 224x224 pixels. Below SMALL pixels they are adapted: a
transformer gets smaller patches, another network a first convolution of 3x3 with stride 1 and no
max-pool behind it, as a ResNet for CIFAR; what still does not take such images sees them enlarged.
"""

import difflib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

FORMS = "package.module:Class, torchvision:NAME or timm:NAME"
LIBRARIES = ("torchvision", "timm")
SMALL = 128  # pixels; from here on networks of the libraries are as published
PATCHES = 8  # a side, that a transformer sees of a small image
ENLARGED = (32, 64, 96, 128, 224, 299)  # sides that images are brought to, where nothing else helps
MAX_POOLS = ("maxpool", "features.pool0")  # behind the first convolution, by their names
# Heads that answer beside the logits, left out.
WITHOUT = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
SHOWN, SHOWN_LETTERS = 8, 300  # names, and letters of somebody else's error, in a message


class NetworkError(ValueError):
    """A network cannot be found, made or used; the message is one line."""


def is_elsewhere(model: str) -> bool:
    """Whether `model` names a network from elsewhere."""
    return ":" in model


def check_spelling(model: str) -> None:
    """NetworkError where `model` is not spelled as one of FORMS; nothing is imported."""
    source, _, name = model.partition(":")
    if source in LIBRARIES:
        if not name.replace("_", "").replace(".", "").replace("-", "").isalnum():
            raise NetworkError(f"{model!r} names no network: write {source}:NAME")
        return
    if "/" in source or "\\" in source or source.endswith(".py"):
        module = os.path.basename(source.replace("\\", "/")).removesuffix(".py") or "module"
        raise NetworkError(
            f"{model!r}: {source} is a path; write {module}:{name or 'Class'} and call from the "
            f"folder that {module}.py lies in"
        )
    if not all(part.isidentifier() for part in [*source.split("."), *name.split(".")]):
        raise NetworkError(f"{model!r} is not spelled as {FORMS}")


def find(model: str) -> Callable[..., nn.Module]:
    """Import what `model` names; NetworkError says what is not there."""
    check_spelling(model)
    source, _, name = model.partition(":")
    return _of_library(source, name) if source in LIBRARIES else _own_class(source, name)


def _own_class(source: str, name: str) -> type[nn.Module]:
    module = found = _imported(source)
    for part in name.split("."):
        if not hasattr(found, part):
            raise NetworkError(f"there is no {name} in {_place(module)}; {_offered(module)}")
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        kind = "class" if isinstance(found, type) else type(found).__name__
        library = source.partition(".")[0]
        hint = f"; is {library}:{name} meant?" if library in LIBRARIES else ""
        raise NetworkError(
            f"this is no network ({kind}): it must be a class derived from "
            f"torch.nn.Module{hint or '; ' + _offered(module)}"
        )
    return found


def _imported(source: str) -> ModuleType:
    """Import the module `source`, from the current folder too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: its files must not replace those of this program
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{source}.".startswith(f"{error.name}."):
            raise NetworkError(
                f"there is no module {error.name!r} in {here}, nor is such a package installed"
            ) from None
        raise NetworkError(f"module {source!r} cannot be imported: {reason(error)}") from None
    except (Exception, SystemExit) as error:  # whatever its lines do
        raise NetworkError(f"module {source!r} cannot be imported: {reason(error)}") from None


def _place(module: ModuleType) -> str:
    return f"module {module.__name__!r} ({getattr(module, '__file__', None) or 'built in'})"


def _offered(module: ModuleType) -> str:
    """Name the networks that a module has of its own."""
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    ]
    return f"its networks are {', '.join(names[:SHOWN])}" if names else "it has no network"


def _of_library(source: str, name: str) -> Callable[..., nn.Module]:
    try:
        library = importlib.import_module("torchvision.models" if source != "timm" else "timm")
    except ImportError as error:
        if source == "timm" and getattr(error, "name", None) == "timm":
            raise NetworkError("it needs timm, which is not installed: pip install timm") from None
        raise NetworkError(f"{source} cannot be imported: {reason(error)}") from None
    if source == "timm":
        names = library.list_models()
        is_there = library.is_model(name)

        def make(**arguments: Any) -> nn.Module:
            return library.create_model(name, pretrained=False, **arguments)
    else:
        names = library.list_models(module=library)
        is_there = name in names

        def make(**arguments: Any) -> nn.Module:
            return library.get_model(name, weights=None, **WITHOUT.get(name, {}), **arguments)

    if not is_there:
        close = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.5) or names[:SHOWN]
        raise NetworkError(
            f"{source} has no classifier {name!r} among its {len(names)}; choices: "
            f"{', '.join(close)}, ..."
        )
    return make


def build(model: str, channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Make the network `model`, with fresh weights from torch's global generator.

    What it keeps fixed (parameters without gradients) becomes buffers, so that `parameters()` are
    what is trained. NetworkError where it cannot be made for such images.
    """
    make = find(model)
    if model.partition(":")[0] in LIBRARIES:
        way, _ = _way(model, channels, num_classes, image_size)
        network, _ = _made(model, make, way, channels, num_classes)
    else:
        shape = (channels, num_classes, image_size)
        try:
            network = make(*shape)
        except (Exception, SystemExit) as error:
            raise NetworkError(
                f"{model} cannot be made as Class(channels, num_classes, image_size) = "
                f"Class{shape}: {reason(error)}"
            ) from None
        _fill_lazy(model, network, channels, image_size)
    _fix(network)
    parameters = dict(network.named_parameters())
    if not parameters:
        raise NetworkError(f"{model} has no parameters to train")
    if odd := [name for name, each in parameters.items() if each.is_complex()]:
        raise NetworkError(
            f"{model} has the complex parameter {odd[0]}: keep its real and imaginary part apart"
        )
    return network


def _fill_lazy(model: str, network: nn.Module, channels: int, image_size: int) -> None:
    """Give parameters a shape that wait for their first images."""
    if any(is_lazy(each) for each in [*network.parameters(), *network.buffers()]):
        try:
            with torch.no_grad():
                network(torch.zeros(2, channels, image_size, image_size))
        except (Exception, SystemExit) as error:
            raise NetworkError(
                f"{model} at {image_size}x{image_size} pixels: {reason(error)}"
            ) from None


def _fix(network: nn.Module) -> None:
    for module in network.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.requires_grad:
                delattr(module, name)
                module.register_buffer(name, param.data)


@dataclass(frozen=True)
class _Way:
    """How a network of a library is made for small images."""

    arguments: tuple[tuple[str, Any], ...] = ()
    small_stem: bool = False
    side: int | None = None  # that images are enlarged to

    def describe(self, changed: list[str]) -> str:
        """Say what it does, with what it has `changed` in the network."""
        parts = [f"{name} {value}" for name, value in self.arguments] + changed
        if self.side is not None:
            parts.append(f"images enlarged to {self.side}x{self.side}")
        return ", ".join(parts)


def adaptation(model: str, *, channels: int, num_classes: int, image_size: int) -> str:
    """Say how `model` is adapted to such images; empty where it is not."""
    if model.partition(":")[0] not in LIBRARIES:
        return ""
    return _way(model, channels, num_classes, image_size)[1]


@cache
def _way(model: str, channels: int, num_classes: int, image_size: int) -> tuple[_Way, str]:
    """The first way in which the network works, and in words; NetworkError where none does."""
    make, problem = find(model), ""
    for way in _ways(model, image_size):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                network, changed = _made(model, make, way, channels, num_classes)
                logits = network(torch.randn(2, channels, image_size, image_size))
        except Exception as error:
            problem = problem or reason(error)
            continue
        if isinstance(logits, Tensor) and logits.shape == (2, num_classes):
            return way, way.describe(changed)
        problem = problem or "it does not answer with logits"
    raise NetworkError(
        f"{model} cannot be adapted to {channels} channels of {image_size}x{image_size} pixels: "
        f"{problem}"
    )


def _ways(model: str, image_size: int) -> Iterator[_Way]:
    """Ways to make a network for images of a side, the best first."""
    source, _, name = model.partition(":")
    if source == "timm":
        patch = next(p for p in range(max(1, image_size // PATCHES), 0, -1) if image_size % p == 0)
        if image_size < SMALL:
            yield _Way((("img_size", image_size), ("patch_size", patch)))
        yield _Way((("img_size", image_size),))
    elif name.startswith("vit_"):
        side = max(image_size, PATCHES * int(name.split("_")[2]))
        yield _Way((("image_size", side),), side=side if side > image_size else None)
    if image_size < SMALL:
        yield _Way(small_stem=True)
    yield _Way()
    for side in ENLARGED:
        if side > image_size:
            yield _Way(side=side)


def _made(
    model: str, make: Callable[..., nn.Module], way: _Way, channels: int, num_classes: int
) -> tuple[nn.Module, list[str]]:
    """A network made in that way, and what was changed in it for the sake of small images."""
    arguments = dict(way.arguments)
    if model.startswith("timm:"):
        arguments["in_chans"] = channels
    network = make(num_classes=num_classes, **arguments)
    changed = _shrink_stem(network) if way.small_stem else []
    name, conv = _first_convolution(network)
    if conv.in_channels != channels:
        network.set_submodule(name, _like(conv, channels))
    return network if way.side is None else _Enlarging(network, way.side), changed


def _shrink_stem(network: nn.Module) -> list[str]:
    """Let what comes first in a network keep the size of the images; say what was changed."""
    changed = []
    name, conv = _first_convolution(network)
    if conv.stride != (1, 1):
        stem = _like(conv, conv.in_channels, kernel_size=3, stride=1, padding=1)
        network.set_submodule(name, stem)
        changed.append("first convolution 3x3 with stride 1")
    for name, _ in list(network.named_modules()):
        if name in MAX_POOLS:
            network.set_submodule(name, nn.Identity())
            changed.append("no max-pool behind it")
    return changed


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    return next(
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )


def _like(conv: nn.Conv2d, channels: int, **changes: Any) -> nn.Conv2d:
    """A fresh convolution as `conv`, of `channels`, but for the `changes`."""
    same = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding")}
    return nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **same | changes)


class _Enlarging(nn.Module):
    """A network that sees its images enlarged to `side` pixels."""

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network = network
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        return self.network(F.interpolate(images, size, mode="bilinear", align_corners=False))


def source_digest(model: str) -> str | None:
    """A digest of the file that a class of the user's own is in; None where there is none."""
    if not is_elsewhere(model) or model.partition(":")[0] in LIBRARIES:
        return None
    try:
        file = inspect.getsourcefile(find(model))  # type: ignore[arg-type]
        with open(file or "", "rb") as content:
            return hashlib.sha256(content.read()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def reason(error: BaseException) -> str:
    """The first line of what an error says, behind its name; no more than SHOWN_LETTERS of it."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0][:SHOWN_LETTERS]}" if lines else name
