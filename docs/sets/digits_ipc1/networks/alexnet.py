"""AlexNet in the field's form for small images: five convolutions, one linear layer."""

from torch import Tensor, nn

# (output channels, kernel size, max pooling behind it)
PLAN = [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)]


class AlexNet(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes); pooling stops at 1x1."""

    def __init__(self, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size, width = image_size, channels
        for out, kernel, pooled in PLAN:
            layers += [nn.Conv2d(width, out, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
            width = out
            if pooled and size > 1:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width * size * size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).flatten(1))
