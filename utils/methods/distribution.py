r"""DM, distribution matching (Zhao & Bilen, WACV 2023): match mean features of random networks.

    J = sum over classes c of || mean over real x of phi(x) - mean over synthetic s of phi(s) ||^2

phi is what goes into the last linear layer of a fresh random network, another one in every outer
step, which is never trained. The real images are drawn anew in every step. All images of a class,
real and synthetic, share one draw of DSA.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.compute.batches import Batches, Draw
from utils.compute.contract import check_head
from utils.compute.cost import FLOAT_BYTES, TEST_COPIES, TRAINING_COPIES, NetworkCost
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten, without_head
from utils.core import ranks
from utils.core.rng import derive_seed
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work
from utils.methods.by_class import ByClassOptions, Classes, most_classes
from utils.methods.unroll.problem import blocks

# In units of one forward pass: the features of a synthetic image once without a graph, then once
# more with the way back to the image.
FEATURE_PASSES = 3
# Those of the network: the module's, on the device, and what a step casts them to.
PARAMETER_VECTORS = 3


@dataclass(frozen=True)
class DMOptions(ByClassOptions):
    """Those of matching class by class, no others."""


class DistributionMatching:
    """DM on the images of `classes`; `fresh` makes a random network from a seed.

    Classes are worked through a few at a time, and images in pieces of `micro_batch` (None: all at
    once): the gradient is the same, but for networks with batch norm.

    Memory: the images and one forward and backward pass of a piece, the features of a few classes.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        classes: Classes,
        *,
        seed: int,
        execution: Execution = PLAIN,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._fresh = fresh
        self._classes = classes
        self._seed = seed
        self._micro_batch = micro_batch
        template = execution.adapt(without_head(fresh(0))).to(classes.train.images.device)
        phi = FlatNetwork(template, dtype=dtype)

        def features(theta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            return (phi(theta, x).flatten(1),)

        def pull_back(theta: Tensor, x: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
            to_images: Callable = torch.func.vjp(lambda x: features(theta, x)[0], x)[1]
            return to_images(slopes)

        self._features = execution.prepare(features)
        self._pull_back = execution.prepare(pull_back)

    @classmethod
    def build(cls, setting: Setting) -> "DistributionMatching":
        """Build the method of a run; its flags are DMOptions."""
        return cls(
            setting.fresh,
            Classes.of(setting, "dm"),
            seed=setting.options.seed,
            execution=setting.execution,
            dtype=setting.dtype,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Match the features of one random network."""
        images = learned["images"]
        network = self._fresh(derive_seed(self._seed, "dm", iteration, "init"))
        theta = flatten(without_head(network).parameters()).detach().to(images)
        loss, grad_images = images.new_zeros(()), torch.zeros_like(images)
        for classes in self._own_classes():
            drawn = [self._classes.draw(iteration, label) for label in classes]
            value, gradient = self._match(theta, drawn, images)
            loss += value
            grad_images += gradient
        return Step(
            loss=ranks.sum_over_ranks(loss),
            grads={"images": ranks.sum_over_ranks(grad_images)},
            record={},
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def _own_classes(self) -> Iterator[range]:
        """This process's classes, as many at a time as a piece has room for."""
        own, at_once = self._classes.own, len(self._classes.own)
        if self._micro_batch is not None:
            at_once = self._micro_batch // self._classes.batch_real
        return (own[part.start : part.stop] for part in blocks(range(len(own)), max(1, at_once)))

    def _match(
        self, theta: Tensor, drawn: Sequence[tuple[Draw, Draw]], images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """J of some classes, and dJ/dimages."""
        wanted = self._means(theta, _made([real for real, _ in drawn], self._classes.train.images))
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            seen = _made([synthetic for _, synthetic in drawn], leaf)
        miss = self._means(theta, [x.detach() for x in seen]) - wanted  # (classes, F)
        ipc = self._classes.ipc
        slopes = (2 / ipc * miss).repeat_interleave(ipc, 0)  # dJ/dphi(s) of every s
        rows = torch.cat(seen)
        pieces = zip(self._pieces(rows.detach()), self._pieces(slopes), strict=True)
        by_rows = [self._pull_back(theta[None], x[None], s[None])[0][0] for x, s in pieces]
        (grad_images,) = torch.autograd.grad(rows, leaf, torch.cat(by_rows))
        return miss.square().sum(), grad_images

    @torch.no_grad()
    def _means(self, theta: Tensor, batches: Sequence[Tensor]) -> Tensor:
        """The mean features of each batch (b, C, H, W): (batches, F)."""
        pieces = self._pieces(torch.cat(list(batches)))
        features = torch.cat([self._features(theta[None], x[None])[0][0] for x in pieces])
        return torch.stack([rows.mean(0) for rows in features.split([len(x) for x in batches])])

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self._micro_batch or len(rows))


def _made(draws: Sequence[Draw], images: Tensor) -> list[Tensor]:
    """The batch (b, C, H, W) of each draw, differentiably from images (N, C, H, W)."""
    batches = Batches([[draw] for draw in draws], images.device)
    return [x[0] for x in batches.images(images)]


def count_work(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of the process with the most classes; UserError where one would have none."""
    own = most_classes(classes, processes)
    real, synthetic = own * options.batch_real, own * options.ipc
    # A forward pass without a graph keeps half of its activations at most, one with a graph and the
    # way back all of them twice. Of the two passes the larger counts, for each real image.
    copies = max(TEST_COPIES, TRAINING_COPIES * min(1, synthetic / real))
    return Work(
        flop=(real + FEATURE_PASSES * synthetic) * cost.flop,
        passes=2,
        batch=real,
        whole_batch=classes * options.batch_real,
        students=1,
        kept_bytes=PARAMETER_VECTORS * FLOAT_BYTES * cost.parameters,
        image_bytes=int(copies * cost.activation_bytes),
        compiled_layers=2 * cost.layers,
        keeps_train=True,
    )


DM = MethodSpec(
    summary="match the mean features of real and synthetic images in random networks",
    options=DMOptions,
    presets={"lr_img": 1.0, "Iteration": 20_000, "eval_it": 2_000},
    title=lambda config: "DM",
    build=DistributionMatching.build,
    count_work=count_work,
    check_network=partial(check_head, why="--method dm"),
    learned=lambda options, images, soft: [Learned("images", images, options.lr_img, "lr_img")],
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the loss is not finite: lower --lr_img",
)
