"""ConvNetKIP: the wide ConvNet without norm that KIP's sets are published with."""

import math

from torch import nn

from networks.convnet import ConvNet

# Of the initial weights times their inputs' number, and of the biases: those of KIP's kernels.
WEIGHT_VARIANCE, BIAS_VARIANCE = 2.0, 0.01


class ConvNetKIP(ConvNet):
    """ConvNet of depth 3 without norm, behind a convolution with ReLU.

    Nguyen et al., NeurIPS 2021. Initial weights are normal, of variance 2 / inputs, and biases of
    0.01, as KIP's kernels have them. PyTorch's own would divide the variance of a signal by six in
    every layer, and there is no norm to undo that.
    """

    def __init__(
        self, channels: int, num_classes: int, image_size: int, *, width: int = 1024
    ) -> None:
        super().__init__(width, num_classes, image_size, width=width, norm="none")
        front = nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)
        self.features = nn.Sequential(*front, *self.features)
        for param in self.parameters():
            is_bias = param.dim() == 1
            variance = BIAS_VARIANCE if is_bias else WEIGHT_VARIANCE / param[0].numel()
            nn.init.normal_(param, std=math.sqrt(variance))
