r"""CAFE, aligning features (Wang et al., CVPR 2022): match every layer, and tell classes apart.

    J = sum over layers k and classes c of w_k || mean over real x of f_k(x) - m_kc ||^2
      + beta sum over real (x, y) of l((<f(x), m_1>, ..., <f(x), m_C>), y)

f_k are the activations of one network and, as the last of them, f, what its last block ends with;
m_kc and m_c are the means of f_k and f over the synthetic images of class c. All images of a class
share one draw of DSA, where there is any.

The network begins at random. Between outer steps it trains on the synthetic images by SGD, epoch by
epoch, until its accuracy on real images has moved: by more than lambda_2 within the last WINDOW
epochs. When its accuracy is flat, so has moved by less than lambda_1 within the last WINDOW outer
steps, a fresh one follows. Both loops have a cap.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.compute.cost import (
    FLOAT_BYTES,
    GRADIENT_PASSES,
    TEST_COPIES,
    TRAINING_COPIES,
    NetworkCost,
)
from utils.compute.execution import PLAIN, Execution, Function
from utils.compute.flat import FlatNetwork
from utils.compute.layers import LayerFeatures, check_layers
from utils.config.fields import option
from utils.core import ranks
from utils.core.rng import stream
from utils.data.augment import active_groups
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work
from utils.methods.by_class import ByClassOptions, Classes, make_batches, most_classes, targets_of
from utils.methods.distribution import FEATURE_PASSES
from utils.methods.inner_training import InnerTraining
from utils.methods.real_loss import fresh_theta
from utils.methods.unroll.losses import training_loss
from utils.methods.unroll.options import BatchOptions
from utils.methods.unroll.students import Students

_GROUP = "aligning features (CAFE)"
WINDOW = 10  # accuracies that are compared with one another
# w_k of all activations but the last, of that one, and of what the last block ends with: published
# as 1, and once more for the same numbers flattened.
EARLY, LAST, END = 0.1, 1.0, 2.0
# Parameter vectors: the module's, the network's before and after an epoch, its gradient.
PARAMETER_VECTORS = 4
# Copies of a class's features: the real mean, the miss and its slope.
CLASS_COPIES = 3
# Features of real and synthetic images, and the way back to these, each of two numbers of classes;
# the network's gradient and its answers.
COMPILED_FUNCTIONS = 8


@dataclass(frozen=True)
class CAFEOptions(BatchOptions, ByClassOptions):
    lambda_1: float = option(
        0.04,
        "a network is replaced when its accuracy has moved by less within ten outer steps",
        group=_GROUP,
        minimum=0,
    )
    lambda_2: float = option(
        0.03,
        "an outer step follows when the accuracy has moved by more within ten epochs of training",
        group=_GROUP,
        minimum=0,
    )
    batch_probe: int = option(
        128,
        "real images of each class, drawn anew, that an accuracy is measured on",
        group=_GROUP,
        minimum=1,
    )
    max_loop: int = option(
        100,
        "the most outer steps of a network, and the most epochs between two of them",
        group=_GROUP,
        minimum=1,
    )
    beta: float = option(
        0.01,
        "weight of the discrimination loss, a sum over the real images",
        group=_GROUP,
        minimum=0,
    )
    halve_at: list[int] | None = option(
        None, "outer steps at which lr_img is halved (default: never)", group=_GROUP, minimum=0
    )


@dataclass(frozen=True)
class Loop:
    """Turns of a loop so far, and the network's accuracies behind the last WINDOW of them."""

    turns: int = 0
    latest: tuple[float, ...] = ()

    def after(self, accuracy: float) -> "Loop":
        """The same one turn later."""
        return Loop(self.turns + 1, (*self.latest, accuracy)[-WINDOW:])

    @property
    def spread(self) -> float:
        """How far the last WINDOW accuracies are apart; NaN, which is neither small nor large,
        where there are fewer.
        """
        return max(self.latest) - min(self.latest) if len(self.latest) == WINDOW else math.nan


@dataclass(frozen=True)
class Loops:
    """When the loop of a network's outer steps ends, and that of the epochs between two of them;
    each has `most` turns.
    """

    lambda_1: float
    lambda_2: float
    most: int

    def is_flat(self, outer: Loop) -> bool:
        return outer.spread < self.lambda_1

    def has_moved(self, inner: Loop) -> bool:
        return inner.spread > self.lambda_2

    def is_full(self, loop: Loop) -> bool:
        return loop.turns == self.most

    def capped(self, inner: Loop, outer: Loop) -> int:
        """How many of both ended at their cap."""
        return (self.is_full(inner) and not self.has_moved(inner)) + (
            self.is_full(outer) and not self.is_flat(outer)
        )


@dataclass(frozen=True)
class Running:
    """Network `number` of a run in its loop of outer steps; theta (1, P) has trained up to the last
    of them, and is never written to.
    """

    theta: Tensor
    number: int = 0
    outer: Loop = field(default_factory=Loop)


class FeatureAlignment:
    """CAFE on the images of `classes`; `fresh` makes a random network from a seed.

    labels (N,) are those of the synthetic images. Between outer steps the network trains on them
    with rate `lr_net`, `batch_syn` a step, augmented by `dsa_groups`. Several processes divide the
    classes, and these batches. Images go in pieces of `micro_batch` (None: all at once): the result
    is the same, but for networks with batch norm.

    Memory: the features of a piece in all layers, their means of all classes, and the last ones of
    all real images.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        classes: Classes,
        labels: Tensor,
        loops: Loops,
        *,
        batch_probe: int,
        beta: float,
        halve_at: Sequence[int],
        lr_net: float,
        batch_syn: int | None,
        dsa_groups: tuple[str, ...] | None,
        seed: int,
        execution: Execution = PLAIN,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._fresh = fresh
        self._classes = classes
        self._loops = loops
        self._batch_probe = batch_probe
        self._beta = beta
        self._halve_at = halve_at
        self._seed = seed
        self._whole = classes.batch_real * len(classes.own)  # real images that are matched
        images = classes.train.images
        self._like = images[:0]  # device and type of the parameters
        sizes = LayerFeatures(fresh(0)).sizes(images.shape[1:])
        self._weights = _weights(sizes).to(self._like)
        self._last = sizes[-1]
        adapted = execution.adapt(fresh(0)).to(images.device)
        network = FlatNetwork(adapted, dtype=dtype)
        self._means, self._pull_back = _features(
            FlatNetwork(LayerFeatures(adapted), dtype=dtype), self._last, execution
        )

        def right(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return ((network(theta, x).argmax(1) == y).sum(),)

        self._right = execution.prepare(right)
        self._students = Students(
            training_loss(network), execution=execution, micro_batch=micro_batch
        )
        self._train = InnerTraining(
            self._students, labels, self._like.new_tensor(lr_net), batch_syn, dsa_groups
        )
        self._running = self._first(0)

    @classmethod
    def build(cls, setting: Setting) -> "FeatureAlignment":
        """Build the method of a run; its flags are CAFEOptions."""
        options = setting.options
        return cls(
            setting.fresh,
            Classes.of(setting, "cafe"),
            setting.labels,
            Loops(options.lambda_1, options.lambda_2, options.max_loop),
            batch_probe=options.batch_probe,
            beta=options.beta,
            halve_at=options.halve_at or (),
            lr_net=options.lr_net,
            batch_syn=options.batch_syn,
            dsa_groups=setting.dsa_groups,
            seed=options.seed,
            execution=setting.execution,
            dtype=setting.dtype,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Train the network on the images as they are now, then match features at it."""
        images, before, loops = learned["images"], self._running, self._loops

        def work() -> tuple[Tensor, Loop, Tensor, Tensor, float]:
            theta, inner = before.theta, Loop()
            if before.outer.turns:
                theta, inner = self._trained(theta, iteration, images)
            accuracy = self._accuracy(theta, iteration, 0)
            return theta, inner, *self._match(theta, iteration, images), accuracy

        theta, inner, loss, by_images, accuracy = self._students.attempt(
            work, batch=max(self._whole, len(images))
        )
        outer = before.outer.after(accuracy)
        is_over = loops.is_flat(outer) or loops.is_full(outer)
        self._running = (
            self._first(before.number + 1) if is_over else Running(theta, before.number, outer)
        )
        return Step(
            loss=ranks.sum_over_ranks(loss),
            grads={"images": ranks.sum_over_ranks(by_images)},
            record={
                "network": before.number,
                "epochs": inner.turns,
                "accuracy": accuracy,
                "capped": loops.capped(inner, outer),
            },
            factor=0.5 ** sum(iteration >= at for at in self._halve_at),
            shown=f"network {before.number}",
        )

    def state_dict(self) -> dict[str, Any]:
        running = self._running
        return {
            "theta": running.theta,
            "number": running.number,
            "turns": running.outer.turns,
            "latest": list(running.outer.latest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        outer = Loop(state["turns"], tuple(state["latest"]))
        self._running = Running(state["theta"].to(self._like), state["number"], outer)

    def _first(self, number: int) -> Running:
        theta = fresh_theta(self._fresh, self._seed, number).to(self._like)
        return Running(theta[None], number)

    def _trained(self, theta: Tensor, iteration: int, images: Tensor) -> tuple[Tensor, Loop]:
        """theta (1, P) after the epochs that follow an outer step, and their loop."""
        loop = Loop()
        while not (self._loops.has_moved(loop) or self._loops.is_full(loop)):
            generator = stream(self._seed, "student", iteration, loop.turns)
            theta = self._train(theta, images, epochs=1, generator=generator)
            loop = loop.after(self._accuracy(theta, iteration, loop.turns + 1))
        return theta, loop

    def _accuracy(self, theta: Tensor, iteration: int, number: int) -> float:
        """That of theta (1, P) on random real images, which differ by the probe's `number`."""
        train, own = self._classes.train, self._classes.own
        streams = (stream(self._seed, "cafe", iteration, "probe", number, c) for c in own)
        chosen = [
            self._classes.choose(label, self._batch_probe, generator)
            for label, generator in zip(own, streams, strict=True)
        ]
        indices = torch.cat(chosen).to(train.images.device)
        x, y = train.images[indices], train.labels[indices]
        size = self._students.micro_batch or len(y)
        pieces = zip(x.split(size), y.split(size), strict=True)
        right = sum(self._right(theta, *(each[None] for each in piece))[0][0] for piece in pieces)
        assert isinstance(right, Tensor)
        counts = torch.stack([right, torch.full_like(right, len(y))])
        all_right, seen = ranks.sum_over_ranks(counts).tolist()
        return all_right / seen

    def _match(self, theta: Tensor, iteration: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of J at theta (1, P), and of dJ/dimages."""
        drawn = {label: self._classes.draw(iteration, label) for label in self._classes.own}
        groups = list(self._groups())
        misses, real_ends = [], []
        centres = images.new_zeros(self._classes.count, self._last)  # m_c
        for labels in groups:
            real, synthetic = zip(*(drawn[label] for label in labels), strict=True)
            wanted, ends = self._seen(theta, make_batches(real, self._classes.train.images))
            found, _ = self._seen(theta, make_batches(synthetic, images))
            misses.append(found - wanted)
            real_ends.append(ends)
            centres[list(labels)] = found[:, -self._last :]
        told, by_centres = self._discriminate(
            torch.cat([ends.flatten(0, 1) for ends in real_ends]),
            torch.cat(
                [
                    targets_of(ends, labels).flatten()
                    for labels, ends in zip(groups, real_ends, strict=True)
                ]
            ),
            ranks.sum_over_ranks(centres),
        )
        loss, by_images = told, torch.zeros_like(images)
        for labels, miss in zip(groups, misses, strict=True):
            slopes = 2 * self._weights * miss
            slopes[:, -self._last :] += by_centres[list(labels)]
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                seen = make_batches([drawn[label][1] for label in labels], leaf)
            by_seen = self._back(theta, seen.detach(), slopes / self._classes.ipc)
            by_images += torch.autograd.grad(seen, leaf, by_seen)[0]
            loss = loss + (self._weights * miss.square()).sum()
        return loss, by_images

    @torch.enable_grad()
    def _discriminate(self, ends: Tensor, labels: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of this process's real images, whose last features are (n, L), and the
        derivative of all processes' by the centres (C, L).
        """
        centres = centres.detach().requires_grad_()
        loss = self._beta * F.cross_entropy(ends @ centres.T, labels, reduction="sum")
        (by_centres,) = torch.autograd.grad(loss, centres)
        return loss.detach(), ranks.sum_over_ranks(by_centres)

    def _groups(self) -> Iterator[Sequence[int]]:
        """This process's classes, as many at a time as a piece has room for."""
        size = self._students.micro_batch or self._whole
        return self._classes.groups(max(1, size // self._classes.batch_real))

    @torch.no_grad()
    def _seen(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean features (K, F) of x (K, B, C, H, W), and the last ones of all (K, B, L)."""
        parts = [self._means(theta, part[None]) for part in self._pieces(x)]
        sums, ends = zip(*parts, strict=True)
        return torch.stack(sums).sum(0)[0] / x.shape[1], torch.cat(ends, 2)[0]

    def _back(self, theta: Tensor, x: Tensor, slopes: Tensor) -> Tensor:
        """d<sum of the features, slopes>/dx of x (K, B, C, H, W), with slopes (K, F)."""
        parts = [self._pull_back(theta, part[None], slopes[None])[0][0] for part in self._pieces(x)]
        return torch.cat(parts, 1)

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        """x (K, B, ...) as it is where it is no larger than a piece, else some images at a time."""
        size = self._students.micro_batch or x.shape[:2].numel()
        return x.split(max(1, size // len(x)), 1)


def _weights(sizes: Sequence[int]) -> Tensor:
    """w of each feature (F,), for layers of so many."""
    by_layer = [*[EARLY] * (len(sizes) - 2), LAST, END]
    weights = torch.tensor(by_layer, dtype=torch.float64)
    return weights.repeat_interleave(torch.tensor(sizes))


def _features(phi: FlatNetwork, last: int, execution: Execution) -> tuple[Function, Function]:
    """Of x (K, B, C, H, W), K classes: the sums of their features (K, F) with the `last` ones of
    each image (K, B, L); and the derivative by x of <sums, slopes>, with slopes (K, F).
    """

    def sums(theta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        found = phi(theta, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return found.sum(1), found[..., -last:].clone()

    def pull_back(theta: Tensor, x: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        to_images: Callable = torch.func.vjp(lambda x: sums(theta, x)[0], x)[1]
        return to_images(slopes)

    return execution.prepare(sums), execution.prepare(pull_back)


def count_work(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of the process with the most classes; UserError where one would have none.

    Both loops count as if they ended as soon as they may: WINDOW outer steps of a network, as many
    epochs between two. An outer step has its part of those.
    """
    own, turns = most_classes(classes, processes), min(WINDOW, options.max_loop)
    epochs = turns - 1  # as many times `turns`, for each of `turns` outer steps
    real, ipc, images = options.batch_real, options.ipc, classes * options.ipc
    batch_syn = min(options.batch_syn or images, images)
    matching = own * (real + FEATURE_PASSES * ipc)
    probes = own * options.batch_probe * (1 + epochs)
    training = GRADIENT_PASSES * epochs * images // processes
    # A forward pass without a graph, or of synthetic images one with a graph and the way back: the
    # larger counts, for each real image. The features of all layers come to it.
    copies = 1 + max(TEST_COPIES, TRAINING_COPIES * min(1, ipc / real))
    features = cost.activation_bytes // 2  # of an image, at most: each has been through a layer
    vectors = PARAMETER_VECTORS * FLOAT_BYTES * cost.parameters
    at_once = max(real, ipc, options.batch_probe)
    return Work(
        flop=(matching + probes + training) * cost.flop,
        passes=2 + epochs * (1 + -(-images // batch_syn)),
        batch=max(own * at_once, -(-batch_syn // processes)),
        whole_batch=max(classes * at_once, batch_syn),
        students=1,
        kept_bytes=vectors + own * CLASS_COPIES * features,
        image_bytes=int(copies * cost.activation_bytes),
        compiled_layers=COMPILED_FUNCTIONS * cost.layers,
        keeps_train=True,
    )


def _title(config: Mapping[str, Any]) -> str:
    augments = config["dsa"] and not config["no_aug"]
    has_dsa = active_groups(dsa=augments, strategy=config["dsa_strategy"])
    return "CAFE+DSA" if has_dsa else "CAFE"


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    """Say what the loops are: nothing of them contradicts the rest."""
    least, most = min(WINDOW, options.max_loop), options.max_loop
    print(
        f"{options.Iteration} outer steps, {least} to {most} of each network, until its accuracy "
        f"is flat (lambda_1 {options.lambda_1:g}); between two it trains for {least} to {most} "
        f"epochs, until that has moved (lambda_2 {options.lambda_2:g}): the same for every --ipc"
    )


def _complaint(losses: Sequence[float], records: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how many loops ended at their cap, where some did."""
    capped = sum(record["capped"] for record in records)
    if not capped:
        return None
    return (
        f"in the last {len(records)} outer steps {capped} loops ended at --max_loop, not by "
        "--lambda_1 or --lambda_2"
    )


def _spec(summary: str, **presets: Any) -> MethodSpec:
    return MethodSpec(
        summary=summary,
        options=CAFEOptions,
        presets={
            "pix_init": "noise",
            "lr_img": 0.1,
            "halve_at": [12_000, 16_000, 18_000],
            "batch_syn": 256,
            "Iteration": 20_000,
            "eval_it": 2_000,
            **presets,
        },
        title=_title,
        build=FeatureAlignment.build,
        count_work=count_work,
        check_network=partial(check_layers, why="--method cafe"),
        learned=lambda options, images, soft: [Learned("images", images, options.lr_img, "lr_img")],
        syn_lr=lambda options: options.lr_net,
        if_not_finite="the loss is not finite: lower --lr_img or --lr_net",
        stalled=_complaint,
        check=_check,
    )


CAFE = _spec("match the features of all layers, in networks that train on the images", no_aug=True)
CAFE_DSA = _spec("cafe with all images of a class augmented alike")
