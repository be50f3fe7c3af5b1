r"""Label Solve (Nguyen et al., ICLR 2021): the labels from which a kernel predicts others best.

    y_s = argmin || K_ts (K_ss + reg tr(K_ss) / n I)^-1 y_s - y_t ||^2

over all training images t. One step does it, more change nothing; the images s are real and stay
as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.compute.cost import NetworkCost
from utils.compute.ntk import WORD, Kernel
from utils.compute.regression import (
    centred,
    least_squares,
    own_pieces,
    regression_dtype,
    regularised,
    rows_of,
)
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.data.label_forms import CENTRED
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work
from utils.methods.kip import KERNEL_COPIES, KernelOptions, initial_labels, kernel_of, pair_cost

LARGEST_PIECE = 1_000  # training images at a time, at most


class LabelSolve:
    """Label Solve on the training images `train`, which several processes divide.

    Memory: two matrices (n + C, n + C), and the kernel of a piece of `micro_batch` images.
    """

    def __init__(
        self,
        kernel: Kernel,
        train: Split,
        *,
        num_classes: int,
        reg: float,
        micro_batch: int | None = None,
    ) -> None:
        self._kernel = kernel
        self._train = train
        self._num_classes = num_classes
        self._reg = reg
        self._size = micro_batch or LARGEST_PIECE

    @classmethod
    def build(cls, setting: Setting) -> "LabelSolve":
        """Build the method of a run; its flags are KernelOptions."""
        options = setting.options
        assert setting.train is not None
        return cls(
            kernel_of(options),
            setting.train,
            num_classes=len(setting.labels) // options.ipc,
            reg=options.reg,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Solve for the labels; the gradient is what a step at the rate 1 takes away."""
        images, labels = learned["images"], learned["labels"]
        images = images.to(regression_dtype(images.device))
        count = len(images)
        weights, square = least_squares(
            self._pieces(images), images.new_empty(0, count + self._num_classes), columns=count
        )
        solved = regularised(rows_of(self._kernel, images, images), self._reg) @ weights
        return Step(
            loss=square / (2 * len(self._train.labels) * self._num_classes),
            grads={"labels": labels - solved.to(labels)},
            record={},
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def _pieces(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """K_ts and y_t, as far as they are this process's, a piece at a time."""
        for start, end in own_pieces(len(self._train.labels), self._size):
            labels = centred(self._train.labels[start:end], self._num_classes, images.dtype)
            with torch.no_grad():
                yield self._kernel(self._train.images[start:end].to(images), images), labels


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.pix_init != "real":
        raise UserError(
            f"--pix_init {options.pix_init}: --method label_solve labels real images: choose real"
        )


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    assert soft is not None
    return [Learned("labels", soft, 1.0, "reg", momentum=0.0)]


def count_label_solve(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the one step: the kernel of all training images with the synthetic ones."""
    images = classes * options.ipc
    pair = pair_cost(options, cost, graph=False)
    return Work(
        flop=0,
        passes=1,
        batch=LARGEST_PIECE,
        whole_batch=processes * LARGEST_PIECE,
        students=1,
        kept_bytes=KERNEL_COPIES * WORD * (images + classes) ** 2,
        image_bytes=images * (pair.bytes + 2 * WORD),
        compiled_layers=0,
        keeps_train=True,
        train_flop=images * pair.flop // processes,
    )


LABEL_SOLVE = MethodSpec(
    summary="solve for the labels of real images from which a kernel predicts others best",
    options=KernelOptions,
    presets={"Iteration": 1, "eval_it": 1, "select": "last"},
    title=lambda config: "Label Solve",
    build=LabelSolve.build,
    initial=initial_labels,
    learned=_learned,
    learns_images=False,
    label_form=lambda options: CENTRED,
    count_work=count_label_solve,
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the labels are not finite: raise --reg",
    check=_check,
)
