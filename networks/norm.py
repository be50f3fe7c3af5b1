"""Instance norm as the field writes it: a group norm with one channel a group."""

from torch import nn


def instance_norm(width: int, size: int) -> nn.GroupNorm:
    """Instance norm of maps (N, width, size, size); at 1x1 one group over all channels.

    A single value has no spread: normalised by itself it is zero whatever the image, and the
    network's logits would be constants.
    """
    return nn.GroupNorm(width if size > 1 else 1, width)
