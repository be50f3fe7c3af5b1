"""Train fresh networks on a set and measure them on other images, by the field's protocol.

SGD with momentum 0.9 and weight decay 5e-4, the learning rate multiplied by 0.1 once at half of the
epochs, cross-entropy, DSA.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.compute.cohort import Cohort, Recipe, answers, fraction_right
from utils.compute.execution import PLAIN, Execution
from utils.core import ranks
from utils.core.rng import derive_seed, stream
from utils.data.dataset import Split

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
MOST_CLASSES = 100  # of a confusion that is recorded

# How many test images of each class (row) were given each label (column).
Confusion = list[list[int]]


@dataclass(frozen=True)
class Protocol:
    """How evaluation networks are trained, apart from the set and its learning rate."""

    num_eval: int
    epochs: int
    batch_size: int
    dsa_groups: tuple[str, ...] | None


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies of equally trained networks, as fractions; where there are images held out,
    `val` has those of the same networks on them.
    """

    accs: tuple[float, ...]
    val: "Accuracies | None" = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accs)

    @property
    def std(self) -> float:
        """The population standard deviation, as the field reports it (numpy's default)."""
        return statistics.pstdev(self.accs)

    def __str__(self) -> str:
        n = len(self.accs)
        return f"{mean_and_std(100 * self.mean, 100 * self.std, n, unit='%')} (n={n})"


def mean_and_std(mean: float, std: float, n: int, *, unit: str = "") -> str:
    """Format the mean of `n` accuracies in percent with their standard deviation: 68.00 ± 1.41.

    One alone has no deviation. Means line up in a column.
    """
    spread = f" ± {std:.2f}{unit}" if n > 1 else ""
    return f"{mean:5.2f}{unit}{spread}"


@dataclass(frozen=True)
class Tested:
    """What one network reaches on each split, and its confusion on the first of them; that is empty
    where there are too many classes.
    """

    accs: tuple[float, ...]
    confusion: Confusion


@dataclass(frozen=True)
class EvalExecution:
    """How evaluation networks are computed; the same numbers up to rounding."""

    at_once: int = 1  # networks that train together in a process
    execution: Execution = PLAIN
    dtype: torch.dtype | None = None  # that networks compute in; None: that of the images


def evaluate(
    images: Tensor | list[Tensor],
    labels: Tensor,
    test: Split,
    *,
    num_classes: int,
    model: str,
    lr: float,
    protocol: Protocol,
    seed: int,
    run: EvalExecution = EvalExecution(),
    val: Split | None = None,
    known: Mapping[int, float] | None = None,
    keep: Callable[[dict[int, float], dict[int, Confusion]], object] = lambda *tested: None,
) -> Accuracies:
    """Accuracies of `protocol.num_eval` fresh networks `model` trained on images (N, C, H, W), or
    on as many different sets of images for the same labels (N,); measured on `test` and, where it
    is given, on `val`.

    Network k depends on `seed` and k alone. Several processes divide the networks among them, in
    rounds of `run.at_once` each. The accuracies `known`, by k and the same on all processes, are
    taken over, where there is no `val`; those of each round are given to `keep` on all processes
    when it ends, with the networks' confusions on `test` where these have MOST_CLASSES or fewer.
    """
    splits = [test] if val is None else [test, val]
    recipe = Recipe(
        model,
        channels=test.images.shape[1],
        num_classes=num_classes,
        image_size=test.images.shape[2],
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        execution=run.execution,
        dtype=run.dtype,
    )
    accs: dict[int, tuple[float, ...]] = {k: (acc,) for k, acc in (known or {}).items()}
    missing = [k for k in range(protocol.num_eval) if k not in accs]
    for numbers in ranks.rounds_of_this_rank(missing, run.at_once):
        own: dict[int, Tested] = {}
        if numbers:
            seen = torch.stack([images[k] for k in numbers]) if isinstance(images, list) else images
            measured = _train_and_measure(recipe, numbers, seen, labels, splits, lr, protocol, seed)
            own = dict(zip(numbers, measured, strict=True))
        trained = {k: each for part in ranks.gather(own) for k, each in part.items()}
        confusions = {k: each.confusion for k, each in trained.items() if each.confusion}
        keep({k: each.accs[0] for k, each in trained.items()}, confusions)
        accs |= {k: each.accs for k, each in trained.items()}
    on_test, *on_val = zip(*(accs[k] for k in range(protocol.num_eval)), strict=True)
    return Accuracies(on_test, *map(Accuracies, on_val))


def _train_and_measure(
    recipe: Recipe,
    numbers: Sequence[int],
    images: Tensor,
    labels: Tensor,
    splits: Sequence[Split],
    lr: float,
    protocol: Protocol,
    seed: int,
) -> list[Tested]:
    """Train the networks `numbers` and measure each on `splits`."""
    cohort = Cohort(
        recipe,
        [derive_seed(seed, "init", k) for k in numbers],
        device=labels.device,
        dtype=splits[0].images.dtype,
    )
    generators = [stream(seed, "minibatch", k) for k in numbers]
    before_decay = protocol.epochs // 2 if protocol.epochs > 1 else protocol.epochs
    for epochs, rate in ((before_decay, lr), (protocol.epochs - before_decay, 0.1 * lr)):
        if epochs > 0:
            cohort.train(
                images,
                labels,
                epochs=epochs,
                lr=rate,
                batch_size=protocol.batch_size,
                dsa_groups=protocol.dsa_groups,
                generators=generators,
            )
    return [_test(network, splits, recipe.num_classes) for network in cohort.networks]


def _test(network: nn.Module, splits: Sequence[Split], num_classes: int) -> Tested:
    given = [answers(network, split.images) for split in splits]
    pairs = zip(given, splits, strict=True)
    accs = tuple(fraction_right(each, split.labels) for each, split in pairs)
    if num_classes > MOST_CLASSES:
        return Tested(accs, [])
    cells = splits[0].labels * num_classes + given[0]
    counts = cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    return Tested(accs, counts.tolist())
