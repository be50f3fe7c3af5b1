"""ResNet18 with a CIFAR-style stem (3x3, stride 1, no max pooling), in the field's variants."""

from dataclasses import dataclass
from math import ceil

from torch import Tensor, nn
from torch.nn import functional as F

from networks.norm import Norm, instance_norm


@dataclass(frozen=True)
class _Style:
    """The norm, and how maps are halved: by strides, or by average pooling behind convolutions."""

    norm: Norm
    pools: bool

    def halved(self, size: int) -> int:
        return size // 2 if self.pools else ceil(size / 2)

    def conv(self, width: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
        stride = 1 if self.pools else stride
        return nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, bias=False)


class _BasicBlock(nn.Module):
    """`size` is the side of the maps that come out."""

    def __init__(self, style: _Style, width: int, out: int, stride: int, size: int) -> None:
        super().__init__()
        self.conv1 = style.conv(width, out, 3, stride)
        # With pooling this norm stands before it, so on maps of twice the side.
        self.bn1 = style.norm(out, size)
        self.pooling = nn.AvgPool2d(2) if style.pools and stride == 2 else None
        self.conv2 = style.conv(out, out, 3, 1)
        self.bn2 = style.norm(out, size)
        shortcut: list[nn.Module] = []
        if stride != 1 or width != out:
            pooling = [] if self.pooling is None else [nn.AvgPool2d(2)]
            shortcut = [style.conv(width, out, 1, stride), *pooling, style.norm(out, size)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y if self.pooling is None else self.pooling(y)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _layer(style: _Style, width: int, out: int, stride: int, size: int) -> nn.Sequential:
    first = _BasicBlock(style, width, out, stride, size)
    return nn.Sequential(first, _BasicBlock(style, out, out, 1, size))


class ResNet18(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes).

    With strides, what is left of the map (4x4 at 32x32) is averaged before the linear layer, and
    9x9 pixels at least are needed, of which 2x2 are left. With `pools` (the field's `_AP`) the
    linear layer sees the whole map, and 16x16 are needed.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: int,
        *,
        norm: Norm = instance_norm,
        pools: bool = False,
    ) -> None:
        super().__init__()
        style, size = _Style(norm, pools), image_size
        self.conv1, self.bn1 = style.conv(channels, 64, 3, 1), norm(64, size)
        self.layer1 = _layer(style, 64, 64, 1, size)
        size = style.halved(size)
        self.layer2 = _layer(style, 64, 128, 2, size)
        size = style.halved(size)
        self.layer3 = _layer(style, 128, 256, 2, size)
        size = style.halved(size)
        self.layer4 = _layer(style, 256, 512, 2, size)
        self.averages = not pools
        self.classifier = nn.Linear(512 * (size**2 if pools else 1), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(x.mean((2, 3)) if self.averages else x.flatten(1))
