"""What is known of each data set before its files are looked at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """Square images of so many channels and classes, `side` pixels high and wide."""

    channels: int
    classes: int
    side: int


@dataclass(frozen=True)
class DataFacts:
    """Images as a call without --res gets them, and how many there are.

    `is_native`: `side` is the images' own size, else only the default.
    """

    spec: ImageSpec
    train: int
    test: int
    is_native: bool = True


KNOWN = {
    "digits": DataFacts(ImageSpec(1, 10, 8), train=1437, test=360),
    "CIFAR10": DataFacts(ImageSpec(3, 10, 32), train=50_000, test=10_000),
    "CIFAR100": DataFacts(ImageSpec(3, 100, 32), train=50_000, test=10_000),
    "MNIST": DataFacts(ImageSpec(1, 10, 28), train=60_000, test=10_000),
    "FashionMNIST": DataFacts(ImageSpec(1, 10, 28), train=60_000, test=10_000),
    "SVHN": DataFacts(ImageSpec(3, 10, 32), train=73_257, test=26_032),
    "Tiny": DataFacts(ImageSpec(3, 200, 64), train=100_000, test=10_000),
    # A subset of ten classes; their training images are about 13,000, by subset.
    "ImageNet": DataFacts(ImageSpec(3, 10, 128), train=13_000, test=500, is_native=False),
}
FOLDER_SIDE = 32  # of the user's own pictures


def side_of(dataset: str, res: int | None) -> int:
    """The side of the images: `res` where it is given, else the data set's own or its default."""
    return res or (KNOWN[dataset].spec.side if dataset in KNOWN else FOLDER_SIDE)


def is_native(dataset: str, res: int) -> bool:
    """Whether the images of `dataset` have the side `res` by themselves."""
    return dataset in KNOWN and KNOWN[dataset].is_native and KNOWN[dataset].spec.side == res
