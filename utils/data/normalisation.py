"""How an image in [0, 1] becomes what the network sees, and the way back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from kornia.enhance import ZCAWhitening
from torch import Tensor

from utils.core.errors import UserError

ZCA_EPS = 0.1
MAX_ZCA_VALUES = 64 * 64 * 3
CHUNK = 4096  # images handled at a time
MIN_STD = 1e-6  # of values in [0, 1] that are floats; what varies less is rounding


@dataclass(frozen=True, eq=False)
class Normalisation:
    """Per-channel standardisation, then, if `zca`, whitening of the flattened image.

    With x an image in [0, 1], flattened to D = C*H*W values where it is whitened:

        forward:  z = (x - mean) / std,  or with ZCA  z = (x - zca_mean) @ zca_matrix
        inverse:  x = z * std + mean,    or with ZCA  x = z @ zca_matrix^-1 + zca_mean

    With ZCA there is no mean/std normalisation: mean is 0 and std 1 in every channel.

    Attributes:
        mean, std: one number a channel, in units of [0, 1] images.
        zca: whether images are whitened.
        zca_mean: (D,), and zca_matrix: (D, D), symmetric, 37 MB for 3x32x32. Both are None
            without ZCA, and where the description was stored without its whitening
            (`needs_fit`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: bool = False
    zca_mean: Tensor | None = None
    zca_matrix: Tensor | None = None

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def needs_fit(self) -> bool:
        """Whether images are whitened by a matrix that is not here; see `fit_zca`."""
        return self.zca and self.zca_matrix is None

    def forward(self, images01: Tensor) -> Tensor:
        """What the network sees of (N, C, H, W) floats in [0, 1]; same shape, dtype, device."""
        if self.zca:
            mean, matrix = self._whitening(images01)
            return _by_chunk(images01, lambda flat: (flat - mean) @ matrix)
        mean, std = self._statistics(images01)
        return (images01 - mean) / std

    def inverse(self, images: Tensor) -> Tensor:
        """The images in [0, 1] (not clamped) behind what the network sees; undoes `forward`."""
        if self.zca:
            mean, _ = self._whitening(images)
            inverse = self._zca_inverse.to(images)
            return _by_chunk(images, lambda flat: flat @ inverse + mean)
        mean, std = self._statistics(images)
        return images * std + mean

    @classmethod
    def whitened(cls, channels: int, zca_mean: Tensor, zca_matrix: Tensor) -> "Normalisation":
        """ZCA alone; `zca_mean` (D,), `zca_matrix` (D, D)."""
        return cls((0.0,) * channels, (1.0,) * channels, True, zca_mean, zca_matrix)

    def to_dict(self, include_whitening: bool = True) -> dict[str, Any]:
        """Convert to plain values and CPU tensors that `torch.load(weights_only=True)` reads back.

        Without the whitening, only `zca=True` is recorded of it: small, but whoever reads it
        needs the training images to fit it again.
        """
        values: dict[str, Any] = {"mean": self.mean, "std": self.std, "zca": self.zca}
        if include_whitening and self.zca_mean is not None and self.zca_matrix is not None:
            values |= {"zca_mean": self.zca_mean.cpu(), "zca_matrix": self.zca_matrix.cpu()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Normalisation":
        """Undo `to_dict`; other keys are ignored, so `values` may be a whole distilled set."""
        return cls(
            mean=tuple(map(float, values["mean"])),
            std=tuple(map(float, values["std"])),
            zca=bool(values["zca"]),
            zca_mean=values.get("zca_mean"),
            zca_matrix=values.get("zca_matrix"),
        )

    @cached_property
    def _zca_inverse(self) -> Tensor:
        # eps bounds the condition number, so inverting beats storing a second (D, D) matrix.
        assert self.zca_matrix is not None
        return torch.linalg.inv(self.zca_matrix)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """mean and std as (C, 1, 1) with the dtype and device of `like`."""
        mean, std = (like.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def _whitening(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """zca_mean and zca_matrix with the dtype and device of `like`."""
        if self.zca_mean is None or self.zca_matrix is None:
            raise UserError(
                "the images are ZCA-whitened, but their file holds no whitening: "
                "load the training images to fit it again"
            )
        return self.zca_mean.to(like), self.zca_matrix.to(like)


def in_unit_range(pixels: Tensor) -> Tensor:
    """Images in [0, 1], float32, of pixels as they are read: bytes, or such images already."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def fit_mean_std(pixels: Tensor) -> Normalisation:
    """Fit mean and standard deviation of each channel of images (N, C, H, W), uint8 or float32.

    Both are over [0, 1]. A channel that never changes gets the std of one grey level of 8 bits, so
    that nothing divides by 0.
    """
    fit = _moments_of_bytes if pixels.dtype == torch.uint8 else _moments
    mean, std = zip(*(fit(channel) for channel in pixels.unbind(1)), strict=True)
    return Normalisation(mean, std)


def _moments_of_bytes(channel: Tensor) -> tuple[float, float]:
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
    mean = (share * levels).sum().item()
    return mean, max((share * (levels - mean) ** 2).sum().sqrt().item(), 1 / 255)


def _moments(channel: Tensor) -> tuple[float, float]:
    mean = sum(part.double().sum().item() for part in channel.split(CHUNK)) / channel.numel()
    squares = sum((part.double() - mean).square().sum().item() for part in channel.split(CHUNK))
    std = math.sqrt(squares / channel.numel())
    return mean, std if std > MIN_STD else 1 / 255


def fit_zca(images01: Tensor) -> Normalisation:
    """Fit the whitening of the training images (N, C, H, W), floats in [0, 1].

    Kornia's ZCA with eps 0.1: with U S U^T the covariance of the flattened images, the matrix
    is U (S + eps)^-1/2 U^T. Memory: a centred copy of the images and sixteen (D, D)
    matrices, D = C*H*W, nearly all of them those of the decomposition (measured for D = 3,072).

    Raises:
        UserError: D is too large (see `check_zca_size`), or there are fewer than two images.
    """
    count, channels, height, width = images01.shape
    check_zca_size(channels, height, width)
    if count < 2:
        raise UserError(f"ZCA needs at least 2 training images, got {count}: leave --zca out")
    zca = ZCAWhitening(eps=ZCA_EPS, compute_inv=True).fit(images01)
    return Normalisation.whitened(channels, zca.mean_vector.flatten(), zca.transform_matrix)


def check_zca_size(channels: int, height: int, width: int) -> None:
    """Refuse ZCA for images of more than 64x64x3 values, whose matrix would not be practical."""
    values = channels * height * width
    if values > MAX_ZCA_VALUES:
        raise UserError(
            f"ZCA of {height}x{width} images with {channels} channels needs a matrix of "
            f"{4 * values**2 / 1e9:.1f} GB: leave --zca out, or use images of at most "
            f"{MAX_ZCA_VALUES} values (64x64x3)"
        )


def _by_chunk(images: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `transform`, (n, D) -> (n, D), to the flattened images, a bounded number at a time."""
    chunks = [transform(chunk.flatten(1)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).view_as(images)
