"""Class-incremental learning from condensed memory: GDumb (Prabhu et al., ECCV 2020).

Classes come in steps. After each a fresh network trains on the images of all classes so far, which
are all that was kept of them, and is tested on the test images of these classes. DC's authors tried
condensed sets so, with 20 images a class in 5 and 10 steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scripts.downstream.lines import Line
from utils.core.errors import UserError
from utils.data.dataset import ImageDataset, Split
from utils.measure.protocol import Accuracies

Train = Callable[[Line, ImageDataset], Accuracies]  # on the images of a line; tested on a data set


def class_steps(num_classes: int, steps: int) -> list[range]:
    """The classes seen after each of `steps` steps, which bring as many each.

    UserError where they do not divide the classes.
    """
    if not 1 <= steps <= num_classes or num_classes % steps:
        fit = [n for n in range(1, num_classes + 1) if num_classes % n == 0]
        raise UserError(f"--steps {steps} does not divide {num_classes} classes: choose from {fit}")
    return [range(num_classes // steps * (k + 1)) for k in range(steps)]


def learn_in_steps(
    lines: Sequence[Line], data: ImageDataset, steps: int, train: Train
) -> Iterator[tuple[str, int, Accuracies]]:
    """Of each line, after each step: its name, the number of classes so far, the accuracies."""
    for line in lines:
        for seen in class_steps(data.num_classes, steps):
            classes = torch.tensor(seen)
            tested = replace(data, test=_of_classes(data.test, classes))
            yield line.name, len(seen), train(line.only(classes), tested)


def _of_classes(split: Split, classes: Tensor) -> Split:
    chosen = torch.isin(split.labels, classes.to(split.labels.device))
    return Split(split.images[chosen], split.labels[chosen])
