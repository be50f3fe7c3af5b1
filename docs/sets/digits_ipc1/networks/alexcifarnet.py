"""AlexCifarNet: the network of Wang et al. (2018), two convolutions and three linear layers."""

from torch import Tensor, nn


class AlexCifarNet(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes).

    Weights begin as Xavier's normal values and biases at zero, as published. 1,756,426 parameters
    for ten classes of CIFAR.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.ReLU(),
            nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1),
            nn.MaxPool2d(3, 2, padding=1),
        )
        side = (image_size + 1) // 2
        side = (side + 1) // 2
        self.classifier = nn.Sequential(
            nn.Linear(64 * side**2, 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
            nn.Linear(192, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)
                module.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))
