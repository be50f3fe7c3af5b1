"""LeNet: two 5x5 convolutions with max pooling, three linear layers."""

from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes).

    Unpadded convolutions bring 32x32 to 5x5. Below 16x16 nothing would be left, so there the
    convolutions are padded.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        shrink = 0 if image_size < 16 else 4
        padding = (4 - shrink) // 2
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2 if channels == 1 else padding),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=padding),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        first_shrink = 0 if channels == 1 else shrink
        size = ((image_size - first_shrink) // 2 - shrink) // 2
        self.fc_1 = nn.Linear(16 * size * size, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.fc_1(self.features(images).flatten(1)))
        return self.fc_3(F.relu(self.fc_2(x)))
