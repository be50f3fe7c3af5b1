"""Measure a distilled set by kernel regression: what a kernel predicts from it; no network."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.compute.ntk import KERNELS, WORD, Kernel
from utils.compute.regression import (
    centred,
    predict,
    regression_dtype,
    rows_at_once,
    rows_of,
)
from utils.data.dataset import Split
from utils.data.distilled import SyntheticSet
from utils.data.label_forms import CENTRED
from utils.measure.protocol import Accuracies, gathered, measure_answers


@dataclass(frozen=True)
class KernelRegression:
    """Regression with a kernel; as text it is the kernel's name."""

    kernel: Kernel
    reg: float

    @classmethod
    def of(cls, distilled: SyntheticSet) -> "KernelRegression | None":
        """That of the method that made a set, if it has one."""
        config = distilled.config
        if "kernel" not in config:
            return None
        return cls(KERNELS[config["kernel"]](config["kernel_depth"]), config["reg"])

    def __str__(self) -> str:
        return str(self.kernel)

    @property
    def numbers(self) -> Tensor:
        """What it depends on, beside images, labels and the kernel."""
        return torch.tensor([self.reg], dtype=torch.float64)

    def bytes(self, distilled: SyntheticSet, tested: int) -> int:
        """Memory of predicting `tested` images from a set: a piece of the kernel, all of it, and
        the images once more.
        """
        count, *shape = distilled.images.shape
        rows = min(rows_at_once(self.kernel, shape, count), max(count, tested))
        piece = rows * count * self.kernel.pair_cost(shape, graph=False).bytes
        return piece + WORD * (tested + count) * count + WORD * (rows + count) * math.prod(shape)

    def evaluate(self, images: Tensor, labels: Tensor, test: Split, num_classes: int) -> Accuracies:
        """Measure what images (N, C, H, W) with centred labels (N, C) say of `test`."""
        dtype = regression_dtype(images.device)
        images, labels = images.to(dtype), labels.to(dtype)
        k_ss, k_ts = (rows_of(self.kernel, each, images) for each in (images, test.images))
        answers = predict(k_ts, k_ss, labels, reg=self.reg).argmax(1)
        return gathered([measure_answers(answers, test.labels, num_classes)])


def regression_labels(distilled: SyntheticSet, **like: Any) -> Tensor:
    """The labels (N, C) that a set has for regression: learned ones, else its classes."""
    if distilled.soft_labels is not None and distilled.label_form == CENTRED:
        return distilled.soft_labels.to(**like)
    return centred(distilled.labels, len(distilled.class_names), torch.float32).to(**like)
