"""Train fresh networks on a set and measure them on other images, by the field's protocol.

SGD with momentum 0.9 and weight decay 5e-4, the learning rate multiplied by 0.1 once at half of the
epochs, cross-entropy, DSA.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from utils.compute.batches import Draw
from utils.compute.cohort import Cohort, Recipe, answers
from utils.compute.execution import PLAIN, Execution
from utils.compute.optimisers import Adam
from utils.core import ranks
from utils.core.rng import derive_seed, stream
from utils.data.dataset import Split
from utils.data.recipe import MOMENTUM, WEIGHT_DECAY, phases


@dataclass(frozen=True)
class Protocol:
    """How evaluation networks are trained, apart from the set and its learning rate."""

    num_eval: int
    epochs: int
    batch_size: int
    dsa_groups: tuple[str, ...] | None


# Of one network, for each class; None for a class without test images.
ByClass = tuple[float | None, ...]
# A row for each class: how many of its images were given each label.
Confusion = Sequence[Sequence[int]]
MOST_CLASSES = 100  # of which a confusion is kept


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies of equally trained networks, as fractions; where there are images held out,
    `val` has those of the same networks on them. `by_class` has those of each network by class; it
    is empty where some of them were measured before that was kept. `confusion` is the sum of those
    of the networks.
    """

    accs: tuple[float, ...]
    val: "Accuracies | None" = None
    by_class: tuple[ByClass, ...] = ()
    confusion: Confusion = ()

    @property
    def of_classes(self) -> "list[Accuracies | None]":
        """The accuracies on each class; None for one without test images."""
        columns = zip(*self.by_class, strict=True)
        return [None if None in column else Accuracies(column) for column in columns]

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


class OwnTraining(Interface):
    """How the method of a set trains networks on it, in place of the protocol; not augmented."""

    @property
    def optimiser(self) -> Mapping[str, Any]:
        """That of the Recipe."""
        ...

    @property
    def numbers(self) -> Tensor:
        """The numbers (n,) that it depends on, beside images and labels."""
        ...

    def train(
        self, cohort: Cohort, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> None:
        """Train a cohort on images (N, C, H, W); what is drawn for a network comes from its
        generator.
        """
        ...


@dataclass(frozen=True)
class LearnedSteps:
    """Training that was learned itself: a step on each of `batches` at each of `rates` (T,), in
    order, by plain SGD.
    """

    batches: Sequence[Tensor]  # numbers of the images, T times
    rates: Tensor

    @property
    def optimiser(self) -> Mapping[str, Any]:
        return {}

    @property
    def numbers(self) -> Tensor:
        return self.rates

    def train(
        self, cohort: Cohort, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> None:
        cohort.follow(images, labels, self.batches, self.rates)


@dataclass(frozen=True)
class AdamSteps:
    """`steps` steps of Adam at the rate `lr`, each on `batch_size` random images."""

    steps: int
    batch_size: int
    lr: float

    @property
    def optimiser(self) -> Mapping[str, Any]:
        return {"adam": Adam()}

    @property
    def numbers(self) -> Tensor:
        return torch.tensor([self.steps, self.batch_size, self.lr], dtype=torch.float64)

    def train(
        self, cohort: Cohort, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> None:
        plans = [random_batches(len(images), self.batch_size, each) for each in generators]
        rates = torch.full((self.steps, len(plans)), self.lr).to(images)
        cohort.train_on(images, labels, plans, rates=rates)


def random_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Draw]:
    """Endless batches of `size` random ones of `count` images, not augmented."""
    while True:
        yield Draw(torch.randperm(count, generator=generator)[:size], None)


SGD = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


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
    label_form: str | None = None,
    own_training: OwnTraining | None = None,
    run: EvalExecution = EvalExecution(),
    val: Split | None = None,
    known: Mapping[int, "Measured"] | None = None,
    keep: Callable[[dict[int, "Measured"]], object] = lambda measured: None,
    look: Callable[[int, nn.Module], object] = lambda number, network: None,
) -> Accuracies:
    """Accuracies of `protocol.num_eval` fresh networks `model` trained on images (N, C, H, W), or
    on as many different sets of images for the same labels: (N,), or (N, classes) of a
    `label_form`; measured on `test` and, where it is given, on `val`. An `own_training` takes the
    place of the protocol's.

    Network k depends on `seed` and k alone. Several processes divide the networks among them, in
    rounds of `run.at_once` each; networks with a randomness of their own (dropout) train one by
    one. What is `known`, by k and the same on all processes, is taken over, where there is no
    `val`; what each round measures is given to `keep` on all processes when it ends. `look` is
    shown each network that was trained here, with its number.
    """
    splits = [test] if val is None else [test, val]
    recipe = Recipe(
        model,
        channels=test.images.shape[1],
        num_classes=num_classes,
        image_size=test.images.shape[2],
        execution=run.execution,
        dtype=run.dtype,
        label_form=label_form,
        **(SGD if own_training is None else own_training.optimiser),
    )
    measured: dict[int, list[Measured]] = {k: [each] for k, each in (known or {}).items()}
    missing = [k for k in range(protocol.num_eval) if k not in measured]
    at_once = run.at_once if recipe.abilities.repeats else 1
    for numbers in ranks.rounds_of_this_rank(missing, at_once):
        own: dict[int, list[Measured]] = {}
        if numbers:
            seen = torch.stack([images[k] for k in numbers]) if isinstance(images, list) else images
            networks = _train_networks(
                recipe, numbers, seen, labels, splits[0], lr, protocol, seed, own_training
            )
            for number, network in zip(numbers, networks, strict=True):
                own[number] = [measure(network, split, num_classes) for split in splits]
                look(number, network)
        trained = {k: each for part in ranks.gather(own) for k, each in part.items()}
        keep({k: each[0] for k, each in trained.items()})
        measured |= trained
    on_test, *on_val = zip(*(measured[k] for k in range(protocol.num_eval)), strict=True)
    return gathered(on_test, *map(gathered, on_val))


@dataclass(frozen=True)
class Measured:
    """What one network reached on the images of a split; `by_class` and `confusion` are empty where
    unknown, `confusion` also where there are more than MOST_CLASSES.
    """

    acc: float
    by_class: ByClass = ()
    confusion: Confusion = ()


def gathered(measured: Sequence[Measured], val: Accuracies | None = None) -> Accuracies:
    """The accuracies of several networks."""
    by_class = tuple(each.by_class for each in measured)
    confusions = [each.confusion for each in measured if each.confusion]
    total = torch.tensor(confusions).sum(0).tolist() if confusions else ()
    return Accuracies(
        tuple(each.acc for each in measured), val, by_class if all(by_class) else (), total
    )


def measure(network: nn.Module, split: Split, num_classes: int) -> Measured:
    """The accuracies of `network` on the images of `split`."""
    return measure_answers(answers(network, split.images), split.labels, num_classes)


def measure_answers(given: Tensor, labels: Tensor, num_classes: int) -> Measured:
    """The accuracies of answers (N,) to images with these labels (N,)."""
    cells = (labels * num_classes + given).cpu()
    counts = cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    hits, totals = counts.diag().tolist(), counts.sum(1).tolist()
    by_class = tuple(n / of if of else None for n, of in zip(hits, totals, strict=True))
    confusion = counts.tolist() if num_classes <= MOST_CLASSES else ()
    return Measured(sum(hits) / len(cells), by_class, confusion)


def _train(
    cohort: Cohort,
    images: Tensor,
    labels: Tensor,
    lr: float,
    protocol: Protocol,
    generators: Sequence[torch.Generator],
) -> None:
    """Train a cohort by the protocol."""
    for epochs, rate in phases(lr, protocol.epochs):
        cohort.train(
            images,
            labels,
            epochs=epochs,
            lr=rate,
            batch_size=protocol.batch_size,
            dsa_groups=protocol.dsa_groups,
            generators=generators,
        )


def _train_networks(
    recipe: Recipe,
    numbers: Sequence[int],
    images: Tensor,
    labels: Tensor,
    test: Split,
    lr: float,
    protocol: Protocol,
    seed: int,
    own_training: OwnTraining | None,
) -> Sequence[nn.Module]:
    """Train the networks `numbers`, which compute as `test` is stored."""
    if not recipe.abilities.repeats:
        torch.manual_seed(derive_seed(seed, "network", *numbers))
    cohort = Cohort(
        recipe,
        [derive_seed(seed, "init", k) for k in numbers],
        device=labels.device,
        dtype=test.images.dtype,
    )
    generators = [stream(seed, "minibatch", k) for k in numbers]
    if own_training is None:
        _train(cohort, images, labels, lr, protocol, generators)
    else:
        own_training.train(cohort, images, labels, generators)
    return cohort.networks
