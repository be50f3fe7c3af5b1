"""ResNet18 with a CIFAR-style stem (3x3, stride 1, no max pooling) and instance norm."""

from math import ceil

from torch import Tensor, nn
from torch.nn import functional as F

from networks.norm import instance_norm


def _conv_norm(width: int, out: int, kernel: int, stride: int, size: int) -> list[nn.Module]:
    """A convolution to maps of `size` pixels, and their norm."""
    conv = nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, instance_norm(out, size)]


class _BasicBlock(nn.Module):
    def __init__(self, width: int, out: int, stride: int, size: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(width, out, 3, stride, size)
        self.conv2, self.bn2 = _conv_norm(out, out, 3, 1, size)
        changes_shape = stride != 1 or width != out
        self.shortcut = nn.Sequential(
            *(_conv_norm(width, out, 1, stride, size) if changes_shape else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _layer(width: int, out: int, stride: int, size: int) -> nn.Sequential:
    return nn.Sequential(_BasicBlock(width, out, stride, size), _BasicBlock(out, out, 1, size))


class ResNet18(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes).

    Average pooling over what is left of the map (4x4 at 32x32) before the linear layer. Instance
    norm needs 9x9 at least, of which 2x2 are left.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(channels, 64, 3, 1, image_size)
        self.layer1 = _layer(64, 64, 1, image_size)
        self.layer2 = _layer(64, 128, 2, ceil(image_size / 2))
        self.layer3 = _layer(128, 256, 2, ceil(image_size / 4))
        self.layer4 = _layer(256, 512, 2, ceil(image_size / 8))
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(x.mean((2, 3)))
