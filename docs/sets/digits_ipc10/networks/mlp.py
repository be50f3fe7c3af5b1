"""MLP: two hidden layers of 128 units."""

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes)."""

    def __init__(self, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(channels * image_size * image_size, 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.fc_1(images.flatten(1)))
        return self.fc_3(F.relu(self.fc_2(x)))
