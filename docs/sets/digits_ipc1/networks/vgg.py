"""VGG11 with a norm behind every convolution and one linear layer on 512 features."""

from torch import Tensor, nn

from networks.norm import Norm, instance_norm

PLAN: list[int | None] = [64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None]


class VGG11(nn.Module):
    """Map images (N, channels, size, size) to logits (N, num_classes).

    `None` in PLAN is a max pooling. The norm needs 32x32 at least; larger images leave a map
    larger than 1x1, which is averaged.
    """

    def __init__(
        self, channels: int, num_classes: int, image_size: int, *, norm: Norm = instance_norm
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size, width = image_size, channels
        for out in PLAN:
            if out is not None:
                layers += [
                    nn.Conv2d(width, out, 3, padding=1),
                    norm(out, size),
                    nn.ReLU(inplace=True),
                ]
                width = out
            else:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))
