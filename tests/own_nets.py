"""Networks as users bring them, for the tests: some of use, some with a fault each."""

import torch
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    """Has buffers that are constants: indices and a scale."""

    dropout = 0.0

    def __init__(self, channels, num_classes, image_size):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0]))
        self.register_buffer("scale", torch.tensor([2.0]))
        self.fc = nn.Linear(4 * image_size * image_size, num_classes)

    def forward(self, images):
        x = F.relu(self.conv(images)[:, self.order] * self.scale).flatten(1)
        return self.fc(F.dropout(x, self.dropout, self.training))


class WithDropout(Small):
    dropout = 0.5


class Lazy(nn.Sequential):
    """Batch norm, a layer that waits for its first images, and a frozen parameter."""

    def __init__(self, channels, num_classes, image_size):
        norm = nn.BatchNorm2d(4)
        norm.bias.requires_grad_(False)
        conv = nn.Conv2d(channels, 4, 3)
        super().__init__(conv, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))


class Attention(nn.Module):
    """Its fused kernels have no second derivative."""

    def __init__(self, channels, num_classes, image_size):
        super().__init__()
        self.patches = nn.Conv2d(channels, 24, 4, 4)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        q, k, v = self.patches(images).flatten(2).mT.unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Remembers(Small):
    def forward(self, images):
        with torch.no_grad():
            self.scale.add_(images.mean())
        return super().forward(images)


class LooksAtValues(Small):
    """Neither vmap nor the compiler follows it."""

    def forward(self, images):
        logits = super().forward(images)
        return logits if logits.sum().item() > 0 else 2 * logits


class Headless(nn.Sequential):
    """Its last linear layer does not give the logits."""

    def __init__(self, channels, num_classes, image_size):
        super().__init__(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes), nn.Tanh())


class WrongShape(Small):
    def forward(self, images):
        return super().forward(images)[:, :3]


class Pair(Small):
    def forward(self, images):
        return super().forward(images), images


class OneArgument(Small):
    def __init__(self, channels):
        super().__init__(channels, 10, 8)


class NoParameters(nn.Flatten):
    def __init__(self, channels, num_classes, image_size):
        super().__init__()


class NoGradient(Small):
    def forward(self, images):
        return super().forward(images).detach()


class Fails(Small):
    def forward(self, images):
        raise ValueError("these images\nare too small")


class FailsInTests(Small):
    def forward(self, images):
        if not self.training:
            raise ValueError
        return super().forward(images)


class Leaves(Small):
    def forward(self, images):
        raise SystemExit(3)


class ChangesImages(Small):
    def forward(self, images):
        return super().forward(images.sub_(0.5))


class Complex(Small):
    def __init__(self, channels, num_classes, image_size):
        super().__init__(channels, num_classes, image_size)
        self.phase = nn.Parameter(torch.ones(1, dtype=torch.cfloat))


class NeedsTwo(nn.Sequential):
    def __init__(self, channels, num_classes, image_size):
        linear = nn.Linear(channels * image_size**2, num_classes)
        super().__init__(nn.Flatten(), linear, nn.BatchNorm1d(num_classes))


class Transposed(Small):
    def forward(self, images):
        return super().forward(images).T


class Recurrent(nn.Module):
    """vmap can only loop over it."""

    def __init__(self, channels, num_classes, image_size):
        super().__init__()
        self.rows = nn.LSTM(channels * image_size, 4, batch_first=True)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.fc(self.rows(images.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class Plain:
    pass


def make(channels, num_classes, image_size):
    return Small(channels, num_classes, image_size)
