"""Instance norm as the field writes it: a group norm with one channel a group."""

from torch import nn


class SingleValuesError(ValueError):
    """A normalisation would see a single value at a time."""


def instance_norm(width: int, size: int) -> nn.GroupNorm:
    """Instance norm of maps (N, width, size, size); SingleValuesError at 1x1.

    A single value has no spread: normalised by itself it is zero whatever the image, and the
    network's logits would be constants.
    """
    if size <= 1:
        raise SingleValuesError
    return nn.GroupNorm(width, width)
