"""Instance norm as the field writes it, a group norm with one channel a group, and batch norm."""

from collections.abc import Callable

from torch import nn

# Makes the norm of maps (N, width, size, size) from width and size; SingleValuesError at 1x1.
Norm = Callable[[int, int], nn.Module]


class SingleValuesError(ValueError):
    """A normalisation would see a single value at a time."""


def instance_norm(width: int, size: int) -> nn.GroupNorm:
    """Instance norm.

    A single value has no spread: normalised by itself it is zero whatever the image, and the
    network's logits would be constants.
    """
    _check_spread(size)
    return nn.GroupNorm(width, width)


def batch_norm(width: int, size: int) -> nn.BatchNorm2d:
    """Batch norm, for which 1x1 maps are single values where a batch is one image."""
    _check_spread(size)
    return nn.BatchNorm2d(width)


def _check_spread(size: int) -> None:
    if size <= 1:
        raise SingleValuesError
