r"""KIP, kernel inducing points (Nguyen et al., ICLR 2021): learn the images that a kernel predicts
others from.

    J = 1/2 mean over real (t, y_t) and classes of (K_ts (K_ss + reg tr(K_ss) / n I)^-1 y_s - y_t)^2

s are the n images, y_s their labels, K the neural tangent kernel of a network. No network is
trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.compute.cost import NetworkCost
from utils.compute.ntk import KERNELS, WORD, Convolutional, Kernel, PairCost
from utils.compute.regression import centred, own_pieces, predict, regression_dtype
from utils.config.fields import option
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import ImageDataset, Split
from utils.data.label_forms import CENTRED
from utils.data.real_images import class_labels
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work, real_or_noise
from utils.methods.unroll.options import LabelOptions, NetworkRateOptions, RealBatchOptions

_GROUP = "kernel regression (KIP, Label Solve)"
BETAS = (0.9, 0.999)
# Matrices of K's size that a step holds: K, its gradient, and what solving makes.
KERNEL_COPIES = 4


@dataclass(frozen=True)
class KernelOptions(NetworkRateOptions):
    kernel: str = option(
        "fc",
        "neural tangent kernel of a fully connected network, or of a ConvNet without norm",
        group=_GROUP,
        choices=KERNELS,
    )
    kernel_depth: int = option(
        1,
        "hidden layers of fc; of conv blocks with pooling, behind a first convolution",
        group=_GROUP,
        minimum=1,
        maximum=100,
    )
    reg: float = option(
        1e-6, "ridge, as a part of the kernel's mean diagonal", group=_GROUP, above=0
    )


@dataclass(frozen=True)
class KIPOptions(KernelOptions, RealBatchOptions, LabelOptions):
    learn_labels: bool = option(False, "learn the labels, too", group=_GROUP)


class KernelInducingPoints:
    """KIP on the training images `train`. labels (N,) are the classes of the synthetic images.

    Several processes divide the rows of the kernel, real and synthetic images alike, which are
    worked through in pieces of `micro_batch` (None: all at once): the gradient is the same.
    Memory: the kernel, and the graph of a piece of it.
    """

    def __init__(
        self,
        kernel: Kernel,
        train: Split,
        labels: Tensor,
        *,
        num_classes: int,
        batch_target: int,
        reg: float,
        seed: int,
        micro_batch: int | None = None,
    ) -> None:
        self._kernel = kernel
        self._train = train
        self._dtype = regression_dtype(labels.device)
        self._labels = centred(labels, num_classes, self._dtype)
        self._batch = batch_target
        self._reg = reg
        self._seed = seed
        self._micro_batch = micro_batch
        of_train = train.labels.cpu()
        self._members = [(of_train == label).nonzero().flatten() for label in range(num_classes)]

    @classmethod
    def build(cls, setting: Setting) -> "KernelInducingPoints":
        """Build the method of a run; its flags are KIPOptions."""
        options = setting.options
        assert setting.train is not None
        return cls(
            kernel_of(options),
            setting.train,
            setting.labels,
            num_classes=len(setting.labels) // options.ipc,
            batch_target=options.batch_target,
            reg=options.reg,
            seed=options.seed,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Predict one batch of real images."""
        images = learned["images"].to(self._dtype)
        labels = learned.get("labels", self._labels).to(self._dtype)
        targets, wanted = self.draw(iteration)
        kernel = self._whole(images, targets)
        loss, by_kernel, by_labels = self._regress(kernel, labels, wanted)
        by_images = self._pull_back(by_kernel, images, targets)
        found = {"images": by_images, "labels": by_labels}
        return Step(
            loss=loss,
            grads={name: found[name].to(value) for name, value in learned.items()},
            record={},
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def draw(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Draw different real images, as many of each class as there are or one fewer (which
        classes, is drawn), with their centred labels.
        """
        generator = stream(self._seed, "kip", iteration)
        classes, each = len(self._members), self._batch // len(self._members)
        one_more = torch.randperm(classes, generator=generator)[: self._batch % classes].tolist()
        chosen = [
            members[torch.randperm(len(members), generator=generator)[: each + (k in one_more)]]
            for k, members in enumerate(self._members)
        ]
        numbers = torch.cat(chosen).to(self._train.images.device)
        images, labels = self._train.images[numbers], self._train.labels[numbers]
        return images.to(self._dtype), centred(labels, classes, self._dtype)

    def _pieces(self, images: Tensor, targets: Tensor) -> Sequence[tuple[int, int]]:
        """Where this process's pieces of all rows, synthetic images before real ones, begin and
        end.
        """
        count = len(images) + len(targets)
        return list(own_pieces(count, self._micro_batch or count))

    @torch.no_grad()
    def _whole(self, images: Tensor, targets: Tensor) -> Tensor:
        """K of all images with the synthetic ones: (n + m, n)."""
        kernel = images.new_zeros(len(images) + len(targets), len(images))
        for start, end in self._pieces(images, targets):
            kernel[start:end] = self._kernel(_rows(images, targets, start, end), images)
        return ranks.sum_over_ranks(kernel)

    @torch.enable_grad()
    def _regress(
        self, kernel: Tensor, labels: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """J, dJ/dK and dJ/dlabels."""
        kernel, labels = kernel.requires_grad_(), labels.detach().requires_grad_()
        k_ss, k_ts = kernel.split([len(labels), len(wanted)])
        miss = predict(k_ts, k_ss, labels, reg=self._reg) - wanted
        loss = miss.square().mean() / 2
        by_kernel, by_labels = torch.autograd.grad(loss, (kernel, labels))
        return loss.detach(), by_kernel, by_labels

    @torch.enable_grad()
    def _pull_back(self, by_kernel: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """dJ/dimages, from dJ/dK: one piece of K again, with its graph, at a time."""
        leaf, total = images.detach().requires_grad_(), torch.zeros_like(images)
        for start, end in self._pieces(images, targets):
            kernel = self._kernel(_rows(leaf, targets, start, end), leaf)
            total += torch.autograd.grad(kernel, leaf, by_kernel[start:end])[0]
        return ranks.sum_over_ranks(total)


def _rows(images: Tensor, targets: Tensor, start: int, end: int) -> Tensor:
    """Some of all images, synthetic before real ones."""
    count = len(images)
    return torch.cat([images[start:end], targets[max(start - count, 0) : max(end - count, 0)]])


def kernel_of(options: Any) -> Kernel:
    """That of KernelOptions."""
    return KERNELS[options.kernel](options.kernel_depth)


def initial_labels(options: Any, data: ImageDataset, experts: Any) -> tuple[Tensor, Tensor]:
    """Begin with real images or noise, and their classes as centred labels."""
    images, _ = real_or_noise(options, data, experts)
    labels = class_labels(data.num_classes, options.ipc, images.device)
    return images, centred(labels, data.num_classes, images.dtype)


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    found = [Learned("images", images, options.lr_img, "lr_img", adam=BETAS)]
    if options.learn_labels:
        assert soft is not None
        found.append(Learned("labels", soft, options.lr_y, "lr_y", adam=BETAS))
    return found


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    if by_hand("lr_y") and not options.learn_labels:
        raise UserError("--lr_y is a rate of labels: pass --learn_labels too, or leave it out")


def pair_cost(options: Any, cost: NetworkCost, *, graph: bool) -> PairCost:
    """What the kernel costs for a pair of images; UserError where these are too small for it."""
    kernel, side = kernel_of(options), cost.image_shape[-1]
    if isinstance(kernel, Convolutional) and side < kernel.least_side:
        raise UserError(
            f"--kernel_depth {options.kernel_depth} needs images of {kernel.least_side} pixels, "
            f"these have {side}: choose at most {side.bit_length() - 1}"
        )
    return kernel.pair_cost(cost.image_shape, graph=graph)


def count_kip(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of an outer step: K without a graph, then once more with the way back."""
    images = classes * options.ipc
    rows = images + options.batch_target
    looked, differentiated = (pair_cost(options, cost, graph=graph) for graph in (False, True))
    own = -(-rows // processes)
    return Work(
        flop=own * images * (looked.flop + differentiated.flop),
        passes=2,
        batch=own,
        whole_batch=rows,
        students=1,
        kept_bytes=WORD * rows * (KERNEL_COPIES * images + 2 * math.prod(cost.image_shape)),
        image_bytes=images * differentiated.bytes,
        compiled_layers=0,
        keeps_train=True,
    )


KIP = MethodSpec(
    summary="learn images that a kernel predicts real ones from",
    options=KIPOptions,
    presets={
        "lr_img": 0.04,
        "lr_y": 0.04,
        "batch_target": 5_000,
        "Iteration": 1_000,
        "eval_it": 1_000,
        "select": "last",
    },
    title=lambda config: "KIP",
    build=KernelInducingPoints.build,
    initial=initial_labels,
    learned=_learned,
    label_form=lambda options: CENTRED if options.learn_labels else None,
    count_work=count_kip,
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the loss is not finite: raise --reg or lower --lr_img",
    check=_check,
)
