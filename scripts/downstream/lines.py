"""What the experiments compare: the distilled set, and as many random real images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.measure.sets import TrainingSet


@dataclass(frozen=True)
class Line:
    """A training set with the class (N,) of each image, whatever its labels are."""

    training_set: TrainingSet
    classes: Tensor

    @property
    def name(self) -> str:
        return self.training_set.name

    def only(self, classes: Tensor) -> "Line":
        """The part of it that is of these classes."""
        whole = self.training_set
        kept = torch.isin(self.classes, classes.to(self.classes.device))
        images = whole.images
        part = replace(
            whole,
            images=images[kept] if isinstance(images, Tensor) else [each[kept] for each in images],
            labels=whole.labels[kept],
        )
        return Line(part, self.classes[kept])


def lines_of(sets: Iterable[TrainingSet], classes: Tensor) -> Iterator[Line]:
    """The training sets that networks train on by the common protocol; `classes` (N,) are those of
    the distilled images. What follows steps or a kernel of its own is left out.
    """
    for each in sets:
        if each.own_training is None and each.regression is None:
            yield Line(each, classes if each.label_form else each.labels)
